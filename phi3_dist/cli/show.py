"""Verbs that show something and change nothing: run files, rows, this machine, the support matrix."""

from __future__ import annotations

from typing import Annotated

import typer

from phi3_dist.cli.app import Overrides, RunFile, app, config_app, data_app
from phi3_dist.errors import MachineError


@config_app.command("show")
def config_show(run_file: RunFile, overrides: Overrides = None) -> None:
    """Print the resolved run, with every default filled in; of a sweep file also every candidate."""
    from phi3_dist.config.load import resolved_yaml
    from phi3_dist.sweep.file import load_sweep_or_run, resolved_section

    cfg, sweep = load_sweep_or_run(run_file, overrides or ())
    typer.echo(resolved_yaml(cfg) + (resolved_section(sweep) if sweep else ""), nl=False)


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

    words = {"None": "null", "True": "true", "False": "false"}  # as a run file has them
    for path, *values in diff(load_run(first), load_run(second)):
        typer.echo(f"{path}: {' -> '.join(words.get(str(value), str(value)) for value in values)}")


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

    tokenizer = load_tokenizer(cfg.model.tokenizer or cfg.model.source, cfg.model.revision, cfg.model.new_tokens)
    Console(soft_wrap=True, highlight=False).print(show(cfg.data, tokenizer, rows))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    bandwidth: Annotated[
        bool, typer.Option("--bandwidth", help="Measure matrix, memory and network rates, and keep them for plan.")
    ] = False,
) -> None:
    """Check this machine, and say what to fix. Exits with 0 only if training could start.

    On every rank of a launch it names the node that differs.
    """
    import sys

    from phi3_dist.machine import findings
    from phi3_dist.machine.doctor_on_ranks import examine

    done = examine(bandwidth=bandwidth)
    if done.speaks:
        found = done.findings
        typer.echo(findings.as_json(found) if as_json else findings.as_table(found, colour=sys.stdout.isatty()))
    if findings.exit_code(done.findings):
        raise typer.Exit(MachineError.exit_code)


@app.command()
def support() -> None:
    """Print which strategy goes with which quantisation, device and precision, as Markdown."""
    from phi3_dist.planning.support import matrix_markdown

    typer.echo(matrix_markdown(), nl=False)
