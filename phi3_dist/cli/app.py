"""The command line itself, and the two arguments that most verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phi3_dist.cli.completion import complete_file

app = typer.Typer(
    name="phi3-dist",
    help="Accelerated and distributed LoRA and QLoRA fine-tuning of Microsoft's Phi-3 family.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Make run files, and look at them.", no_args_is_help=True, rich_markup_mode=None)
data_app = typer.Typer(help="Look at the rows of a run.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")

RunFile = Annotated[
    Path,
    typer.Argument(metavar="RUN.yaml", help="The run file.", show_default=False, autocompletion=complete_file),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key.path=value]...", help="Values that replace the run file's.", show_default=False),
]


def _version(wanted: bool) -> None:
    if wanted:
        from phi3_dist.machine.versions import version_lines

        typer.echo("\n".join(version_lines()))
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the versions for a bug report.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass
