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
from phi3_dist.errors import Phi3DistError

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
) -> None:
    """Train a LoRA adapter: on one device, or on every process of `accelerate launch … -m phi3_dist train`."""
    from phi3_dist.config.load import load_run

    cfg = load_run(run_file, overrides or ())
    from phi3_dist.machine.probe import launch_facts, probe
    from phi3_dist.training.loop import train as run_training

    result = run_training(cfg, probe(), launch_facts(os.environ), overwrite=overwrite)
    if result.receipt is not None:
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


@app.command()
def report(run_folder: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]) -> None:
    """Draw the curves and the page of a run, also of one that is still running."""
    from phi3_dist.report.curves import draw_curves
    from phi3_dist.report.page import write_page

    typer.echo(f"curves: {draw_curves(run_folder)}")
    typer.echo(f"page: {write_page(run_folder)}")


def _tell(error: Phi3DistError) -> None:
    """One message: on rank 0 in full, on other ranks in one line with the rank."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        typer.echo(f"{type(error).__name__}:", err=True)
        for problem in error.problems:
            typer.echo(f"  {problem}", err=True)
    else:
        typer.echo(f"[rank {rank}] {type(error).__name__}: {error.problems[0].where} {error.problems[0].what}", err=True)


def main() -> None:
    """Run the command line. A user's mistake ends in one message and the exit code of its error; a bug in a traceback."""
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
