"""What the token cache holds, and taking out of it what nobody uses any more.

Only names that this toolkit gives are ever removed, and no entry that somebody prepares (its lock file) or has mapped
(`in_use.py`). Where locks are not shown, as between the nodes of some file systems, an entry's age alone keeps it.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from phi3_dist.data.cache.array_folders import read_whole
from phi3_dist.data.cache.in_use import is_in_use, kept_from_others
from phi3_dist.errors import ConfigError, DataError, Problem

__all__ = ["DataSet", "Entry", "by_data_set", "cached", "computed_lora_inits", "days_of", "other_bytes", "prune"]

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
    source: str = ""
    """The names of the rows' files, folders or hub sets; empty where the entry does not say."""
    in_use: bool = False
    """Whether a run on this machine, or one whose locks are seen here, has it mapped."""

    def days(self, now: float) -> float:
        """Days since it was used."""
        return max(now - self.used, 0.0) / _DAY_S


@dataclass(frozen=True)
class DataSet:
    """The entries that were made of the same rows' files: one for each tokenizer and each set of settings."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)

    @property
    def used(self) -> float:
        """When the last of them was used: seconds since 1970."""
        return max(entry.used for entry in self.entries)


def by_data_set(entries: Iterable[Entry]) -> list[DataSet]:
    """The entries by what they were made of, the largest data set first."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.source or entry.what, []).append(entry)
    sets = (DataSet(name, tuple(members)) for name, members in found.items())
    return sorted(sets, key=lambda one: (-one.bytes, one.name))


def days_of(text: str) -> float:
    """Days of an age such as 30d, 12h, 2w or 1d12h; a plain number is days. Raises ConfigError."""
    match = re.fullmatch(r"(?:(\d+)w)?(?:(\d+)d)?(?:(\d+)h)?", text.strip())
    if match and match[0]:
        weeks, days, hours = (int(part or 0) for part in match.groups())
        return weeks * 7 + days + hours / 24
    if re.fullmatch(r"\d+(\.\d+)?", text.strip()):
        return float(text)
    raise ConfigError(Problem("--older-than", f"{text!r} is not an age", "30d, 12h, 2w, or 0 for everything"))


def other_bytes(cache_dir: Path) -> int:
    """Bytes of what lies there beside the entries: hashes of sources and weights, measurements, lock files."""
    if not cache_dir.is_dir():
        return 0
    others = (path for path in cache_dir.iterdir() if not (_KEY.fullmatch(path.name) and path.is_dir()))
    return sum(_size_and_time(path)[0] for path in others if not path.is_symlink())


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
    size, used = _size_and_time(folder)
    what, source = _what(folder)
    return Entry(folder, size, used, what, source, is_in_use(folder))


def _size_and_time(folder: Path) -> tuple[int, float]:
    size, used = 0, 0.0
    for path in _below(folder):
        try:
            stat = path.lstat()
        except OSError:  # somebody works in here
            continue
        size += stat.st_size
        used = max(used, stat.st_mtime)
    return size, used


def _below(folder: Path) -> Iterator[Path]:
    yield folder
    yield from folder.rglob("*")


def _what(folder: Path) -> tuple[str, str]:
    if not (folder / "facts.json").exists():
        return "unfinished", ""
    try:
        about = read_whole(folder / "facts.json")["about"]
        source = ", ".join(map(str, about["sources"]))
        return f"{int(about['rows']):,} rows of {source}", source
    except (DataError, KeyError, TypeError, ValueError):
        return "rows", ""


def prune(cache_dir: Path, runs: Path | None, days: float, *, dry_run: bool = False) -> tuple[list[Entry], list[Entry]]:
    """Remove what was not used for so many days: entries, notes of hashes and, with `runs`, computed starts.

    Returns what was removed, and what would have been if nobody held it or it could be removed. With `dry_run` the
    same is found, and nothing removed.
    """
    now = time.time()
    removed: list[Entry] = []
    held: list[Entry] = []
    for entry in cached(cache_dir):
        if entry.days(now) < days:
            continue
        lock = FileLock(cache_dir / f"{entry.path.name}.lock")
        try:
            with lock.acquire(timeout=0), kept_from_others(entry.path):
                if _size_and_time(entry.path)[1] != entry.used:
                    raise Timeout(lock.lock_file)  # used since it was listed
                if not dry_run:
                    shutil.rmtree(entry.path)
            removed.append(entry)
        except (Timeout, OSError):
            held.append(entry)
    for start in computed_lora_inits(runs) if runs else ():
        if start.days(now) >= days:
            if not dry_run:
                start.path.unlink(missing_ok=True)
            removed.append(start)
    for note in () if dry_run else (cache_dir / "source-hashes").glob("*.json"):
        if _KEY.fullmatch(note.stem) and now - note.lstat().st_mtime >= days * _DAY_S:
            note.unlink(missing_ok=True)
    return removed, held
