"""The verbs of `phi3-dist`. No logic here: each verb loads what it needs and calls one function.

Everything that imports torch is imported inside the verb that needs it, so that help, `config` and `plan` answer
at once on a login node.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from phi3_dist import __version__
from phi3_dist.errors import ConfigError, MachineError, Phi3DistError, Problem

app = typer.Typer(
    name="phi3-dist",
    help="Accelerated and distributed LoRA and QLoRA fine-tuning of Microsoft's Phi-3 family.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Look at run files.", no_args_is_help=True, rich_markup_mode=None)
data_app = typer.Typer(help="Look at the rows of a run.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key.path=value]...", help="Values that replace the run file's.", show_default=False),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"phi3-dist {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def train(
    run_file: RunFile,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run folder.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint that verifies, or start.")
    ] = False,
    allow_changed: Annotated[
        list[str] | None, typer.Option(help="A key that may differ from the checkpoint's run; may be repeated.")
    ] = None,
) -> None:
    """Train a LoRA adapter: on one device, or on every process of `accelerate launch … -m phi3_dist train`."""
    from phi3_dist.config.load import load_run

    cfg = load_run(run_file, overrides or ())
    from phi3_dist.machine.probe import launch_facts, probe
    from phi3_dist.training.loop import train as run_training

    if overwrite and resume:
        raise ConfigError(Problem("--overwrite --resume", "exclude each other", "give one of them"))
    result = run_training(
        cfg,
        probe(),
        launch_facts(os.environ),
        overwrite=overwrite,
        resume=resume,
        allow_changed=allow_changed or (),
    )
    if result.exit_code:
        raise typer.Exit(result.exit_code)
    if result.steps == 0:
        typer.echo(f"{result.folder} has finished already")
    elif result.receipt is not None:
        from phi3_dist.report.curves import draw_curves
        from phi3_dist.report.page import write_page

        typer.echo(f"curves: {draw_curves(result.folder)}")
        typer.echo(f"page: {write_page(result.folder)}")


@config_app.command("show")
def config_show(run_file: RunFile, overrides: Overrides = None) -> None:
    """Print the resolved run, with every default filled in."""
    from phi3_dist.config.load import load_run, resolved_yaml

    typer.echo(resolved_yaml(load_run(run_file, overrides or ())), nl=False)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of run files, for editors."""
    import json

    from phi3_dist.config.load import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@config_app.command("diff")
def config_diff(first: RunFile, second: RunFile) -> None:
    """Print each key in which two run files differ."""
    from phi3_dist.config.load import diff, load_run

    for path, ours, theirs in diff(load_run(first), load_run(second)):
        typer.echo(f"{path}: {ours} -> {theirs}")


@data_app.command("show")
def data_show(
    run_file: RunFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="Rows to print.")] = 3,
) -> None:
    """Print rows with their supervised tokens in colour, and statistics of lengths."""
    from phi3_dist.config.load import load_run

    cfg = load_run(run_file, overrides or ())
    from rich.console import Console

    from phi3_dist.data.show import show
    from phi3_dist.modeling.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(cfg.model.tokenizer or cfg.model.source, cfg.model.revision)
    Console(soft_wrap=True, highlight=False).print(show(cfg.data, tokenizer, rows))


@app.command("prepare")
def prepare_run(run_file: RunFile, overrides: Overrides = None) -> None:
    """Do what a run needs before a GPU is held: download the base, tokenize and pack the data, hash the weights."""
    from phi3_dist.config.load import load_run

    cfg = load_run(run_file, overrides or ())
    from phi3_dist.data.batches import prepare
    from phi3_dist.modeling.base import find_base
    from phi3_dist.modeling.tokenizer import load_tokenizer
    from phi3_dist.training.folder import cache_folder
    from phi3_dist.training.resume import base_fingerprint

    base = find_base(cfg.model.source, cfg.model.revision)
    tokenizer = load_tokenizer(cfg.model.tokenizer or cfg.model.source, cfg.model.revision)
    data = prepare(cfg.data, tokenizer, cache_folder())
    base_fingerprint(base, cache_folder())
    typer.echo(f"base   {base.folder or base.source}")
    held_out = len(data.validation.packs) if data.validation else 0
    typer.echo(f"data   {len(data.train.packs)} packs to train on, {held_out} held out, in {cache_folder()}")
    for notice in data.notices:
        typer.echo(f"       {notice}")


@app.command()
def report(run_folder: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]) -> None:
    """Draw the curves and the page of a run, also of one that is still running."""
    from phi3_dist.report.curves import draw_curves
    from phi3_dist.report.page import write_page

    typer.echo(f"curves: {draw_curves(run_folder)}")
    typer.echo(f"page: {write_page(run_folder)}")


