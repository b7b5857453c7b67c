"""`phi3-dist plan`: what would run and whether it fits, before a GPU is held."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from phi3_dist.cli.app import Overrides, RunFile, app
from phi3_dist.config.user_paths import user_path

__all__ = ["plan"]

Network = Annotated[float | None, typer.Option("--network-gbit", min=0.1, help="Network rate of a node, Gbit/s.")]
Tokens = Annotated[
    float | None,
    typer.Option("--tokens", min=1, help="Tokens of all training rows, for the time of a run without train.max_steps."),
]
Learn = Annotated[
    bool, typer.Option("--learn", help="The arguments are folders of finished runs: learn this card's overheads.")
]
Why = Annotated[str | None, typer.Option("--why", help="Print every term of one strategy, such as 'zero3 nf4'.")]


@app.command()
def plan(
    run_file: RunFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="Nodes.")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus-per-node", min=1, help="GPUs in each node.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="The card, such as h100-80gb.")] = None,
    memory: Annotated[str | None, typer.Option("--memory-gib", help="Memory of one device: 80, 80GiB.")] = None,
    host_memory: Annotated[str | None, typer.Option("--host-memory-gib", help="Memory of a node's host.")] = None,
    network: Network = None,
    price: Annotated[float | None, typer.Option("--price", min=0, help="Price of one GPU for an hour.")] = None,
    tokens: Tokens = None,
    why: Why = None,
    write: Annotated[
        Path | None, typer.Option("--write", help="Folder for configs, launch command and job script of the best.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    config: Annotated[Path | None, typer.Option("--config_file", help="Accelerate config: plan that launch.")] = None,
    processes: Annotated[int | None, typer.Option("--num_processes", min=1, help="With --config_file: ranks.")] = None,
    machines: Annotated[int | None, typer.Option("--num_machines", min=1, help="With --config_file: nodes.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    learn: Learn = False,
) -> None:
    """Print every way to run this on the given GPUs, best first: memory, network, time. Does not import torch.

    With --config_file, --num_processes or --device cpu, or of a sweep file: one launch's plan, choice by choice.
    """
    from phi3_dist.config.load import load_run, read_section
    from phi3_dist.planning.gpus import gib_of
    from phi3_dist.planning.preview import check_rows

    if learn:
        _learn([run_file, *(user_path(Path(one)) for one in overrides or ())])
        return
    memory_gib = None if memory is None else gib_of(memory)
    launch = (config, processes or gpus, machines or nodes, device, memory_gib)
    if read_section(run_file, "sweep")[0] is not None:
        of_runs = {"host-memory-gib": host_memory, "network-gbit": network, "price": price, "why": why, "write": write}
        _a_sweep(run_file, overrides or (), *launch, json=as_json, tokens=tokens, gpu=gpu, **of_runs)
        return
    cfg = load_run(run_file, overrides or ())
    check_rows(cfg)
    if config is not None or processes is not None or machines is not None or device == "cpu":
        _one_launch(cfg, *launch)
        return
    _every_way(
        cfg,
        run_file=run_file,
        overrides=tuple(overrides or ()),
        nodes=nodes,
        gpus_per_node=gpus,
        gpu=gpu,
        memory_gib=memory_gib,
        host_memory_gib=None if host_memory is None else gib_of(host_memory, "--host-memory-gib"),
        network_gbit=network,
        price=price,
        tokens=None if tokens is None else int(tokens),
        why=why,
        write=write,
        as_json=as_json,
    )


def _every_way(cfg: Any, **options: Any) -> None:
    from dataclasses import replace

    from phi3_dist.machine.card_measurements import measured_on
    from phi3_dist.machine.measured_rates import rates_measured_here
    from phi3_dist.machine.own_cards import own_cards
    from phi3_dist.machine.probe import package_versions
    from phi3_dist.planning.plan_for_gpus import PlanRequest, answer, cluster_of

    named = options["gpu"] is not None or options["memory_gib"] is not None
    request = PlanRequest(**options, own_cards=() if named else own_cards(), rows=_rows(cfg))
    card = cluster_of(request)[0].gpu
    own = request.own_cards[0][0] if request.own_cards else card.driver_name if card else ""
    rates = rates_measured_here(own)
    if rates is not None:
        request = replace(request, rates=rates.to_dict())
    request = replace(request, overheads=_overheads(card, request))
    answer(cfg, request, package_versions(), measured_on(card.driver_name) if card else {}, typer.echo)


def _rows(cfg: Any) -> Any:
    """What an earlier preparation noted of the rows, where `data.pack_length: auto` asks for it."""
    from phi3_dist.planning.auto_fields import is_auto

    if not is_auto(cfg.data.pack_length):
        return None
    from phi3_dist.data.cache.length_notes import noted_lengths
    from phi3_dist.machine.storage import cache_folder

    return noted_lengths(cache_folder(cfg.data.cache), cfg)


def _overheads(card: Any, asked: Any) -> Any:
    """What was learned on this machine of the card that is planned for, by either of its names."""
    from phi3_dist.machine.learned_overheads import overheads_of

    names = [*(name for name, _ in asked.own_cards[:1]), *([card.name] if card else [])]
    return next((found for name in names if (found := overheads_of(name)) is not None), None)


def _learn(folders: list[Path]) -> None:
    """Fit a card's overheads from finished runs and keep them."""
    from datetime import date

    from phi3_dist.machine.learned_overheads import keep_overheads
    from phi3_dist.planning.fitted_overheads import fit_overheads
    from phi3_dist.report.measured_overheads import finished_runs

    found = fit_overheads(finished_runs(folders), date.today().isoformat())
    file = keep_overheads(found)
    typer.echo(f"{found.device}: {found.words}")
    if found.tensors is not None:
        typer.echo(f"tensors: at most {found.tensors:.1%} of what was planned")
    if found.step_time_spread is not None and found.runs > 1:
        typer.echo(f"step time: the runs' factors differ by {found.step_time_spread - 1:.0%}")
    typer.echo(f"kept in {file}; plans for this card use it; without the file they use the defaults")


