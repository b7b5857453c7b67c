"""What the token cache holds, and taking out of it what nobody uses any more.

Only names that this toolkit gives are ever removed, and no entry whose lock somebody holds. A run that has mapped an
entry keeps what it mapped, on a local disk; over a network it might not, so that young entries stay.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from phi3_dist.data.cache.array_folders import read_whole
from phi3_dist.errors import DataError

__all__ = ["Entry", "cached", "computed_lora_inits", "prune"]

_KEY = re.compile(r"[0-9a-f]{32}")
_START = "start.safetensors"
_DAY_S = 86400.0


@dataclass(frozen=True)
class Entry:
    """One thing that is kept: an entry of the token cache, or the computed start of a finished run."""

    path: Path
    bytes: int
    used: float
    """When it was last used (or written, where that is not known): seconds since 1970."""
    what: str
    """What it was made of, for a person."""

    def days(self, now: float) -> float:
        """Days since it was used."""
        return max(now - self.used, 0.0) / _DAY_S


def cached(cache_dir: Path) -> list[Entry]:
    """The entries of the token cache, the one that was used last at the end."""
    if not cache_dir.is_dir():
        return []
    folders = [path for path in cache_dir.iterdir() if _KEY.fullmatch(path.name) and path.is_dir()]
    return sorted((_entry(path) for path in folders if not path.is_symlink()), key=lambda entry: entry.used)


def computed_lora_inits(runs: Path) -> list[Entry]:
    """The computed starts (PiSSA, LoftQ, EVA) of finished runs below a folder."""
    found = []
    for path in sorted(runs.glob(f"*/{_START}")):
        try:
            ended = json.loads((path.parent / "exit.json").read_text(encoding="utf-8"))
            finished = isinstance(ended, dict) and ended.get("state") == "finished"
        except (OSError, ValueError, RecursionError):
            continue
        if finished and not path.is_symlink() and not path.parent.is_symlink():
            stat = path.stat()
            found.append(Entry(path, stat.st_size, stat.st_mtime, "computed start of a finished run"))
    return sorted(found, key=lambda entry: entry.used)


def _entry(folder: Path) -> Entry:
    size, used = 0, 0.0
    for path in _below(folder):
        try:
            stat = path.lstat()
        except OSError:  # somebody works in here
            continue
        size += stat.st_size
        used = max(used, stat.st_mtime)
    return Entry(folder, size, used, _what(folder))


def _below(folder: Path) -> Iterator[Path]:
    yield folder
    yield from folder.rglob("*")


def _what(folder: Path) -> str:
    if not (folder / "facts.json").exists():
        return "unfinished"
    try:
        about = read_whole(folder / "facts.json")["about"]
        return f"{int(about['rows']):,} rows of {', '.join(map(str, about['sources']))}"
    except (DataError, KeyError, TypeError, ValueError):
        return "rows"


def prune(cache_dir: Path, runs: Path | None, days: float) -> tuple[list[Entry], list[Entry]]:
    """Remove what was not used for so many days: entries, notes of hashes and, with `runs`, computed starts.

    Returns what was removed, and what would have been if nobody held it or it could be removed.
    """
    now = time.time()
    removed: list[Entry] = []
    held: list[Entry] = []
    for entry in cached(cache_dir):
        if entry.days(now) < days:
            continue
        lock = FileLock(cache_dir / f"{entry.path.name}.lock")
        try:
            with lock.acquire(timeout=0):
                if _entry(entry.path).used != entry.used:
                    raise Timeout(lock.lock_file)  # used since it was listed
                shutil.rmtree(entry.path)
            removed.append(entry)
        except (Timeout, OSError):
            held.append(entry)
    for start in computed_lora_inits(runs) if runs else ():
        if start.days(now) >= days:
            start.path.unlink(missing_ok=True)
            removed.append(start)
    for note in (cache_dir / "source-hashes").glob("*.json"):
        if _KEY.fullmatch(note.stem) and now - note.lstat().st_mtime >= days * _DAY_S:
            note.unlink(missing_ok=True)
    return removed, held