@app.command()
def plan(
    run_file: RunFile,
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option("--config_file", help="Accelerate config of the launch.")] = None,
    processes: Annotated[int | None, typer.Option("--num_processes", min=1, help="Processes over all nodes.")] = None,
    nodes: Annotated[int | None, typer.Option("--num_machines", min=1, help="Nodes.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    memory_gib: Annotated[float, typer.Option("--memory-gib", min=0.1, help="Memory of one device, GiB.")] = 80.0,
) -> None:
    """Print what would run and whether it fits, before a GPU is held. Imports no torch."""
    from rich.console import Console

    from phi3_dist.config.load import load_run
    from phi3_dist.machine.probe import package_versions
    from phi3_dist.planning.plan import make_plan
    from phi3_dist.planning.preview import assumed_machine, launch_of_config, plan_table, shape_of_source

    cfg = load_run(run_file, overrides or ())
    launch = launch_of_config(config, processes, nodes)
    kind = "cpu" if launch.use_cpu else device
    machine = assumed_machine(kind, launch.world_size // launch.nodes, memory_gib, package_versions())
    Console(highlight=False).print(plan_table(make_plan(cfg, machine, launch, family_or_shape=shape_of_source(cfg))))


@app.command()
def doctor() -> None:
    """Say what this machine is and what is wrong with it."""
    from phi3_dist.machine.doctor import diagnose

    findings = diagnose()
    for finding in findings:
        typer.echo(f"{finding.level:<5} {finding.what}" + (f"\n      fix: {finding.fix}" if finding.fix else ""))
    if any(finding.level == "bad" for finding in findings):
        raise typer.Exit(MachineError.exit_code)


@app.command()
def support() -> None:
    """Print which strategy goes with which quantisation, device and precision, as Markdown."""
    from phi3_dist.planning.support import matrix_markdown

    typer.echo(matrix_markdown(), nl=False)


@app.command()
def slurm(
    run_file: RunFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=0, help="GPUs and processes a node.")] = 0,
    processes_per_node: Annotated[int | None, typer.Option(min=1, help="Processes a node of a CPU job.")] = None,
    config: Annotated[str, typer.Option("--config_file", help="Accelerate config.")] = "configs/accelerate/ddp.yaml",
    time: Annotated[str | None, typer.Option(help="Time limit: 90m, 4h, 1d12h.")] = None,
    partition: Annotated[str | None, typer.Option()] = None,
    account: Annotated[str | None, typer.Option()] = None,
    qos: Annotated[str | None, typer.Option()] = None,
    constraint: Annotated[str | None, typer.Option()] = None,
    container_image: Annotated[str | None, typer.Option(help="Image for srun's pyxis plugin.")] = None,
    env_file: Annotated[str | None, typer.Option(help="Shell file that every node sources first.")] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE to export. May be repeated.")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="CPUs a node, for all its processes.")] = None,
    mem: Annotated[str | None, typer.Option(help="Memory a node, in Slurm's form: 64G.")] = None,
    exclusive: Annotated[bool, typer.Option("--exclusive", help="Whole nodes.")] = False,
    master: Annotated[str | None, typer.Option(help="Address of the first node; else it is looked up.")] = None,
    directive: Annotated[list[str] | None, typer.Option(help="One more #SBATCH line, as --name=value.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after a time limit, a preemption or a lost node, as the same job.")
    ] = False,
    slack: Annotated[int, typer.Option(help="Seconds before the time limit at which to save and stop.")] = 180,
    max_requeues: Annotated[int, typer.Option(help="How often the job may start again, with --resume.")] = 3,
    array: Annotated[list[str] | None, typer.Option(help="A sweep: key.path=value,value. May be repeated.")] = None,
    chain: Annotated[int, typer.Option(help="Jobs that go on one from another, for runs beyond a time limit.")] = 1,
    script: Annotated[Path | None, typer.Option(help="Where to write the script.")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Hand it to Slurm.")] = False,
) -> None:
    """Render an sbatch script from the run file and a topology, check it, and submit it if asked."""
    from dataclasses import replace

    from phi3_dist.config.load import load_run
    from phi3_dist.machine.cluster import slurm_command
    from phi3_dist.planning.slurm import SlurmJob, SlurmTopology, parse_env, parse_sweep

    arguments = [*(overrides or ()), *(["--resume"] if resume else [])]
    job = SlurmJob.of(load_run(run_file, overrides or ()), str(run_file), arguments)
    topology = SlurmTopology(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        processes_per_node=processes_per_node,
        config=config,
        time=time,
        partition=partition,
        account=account,
        qos=qos,
        constraint=constraint,
        container_image=container_image,
        env_file=env_file,
        env=parse_env(env or ()),
        cpus_per_task=cpus_per_task,
        mem=mem,
        exclusive=exclusive,
        master=master,
        slack_s=slack,
        max_requeues=max_requeues,
        directives=tuple(directive or ()),
    )
    job = replace(job, sweep=parse_sweep(array)) if array else job
    for line in slurm_command(job, topology, script=script, submit=submit, chain=chain).lines():
        typer.echo(line)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A script, notebook, JSON or YAML of another tool.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run file to write; else printed.")] = None,
    devices: Annotated[int, typer.Option(min=1, help="Devices that the recipe was meant for.")] = 1,
) -> None:
    """Make a run file of another tool's recipe, and say of each key what became of it. Nothing of it is run."""
    from rich.console import Console

    from phi3_dist.config.importing import findings_table, import_run

    imported = import_run(source, devices=devices)
    Console(stderr=True).print(findings_table(imported))
    if output is None:
        typer.echo(imported.run_yaml, nl=False)
    elif output.exists():
        raise ConfigError(Problem(str(output), "exists", "give another name"))
    else:
        output.write_text(imported.run_yaml, encoding="utf-8")


