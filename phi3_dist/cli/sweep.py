"""The verb that trains many adapters of one base together."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from phi3_dist.cli.app import Overrides, RunFile, app
from phi3_dist.errors import ConfigError, Problem


@app.command()
def sweep(
    run_file: RunFile,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the candidates' run folders.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the sweep; candidates added to the file start.")
    ] = False,
    revive: Annotated[
        list[str] | None, typer.Option(help="A candidate that ended early, to continue; may be repeated.")
    ] = None,
) -> None:
    """Train every candidate of a sweep file in one pass over the base, and rank them.

    A sweep file is a run file with a section `sweep`. It starts as `train` does, also under `accelerate launch`.
    """
    from phi3_dist.sweep.file import load_sweep

    asked = load_sweep(run_file, overrides or ())
    if overwrite and resume:
        raise ConfigError(Problem("--overwrite --resume", "cannot be combined", "give one of them"))
    if revive and not resume:
        raise ConfigError(Problem("--revive", "continues a sweep that has run", "add --resume"))
    from phi3_dist.machine.probe import launch_facts, probe
    from phi3_dist.sweep.loop import run_sweep
    from phi3_dist.training.signals import finishing

    result = run_sweep(
        asked, probe(), launch_facts(os.environ), overwrite=overwrite, resume=resume, revive=revive or ()
    )
    finishing()
    if os.environ.get("RANK", "0") == "0":
        if result.best:
            typer.echo(f"best: {result.best}, its adapter in {result.folder / 'best'}")
        folders = [result.folder / name for name in result.states if (result.folder / name / "metrics.jsonl").is_file()]
        if folders:
            from phi3_dist.report.sweeps import write_sweep_page

            typer.echo(f"page: {write_sweep_page(result.folder)}")
    if result.exit_code:
        raise typer.Exit(result.exit_code)
