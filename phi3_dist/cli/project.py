"""Verbs that write what a project starts with: its folder, and configs for another number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phi3_dist.cli.app import app, config_app
from phi3_dist.cli.completion import complete_file, complete_model, complete_strategy


@app.command()
def init(
    folder: Annotated[
        Path,
        typer.Argument(help="The project's folder; it may exist.", show_default=False, autocompletion=complete_file),
    ],
    model: Annotated[
        str,
        typer.Option(help="The base model: a hub id of the family, or a folder.", autocompletion=complete_model),
    ] = "microsoft/Phi-3-mini-4k-instruct",
) -> None:
    """Create a project: a run file for your data, example chats, configs, launch scripts. Replaces nothing."""
    import shlex

    from phi3_dist.config.new_project import RUN_FILE, new_project

    files = new_project(folder, model)
    typer.echo(f"{folder}: {len(files)} files; {RUN_FILE} is the run file, README.md says what to do next")
    typer.echo(f"next: cd {shlex.quote(str(folder))}, then phi3-dist data show {RUN_FILE}")


@config_app.command("accelerate")
def config_accelerate(
    strategy: Annotated[
        str,
        typer.Argument(
            help="single, ddp, zero1, zero2, zero2_offload, zero3, zero3_offload, fsdp2 or fsdp2_offload.",
            show_default=False,
            autocompletion=complete_strategy,
        ),
    ],
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on all nodes together. Default: this machine's GPUs, times --nodes."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use the CPU even if there are GPUs (single and ddp).")] = False,
    out: Annotated[
        Path,
        typer.Option(help="Folder for accelerate/NAME.yaml and deepspeed/STRATEGY.json.", autocompletion=complete_file),
    ] = Path("configs"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that hold something else.")] = False,
) -> None:
    """Write the Accelerate config of a strategy, and the DeepSpeed config that belongs to it; print how to launch."""
    from phi3_dist.machine.own_cards import own_cards
    from phi3_dist.planning.write_configs import write_configs

    count = processes or (1 if strategy == "single" else nodes * len(own_cards()))
    written = write_configs(strategy, processes=count, nodes=nodes, cpu=cpu, out=out, overwrite=overwrite)
    for file in written.files:
        typer.echo(f"written: {file}")
    if nodes > 1:
        typer.echo("on each node, with its RANK from 0 on and the first node's address as HEAD:")
    typer.echo(written.command)