@app.command()
def lint(source: Annotated[Path, typer.Argument(help="A script, notebook, JSON or YAML of another tool.")]) -> None:
    """Report the known faults of a recipe: Llama targets, "32000" as text, fp16 weights, naive packing, …"""
    from rich.console import Console

    from phi3_dist.config.faults import faults, faults_table

    found = faults(source)
    Console().print(faults_table(found))
    if found:
        raise typer.Exit(ConfigError.exit_code)


@app.command()
def convert(
    direction: Annotated[str, typer.Argument(help="loralib-to-peft or peft-to-loralib.", show_default=False)],
    source: Annotated[Path, typer.Argument(help="loralib file, or PEFT adapter folder.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="What to write.", show_default=False)],
    alpha: Annotated[list[str] | None, typer.Option(help="32, or module=8; a loralib file does not hold it.")] = None,
    enable_lora: Annotated[
        list[str] | None, typer.Option(help="Groups of a MergedLinear: module=true,false,true.")
    ] = None,
    kinds: Annotated[list[str] | None, typer.Option(help="module=linear, embedding or conv2d.")] = None,
    r: Annotated[int | None, typer.Option(min=1, help="Rank of each group of a MergedLinear.")] = None,
    base_config: Annotated[Path | None, typer.Option(help="config.json of the base, or its folder.")] = None,
    base_name: Annotated[str | None, typer.Option(help="Base model that the adapter's config names.")] = None,
) -> None:
    """Convert an adapter between loralib and PEFT, exactly or not at all."""
    from phi3_dist.adapters.loralib_files import by_module, convert_file

    words = by_module(alpha=alpha or (), enable_lora=enable_lora or (), kinds=kinds or ())
    done = convert_file(
        source,
        target,
        direction,
        alpha=words.alpha,
        enable_lora=words.enable_lora,
        kinds=words.kinds,
        r=r,
        base_config=base_config,
        base_name=base_name,
    )
    for note in done.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"written: {done.target} ({done.tensors} tensors)")


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Folder that holds run folders.")] = Path("runs"),
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
) -> None:
    """List run folders: state, step, loss, tokens/s, last checkpoint, job and nodes."""
    from rich.console import Console

    from phi3_dist.report.runs import list_runs, runs_table, watch_runs

    if watch:
        watch_runs(folder, Console())
    else:
        Console().print(runs_table(list_runs(folder), base=folder))


@app.command()
def logs(
    run_folder: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    rank: Annotated[int, typer.Option(min=0, help="Rank whose log to print.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing what is appended.")] = False,
) -> None:
    """Print the log of one rank of a run's Slurm job."""
    from phi3_dist.report.runs import find_log, follow_log

    for piece in follow_log(find_log(run_folder, rank), follow=follow):
        typer.echo(piece, nl=False)


def _tell(error: Phi3DistError) -> None:
    """One message: on rank 0 in full, on other ranks in one line with the rank."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        typer.echo(f"{type(error).__name__}:", err=True)
        for problem in error.problems:
            typer.echo(f"  {problem}", err=True)
    else:
        typer.echo(
            f"[rank {rank}] {type(error).__name__}: {error.problems[0].where} {error.problems[0].what}", err=True
        )


def main() -> None:
    """Run the command line. A user's mistake ends in one message and its exit code; a bug in a traceback."""
    # bitsandbytes announces at import that an optional kernel for 4-bit inference is missing
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except Phi3DistError as error:
        _tell(error)
        sys.stdout.flush()
        sys.exit(error.exit_code)
    except Exception as error:
        if "RANK" in os.environ:
            error.add_note(f"on rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE', '?')}")
        raise
