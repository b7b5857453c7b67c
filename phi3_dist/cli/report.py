"""Verbs that show runs: a page for one, a page for several, and a board of all of them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from phi3_dist.cli.app import app


@app.command()
def report(
    run_folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_FOLDER...", help="A run's folder, a sweep's, or several runs to overlay."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Where to write the page of several runs.", show_default="comparison.html"),
    ] = None,
) -> None:
    """Write a run's page and curves, also while it runs; a sweep's page; or several runs' in one."""
    from phi3_dist.api import report_page
    from phi3_dist.report.sweep_file import is_sweep

    typer.echo(f"page: {report_page(run_folders, output)}")
    if len(run_folders) > 1 or is_sweep(run_folders[0]):
        return
    from phi3_dist.report.curves_png import draw_curves  # matplotlib: last, so that the page does without

    typer.echo(f"curves: {draw_curves(run_folders[0])}")


@app.command()
def board(
    folder: Annotated[Path, typer.Argument(help="Folder that holds run folders.")] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 8765,
) -> None:
    """Serve the pages of all runs in a folder to a browser on this machine, refreshed while runs train."""
    from phi3_dist.report.board import serve_board

    with contextlib.suppress(KeyboardInterrupt):
        serve_board(folder, port, typer.echo)
