"""Verbs for what is kept between runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phi3_dist.cli.app import app

cache_app = typer.Typer(help="List and prune what is kept between runs.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(cache_app, name="cache")

Runs = Annotated[
    Path | None, typer.Option("--runs", help="A folder of run folders: their computed starts, too.", show_default=False)
]


@cache_app.command("list")
def cache_list(runs: Runs = None) -> None:
    """List the token cache: size, days since it was used, and what it was made of."""
    import time

    from phi3_dist.data.cache.prune import cached, computed_lora_inits
    from phi3_dist.machine.storage import cache_folder

    now = time.time()
    found = [*cached(cache_folder()), *(computed_lora_inits(runs) if runs else ())]
    typer.echo(f"{cache_folder()}: {sum(entry.bytes for entry in found) / 2**20:,.1f} MiB in {len(found)} entries")
    for entry in found:
        where = entry.path if runs and entry.path.suffix else entry.path.name
        typer.echo(f"{entry.bytes / 2**20:>10,.1f} MiB  {entry.days(now):>6.1f} days  {where}  {entry.what}")


@cache_app.command("prune")
def cache_prune(
    days: Annotated[float, typer.Option(min=0, help="Remove what was not used for N days. 0: everything.")] = 30.0,
    runs: Runs = None,
) -> None:
    """Remove what was not used for a month. With --runs also computed starts: those runs can then not be extended."""
    from phi3_dist.data.cache.prune import prune
    from phi3_dist.machine.storage import cache_folder

    removed, held = prune(cache_folder(), runs, days)
    typer.echo(f"removed {len(removed)} entries, {sum(entry.bytes for entry in removed) / 2**20:,.1f} MiB")
    for entry in held:
        typer.echo(f"kept {entry.path}: it is in use, or can't be removed")
