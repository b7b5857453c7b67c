"""Verbs that show runs: a page for one, a page for several, and a board of all of them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from phi3_dist.cli.app import app
from phi3_dist.errors import ConfigError, Problem


@app.command()
def report(
    run_folders: Annotated[
        list[Path], typer.Argument(metavar="RUN_FOLDER...", help="One run folder, or several to overlay.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", help="Page of several runs.", show_default="comparison.html")
    ] = None,
) -> None:
    """Write a run's page and curves, also while it runs; for several runs, one page with what differs as the legend."""
    from phi3_dist.report.page import write_comparison, write_page

    if len(run_folders) > 1:
        typer.echo(f"page: {write_comparison(run_folders, output or Path('comparison.html'))}")
        return
    if output is not None:
        what = "is for the page of several runs"
        raise ConfigError(Problem("--output", what, f"the page of one is {run_folders[0]}/report.html"))
    typer.echo(f"page: {write_page(run_folders[0])}")
    from phi3_dist.report.curves import draw_curves  # matplotlib: last, so that the page does without

    typer.echo(f"curves: {draw_curves(run_folders[0])}")


@app.command()
def board(
    folder: Annotated[Path, typer.Argument(help="Folder that holds run folders.")] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8765,
) -> None:
    """Serve the pages of all runs in a folder to a browser on this machine, refreshed while runs train."""
    from phi3_dist.report.board import serve_board

    with contextlib.suppress(KeyboardInterrupt):
        serve_board(folder, port, typer.echo)
