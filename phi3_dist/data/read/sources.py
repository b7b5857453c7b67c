"""Rows of conversation out of local files, folders and the hub: checked one by one, each bad one named.

What a row looks like is `row_formats`' matter, what a file looks like `raw_rows`'. Here: which files and sets a name
stands for, the split into training and held-out rows, and how often the rows of a source count.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from phi3_dist.config.schema import DataConfig, DataSource
from phi3_dist.data.read.arrow_tables import hub_rows
from phi3_dist.data.read.file_types import KINDS, Form, kind_of
from phi3_dist.data.read.printable import clipped
from phi3_dist.data.read.raw_rows import arrow_folder, arrow_splits, raw_rows
from phi3_dist.data.read.row_formats import BadRow, Chat, RowReader, meant_columns, unfit_columns
from phi3_dist.data.read.split_files import files_of, left_out
from phi3_dist.errors import DataError, Problem, plain

__all__ = ["HubSet", "located", "problems_of", "prompt_share"]

SHOWN_AT_MOST = 20
GROUPED_FROM = 5
"""More bad rows than this of one reason are told in one line."""
_SEVERAL = re.compile(r"(?:available configs:|Available:) \[(.*?)\]", re.DOTALL)
"""In what `datasets` says where a set has several configurations, and the asked one is none of them."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class HubSet:
    """One split of a hub data set."""

    name: str
    split: str
    revision: str | None
    subset: str | None = None

    def load(self) -> Any:
        """The `datasets.Dataset`, from the cache or the hub. Raises DataError with the fix."""
        import datasets  # a second to import; local files must not pay for it

        try:
            return datasets.load_dataset(self.name, self.subset, split=self.split, revision=self.revision)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            several = _SEVERAL.search(str(error))
            if several:
                what = f"has several configurations: {several[1]}" + (f", and no {self.subset}" if self.subset else "")
                raise DataError(Problem(self.name, what, "choose one with data.subset")) from error
            first_line = plain(str(error).strip().split("\n", 1)[0])
            raise DataError(
                Problem(
                    self.name,
                    f"no such local file or folder, and the hub set can't be loaded: {first_line}",
                    "check the name, data.split and data.revision; for a gated set `hf auth login` or HF_TOKEN; "
                    "without a network, download it elsewhere and name the folder of its Parquet files",
                )
            ) from error


Source = Path | HubSet
Weighted = list[tuple[Source, float]]


@dataclass(frozen=True)
class _Entry:
    """One name in the run file, with what may be said of it alone."""

    path: str
    split: str
    subset: str | None
    weight: float = 1.0


@dataclass(frozen=True)
class Located:
    """Where the rows of a `data` section lie."""

    train: Weighted
    held_out: Weighted
    """Those of `data.validation`."""
    labels: dict[Source, str]
    """The name of each in places."""


def located(cfg: DataConfig) -> Located:
    """The sources of the `data` section, all of which exist.

    Raises DataError naming all names that stand for no source.
    """
    problems: list[Problem] = []
    sides = []
    for key in ("data.train", "data.validation"):
        found: Weighted = []
        for entry in _entries(cfg, key):
            try:
                found += [(source, entry.weight) for source in _sources_of(entry, cfg, key)[0]]
            except DataError as error:
                problems += error.problems
        if not found and not problems and (key == "data.train" or cfg.validation):
            problems.append(Problem(key, "names no source", "name a file, a folder or a hub id"))
        sides.append(found)
    if problems:
        raise DataError(*problems)
    train, held = sides
    return Located(train, held, _labels([s for s, _ in (*train, *held)]))


def split_notices(cfg: DataConfig) -> list[str]:
    """What folders hold beside the split that is trained on: it is not read, and may be held out."""
    notices = [_sources_of(entry, cfg, "data.train")[1] for entry in _entries(cfg, "data.train")]
    return [notice for notice in notices if notice]


def _entries(cfg: DataConfig, key: str) -> list[_Entry]:
    if key == "data.validation":
        names = (cfg.validation,) if isinstance(cfg.validation, str) else cfg.validation or ()
        return [_Entry(name, cfg.validation_split, cfg.subset) for name in names]
    train = (cfg.train,) if isinstance(cfg.train, str) else cfg.train
    return [
        _Entry(e.path, e.split or cfg.split, e.subset or cfg.subset, e.weight)
        if isinstance(e, DataSource)
        else _Entry(e, cfg.split, cfg.subset)
        for e in train
    ]


def times(chat: Chat, weight: float) -> int:
    """How often a row counts: the whole part of the weight, and once more for the rows whose hash is below the rest."""
    if weight == 1:
        return 1
    return int(weight) + (_hash_share(["weight", *((m.role, m.content) for m in chat.messages)]) < weight % 1)


def refuse_nothing_left(rows: int, held: int, weighted: int) -> None:
    """Raises DataError where no training row is left after the split, or after the weights."""
    if not rows:
        raise DataError(
            Problem(
                "data.validation_share",
                f"all {held} rows fall on the held-out side, none is left to train on",
                "lower data.validation_share, or name held-out rows in data.validation",
            )
        )
    if not weighted:
        raise DataError(Problem("data.train", f"no row is left of {rows:,} with these weights", "raise a weight"))


def format_notices(cfg: DataConfig, formats: dict[str, str]) -> list[str]:
    """Rows in the project's own format need no word; what was detected otherwise does."""
    if cfg.format != "auto":
        return []
    found: dict[str, list[str]] = {}
    for label, format in formats.items():
        found.setdefault(format, []).append(label)
    return [
        f"{', '.join(labels)}: rows are read as {format} (data.format: auto)"
        for format, labels in found.items()
        if format != "messages"
    ]


