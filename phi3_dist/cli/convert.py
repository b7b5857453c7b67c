"""Verbs that make a run file or an adapter out of something else: a base model, recipes, loralib's files."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from phi3_dist.cli.app import app, config_app
from phi3_dist.errors import ConfigError, Problem

Output = Annotated[Path | None, typer.Option("--output", "-o", help="Run file to write; by default it is printed.")]


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A script, notebook, JSON or YAML of another tool.")],
    output: Output = None,
    devices: Annotated[int, typer.Option(min=1, help="Number of devices that the recipe was meant for.")] = 1,
) -> None:
    """Make a run file of another tool's recipe, and list what became of each key. Nothing in it is executed."""
    from rich.console import Console

    from phi3_dist.recipes.importing import findings_table, import_run

    imported = import_run(source, devices=devices)
    Console(stderr=True).print(findings_table(imported))
    _write(imported.run_yaml, output)


@config_app.command("new")
def config_new(
    source: Annotated[str, typer.Argument(help="The base model: a hub id of the family, or a folder.")],
    rows: Annotated[str | None, typer.Option(help="What to train on: a file, a folder, or a hub id.")] = None,
    output: Output = None,
) -> None:
    """Make a first run file, with settings suited to this base and the reasons."""
    from phi3_dist.config.starter import FILL_IN_ROWS, first_run_file

    _write(first_run_file(source, rows or FILL_IN_ROWS), output)


def _write(run_yaml: str, output: Path | None) -> None:
    if output is None:
        typer.echo(run_yaml, nl=False)
    else:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.open("x", encoding="utf-8") as file:  # which follows no link to what is not there
                file.write(run_yaml)
        except FileExistsError as error:
            what = "is a link to what is not there" if not output.exists() else "exists"
            raise ConfigError(Problem(str(output), what, "give another name")) from error
        except OSError as error:
            raise ConfigError(Problem(str(output), f"cannot be written: {error.strerror}")) from error
        typer.echo(f"written: {output}; look at it with phi3-dist config show {shlex.quote(str(output))}")


@app.command()
def lint(source: Annotated[Path, typer.Argument(help="A script, notebook, JSON or YAML of another tool.")]) -> None:
    """Report the known faults of a recipe: Llama targets, "32000" as text, fp16 weights, naive packing, …"""
    from rich.console import Console

    from phi3_dist.recipes.lint import faults, faults_table

    found = faults(source)
    if not found:
        typer.echo(f"{source}: no known fault")
        return
    Console().print(faults_table(found))
    raise typer.Exit(ConfigError.exit_code)


@app.command()
def publish(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="New folder.", show_default=False)],
    base: Annotated[str, typer.Option(help="Hub id of the base, owner/name.", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="Revision of the base on the hub.")] = None,
) -> None:
    """Copy an adapter for others: the base by its hub id, no path of this machine."""
    from phi3_dist.adapters.publishing import publish as copy

    typer.echo(f"written: {copy(adapter, target, base, revision)}")


@app.command()
def convert(
    direction: Annotated[str, typer.Argument(help="loralib-to-peft or peft-to-loralib.", show_default=False)],
    source: Annotated[Path, typer.Argument(help="loralib file, or PEFT adapter folder.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="What to write.", show_default=False)],
    alpha: Annotated[
        list[str] | None, typer.Option(help="lora_alpha: 32, or module=8; loralib's own files don't hold it.")
    ] = None,
    enable_lora: Annotated[
        list[str] | None, typer.Option(help="Groups of a MergedLinear: module=true,false,true.")
    ] = None,
    kinds: Annotated[
        list[str] | None, typer.Option(help="Kind of a layer: module=linear, embedding or conv2d.")
    ] = None,
    r: Annotated[int | None, typer.Option(min=1, help="Rank of each group of a MergedLinear.")] = None,
    base_config: Annotated[Path | None, typer.Option(help="config.json of the base, or its folder.")] = None,
    base_name: Annotated[str | None, typer.Option(help="Base model that the adapter's config names.")] = None,
) -> None:
    """Convert an adapter between loralib and PEFT, exactly or not at all."""
    from phi3_dist.adapters.loralib.files import by_module, convert_file

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
