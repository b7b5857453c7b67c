"""The command line itself, what becomes of paths, and the two arguments that most verbs share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from phi3_dist.cli.completion import complete_file
from phi3_dist.config.user_paths import user_path

VerbT = TypeVar("VerbT", bound=Callable[..., Any])
MAY_BE_PATHS = {
    "against", "base", "base_model", "config", "container_image", "data", "env_file", "model", "rows", "script",
    "server_base", "server_python", "source", "target",
}  # fmt: skip
"""Arguments and options that take a path or something else, such as a hub id."""


class Verbs(typer.Typer):
    """Verbs that get every path with its `~` written out, and none with a control character in it."""

    def command(self, *args: Any, **kwargs: Any) -> Callable[[VerbT], VerbT]:
        add = super().command(*args, **kwargs)

        def added(verb: VerbT) -> VerbT:
            @functools.wraps(verb)
            def with_paths(**given: Any) -> Any:
                return verb(**{name: _as_path(name, value) for name, value in given.items()})

            add(with_paths)
            return verb

        return added


def _as_path(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_as_path(name, one) for one in value]
    if isinstance(value, Path):
        return user_path(value)
    return user_path(value) if isinstance(value, str) and name in MAY_BE_PATHS else value


app = Verbs(
    name="phi3-dist",
    help="Accelerated and distributed LoRA and QLoRA fine-tuning of Microsoft's Phi-3 family.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = Verbs(help="Make run files, and look at them.", no_args_is_help=True, rich_markup_mode=None)
data_app = Verbs(help="Look at the rows of a run.", no_args_is_help=True, rich_markup_mode=None)
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