def prompt_share(chat: Chat) -> float:
    """A number in [0, 1) that depends on the prompt alone (all before the first assistant turn), by sha256.

    Rows with equal prompts so always land on the same side, whatever the order of rows, machine or version.
    """
    prompt: list[tuple[str, str]] = []
    for message in chat.messages:
        if message.role == "assistant":
            break
        prompt.append((message.role, message.content))
    return _hash_share(prompt)


def _hash_share(value: Sequence[Any]) -> float:
    """A number in [0, 1) out of a value, the same on every machine."""
    digest = hashlib.sha256(json.dumps(value, ensure_ascii=True).encode("ascii")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def problems_of(bad: Sequence[BadRow]) -> list[Problem]:
    """The bad rows as problems: the first 20, rows with one reason as one of them; how many more; the fix."""
    by_reason: dict[str, list[str]] = {}
    for row in bad:
        by_reason.setdefault(row.reason, []).append(row.place)
    grouped = {reason for reason, places in by_reason.items() if len(places) > GROUPED_FROM}
    problems: list[Problem] = []
    named: set[str] = set()
    shown = 0
    for row in bad:
        if row.reason in named or len(problems) == SHOWN_AT_MOST:
            continue
        if row.reason in grouped:
            places = by_reason[row.reason]
            named.add(row.reason)
            shown += len(places)
            problems.append(Problem(f"{', '.join(places[:3])} and {len(places) - 3:,} more", row.reason))
        else:
            shown += 1
            problems.append(Problem(row.place, row.reason))
    rest = len(bad) - shown
    last = f"and {rest:,} more; {len(bad):,} bad rows" if rest else f"{len(bad):,} bad row{'s' * (len(bad) > 1)}"
    return [*problems, Problem("data", last, "correct them, or leave them out with data.on_bad_row: skip")]


def _sources_of(entry: _Entry, cfg: DataConfig, key: str) -> tuple[list[Path | HubSet], str]:
    """The sources that a name stands for, and what was left out. Raises DataError where it stands for none."""
    name = entry.path
    offered = key == "data.train" and not cfg.validation
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            saved = arrow_folder(path, entry.split)
            if saved:
                others = [s for s in arrow_splits(path) if s != saved.name] if saved != path else []
                return [saved], left_out(name, entry.split, dict.fromkeys(others, 1), "table", offered)
            inside = files_of(path, name, entry.split, entry.subset, key)
            return [*inside.files], left_out(name, inside.split, inside.others, "file", offered)
        if path.is_file():
            if kind_of(path):
                return [path], ""
            what = f"{name} is no {', '.join(KINDS)} file (the first three may end in .gz or .zst too)"
            raise DataError(Problem(key, what, "write one JSON object on each line of a .jsonl file"))
        if _is_hub_id(name, path):
            return [HubSet(name, entry.split, cfg.revision, entry.subset)], ""
        raise DataError(Problem(key, f"no such file or folder: {clipped(name)}", _did_you_mean(path)))
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, no home for `~`, no right to look
        reason = getattr(error, "strerror", None) or error
        raise DataError(Problem(key, f"{clipped(name)} can't be looked at: {reason}", "correct the name")) from error


def _is_hub_id(name: str, path: Path) -> bool:
    """owner/name, unless it looks like a slip in the name of something that is here."""
    if not _HUB_ID.fullmatch(name) or name.startswith(".") or kind_of(path):
        return False
    return not (path.parent.is_dir() and _did_you_mean(path))


def _did_you_mean(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=3)
    return "did you mean " + clipped(" or ".join(str(path.parent / name) for name in near)) + "?" if near else ""


def _labels(sources: Iterable[Path | HubSet]) -> dict[Path | HubSet, str]:
    """The name of each source in places: a file's own name, or its path where two files share a name."""
    unique = list(dict.fromkeys(sources))
    names = Counter(s.name for s in unique if isinstance(s, Path))
    return {
        s: f"{s.name}{f'/{s.subset}' if s.subset else ''}[{s.split}]"
        if isinstance(s, HubSet)
        else plain(s.name if names[s.name] == 1 else str(s))
        for s in unique
    }


def refuse_empty(rows: int, bad: Sequence[BadRow], labels: Sequence[str]) -> None:
    """Raises DataError where sources of these names have no good row."""
    if rows:
        return
    where = ", ".join(dict.fromkeys(labels))
    if bad:
        raise DataError(Problem(where, "holds no usable row"), *problems_of(bad)[:-1])
    raise DataError(Problem(where, "holds no rows"))


def source_rows(
    source: Path | HubSet, label: str, reader: RowReader, form: Form | None = None
) -> tuple[Iterator[tuple[str, Any]], list[str]]:
    """(place, row) for each row; a row that can't even be parsed comes as a BadRow. Also the columns of a table that
    are not read, once the first row has come.
    """
    unread: list[str] = []

    def wanted(columns: list[str]) -> list[str]:
        unfit = unfit_columns(columns, reader)
        if unfit:
            fix = "name the columns in data.columns, or turn each row into messages of role and content first"
            raise DataError(Problem(label, unfit, fix))
        meant = meant_columns(columns, reader)
        unread[:] = [column for column in columns if column not in meant]
        return meant

    if isinstance(source, Path):
        return raw_rows(source, label, wanted, form), unread
    return hub_rows(source.load(), label, wanted), unread
