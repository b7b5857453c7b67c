"""The verb for what is kept between runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from phi3_dist.cli.app import app


@app.command()
def cache(
    prune: Annotated[bool, typer.Option("--prune", help="Remove what nobody has used for --older-than.")] = False,
    older_than: Annotated[
        str, typer.Option("--older-than", help="With --prune: an age, such as 12h, 30d or 2w; 0 for everything.")
    ] = "30d",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --prune: list what would be removed, and remove nothing.")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Another cache: a run file's data.cache.", show_default=False)
    ] = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            help="With --prune, a folder of runs: also remove the computed LoRA starts of finished ones, "
            "which can't be extended then.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show the token cache by data set: size, last use, what is in use. With --prune, remove what is old and unused."""
    from phi3_dist.data.cache import prune as stored
    from phi3_dist.errors import ConfigError, Problem
    from phi3_dist.machine.storage import cache_folder

    days = stored.days_of(older_than)
    if dry_run and not prune:
        raise ConfigError(Problem("--dry-run", "says what --prune would remove", "phi3-dist cache --prune --dry-run"))
    if folder is not None and not folder.is_dir():
        raise ConfigError(Problem(str(folder), "is not a folder", "name a cache, or leave --folder out"))
    where = cache_folder(None if folder is None else str(folder))
    if prune:
        removed, kept = stored.prune(where, runs, days, dry_run=dry_run)
        done = "would remove" if dry_run else "removed"
        typer.echo(f"{done} {_many(len(removed), 'entry', 'entries')}, {_mib(removed)} MiB")
        _list(removed)
        for entry in kept:
            why = "in use" if entry.in_use else "it is being prepared, or can't be removed"
            typer.echo(f"kept {entry.path}: {why}")
        return
    found = [*stored.cached(where), *(stored.computed_lora_inits(runs) if runs else ())]
    typer.echo(f"{where}: {_mib(found)} MiB in {_many(len(found), 'entry', 'entries')}")
    _list(found)
    typer.echo(f"{stored.other_bytes(where) / 2**20:>10,.1f} MiB  of hashes, measurements and locks")


def _list(entries: list[Any]) -> None:
    """A line for each data set, and below it one for each of its entries."""
    import time

    from phi3_dist.data.cache.prune import by_data_set

    now = time.time()
    for one in by_data_set(entries):
        typer.echo(f"{one.bytes / 2**20:>10,.1f} MiB  {_ago(now - one.used):>14}  {one.name}")
        for entry in sorted(one.entries, key=lambda entry: -entry.used):
            name = entry.path.name if entry.source else entry.path
            used = "in use" if entry.in_use else _ago(now - entry.used)
            typer.echo(f"{entry.bytes / 2**20:>14,.1f} MiB  {used:>14}  {entry.what.partition(' of ')[0]}  {name}")


def _mib(entries: list[Any]) -> str:
    return f"{sum(entry.bytes for entry in entries) / 2**20:,.1f}"


def _many(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


def _ago(seconds: float) -> str:
    if seconds < 3600:
        return "this hour"
    hours = seconds / 3600
    return f"{hours:.0f} h ago" if hours < 48 else f"{hours / 24:.0f} days ago"