def _a_sweep(file: Path, overrides: Any, *launch_options: Any, **options: Any) -> None:
    """The plan of the candidate that takes most memory, and what the sweep needs: rounds, memory, time."""
    import json
    from dataclasses import asdict

    from phi3_dist.errors import ConfigError, Problem
    from phi3_dist.planning.preview import check_rows
    from phi3_dist.sweep.file import load_sweep
    from phi3_dist.sweep.forecast import forecast, plans_of
    from phi3_dist.sweep.memory import largest_of

    as_json, tokens, gpu = (options.pop(name) for name in ("json", "tokens", "gpu"))
    of_runs = [f"--{name}" for name, value in options.items() if value is not None]
    if of_runs:
        fix = "leave it out, or give a run file; --config_file, --gpus-per-node and --gpu name a sweep's launch"
        raise ConfigError(
            *(Problem(option, "is for the ways to run one run, not for a sweep", fix) for option in of_runs)
        )
    sweep = load_sweep(file, overrides)
    for cfg in sweep.data_runs:
        check_rows(cfg)
    launch, machine, shape = _launch_of(sweep.cfg, launch_options, gpu)
    plans = plans_of(sweep, machine, launch, shape)
    said = forecast(sweep, plans, machine, launch, shape, tokens=None if tokens is None else int(tokens))
    if as_json:
        typer.echo(json.dumps({**asdict(said), "rounds": said.rounds}, indent=2))
        return
    largest = next(one for one in sweep.candidates if one.name == largest_of(plans))
    typer.echo(f"plan of {largest.name}:")
    _print_plan(largest.cfg, machine, launch, plans[largest.name], shape)
    for line in said.lines():
        typer.echo(line)


def _launch_of(cfg: Any, options: tuple[Any, ...], gpu: str | None = None) -> tuple[Any, Any, Any]:
    """The launch, the machine that is assumed for it, and the base's shape where it is known."""
    from dataclasses import replace

    from phi3_dist.machine.probe import package_versions
    from phi3_dist.planning.gpus import find_gpu
    from phi3_dist.planning.preview import assumed_machine, launch_of_config, shape_of_source

    config, processes, nodes, device, memory_gib = options
    launch = launch_of_config(config, processes, nodes)
    kind = "cpu" if launch.use_cpu else device
    card = find_gpu(gpu) if gpu is not None and kind == "cuda" else None
    gib = memory_gib or (card.memory_gib if card else 80.0)
    machine = assumed_machine(kind, launch.world_size // launch.nodes, gib, package_versions())
    machine = replace(machine, device_name=card.driver_name) if card else machine
    return launch, machine, shape_of_source(cfg)


def _print_plan(cfg: Any, machine: Any, launch: Any, planned: Any, shape: Any) -> None:
    from rich.console import Console

    from phi3_dist.planning.preview import check_fit, plan_table

    Console(highlight=False).print(plan_table(planned))
    check_fit(cfg, machine, launch, planned, shape)


def _one_launch(cfg: Any, *launch_options: Any) -> None:
    """Print the plan of one launch."""
    from phi3_dist.planning.auto_fields import plan_with_auto

    launch, machine, shape = _launch_of(cfg, launch_options)
    cfg, planned = plan_with_auto(cfg, machine, launch, shape, rows=_rows(cfg))
    _print_plan(cfg, machine, launch, planned, shape)
