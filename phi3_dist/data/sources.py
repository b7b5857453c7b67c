"""Rows of conversation out of local files, folders and the hub: checked one by one, each bad one named.

What a row looks like is `formats`' matter, what a file looks like `readers`'. Here: which files and sets a name stands
for, the split into training and held-out rows, and how often the rows of a source count.
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
from phi3_dist.data.formats import BadRow, Chat, Message, RowReader, unfit_columns
from phi3_dist.data.readers import KINDS, arrow_folder, kind_of, raw_rows
from phi3_dist.errors import DataError, Problem

__all__ = ["BadRow", "Chat", "HubSet", "Message", "locate", "problems_of", "prompt_share"]

SHOWN_AT_MOST = 20
_IN_FOLDERS = (".jsonl", ".csv", ".parquet")
"""Kinds that a folder's name stands for. Not .json: most of those in a folder describe it."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class HubSet:
    """One split of a hub data set."""

    name: str
    split: str
    revision: str | None

    def load(self) -> Any:
        """The `datasets.Dataset`, from the cache or the hub. Raises DataError with the fix."""
        import datasets  # a second to import; local files must not pay for it

        try:
            return datasets.load_dataset(self.name, split=self.split, revision=self.revision)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            first_line = str(error).strip().split("\n", 1)[0]
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


def located(cfg: DataConfig) -> tuple[Weighted, Weighted, dict[Source, str]]:
    """The sources of `train` with their weights, those of `validation`, and the name of each in places."""
    per_entry = locate_each(names_of(cfg.train), cfg.split, cfg.revision, "data.train")
    train = [(s, weight) for found, weight in zip(per_entry, _weights_of(cfg.train), strict=True) for s in found]
    held: Weighted = []
    if cfg.validation:
        held = [(s, 1.0) for s in locate(cfg.validation, cfg.validation_split, cfg.revision, "data.validation")]
    return train, held, _labels([s for s, _ in (*train, *held)])


def names_of(train: str | Sequence[str | DataSource]) -> tuple[str, ...]:
    """The names in `data.train`, in order."""
    entries = (train,) if isinstance(train, str) else train
    return tuple(entry.path if isinstance(entry, DataSource) else entry for entry in entries)


def _weights_of(train: str | Sequence[str | DataSource]) -> tuple[float, ...]:
    entries = (train,) if isinstance(train, str) else train
    return tuple(entry.weight if isinstance(entry, DataSource) else 1.0 for entry in entries)


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
    """The bad rows as problems: the first 20, then how many more, then the fix."""
    problems = [Problem(row.place, row.reason) for row in bad[:SHOWN_AT_MOST]]
    rest = len(bad) - len(problems)
    last = f"and {rest:,} more; {len(bad):,} bad rows" if rest else f"{len(bad):,} bad row{'s' * (len(bad) > 1)}"
    return [*problems, Problem("data", last, "correct them, or leave them out with data.on_bad_row: skip")]


def locate(names: str | Sequence[str], split: str, revision: str | None, key: str) -> list[Path | HubSet]:
    """The files and hub sets that the names of one config key stand for. Raises DataError naming all that are missing.

    A folder stands for the JSONL, CSV and Parquet files directly in it, in the order of their names, or, if it was
    made by `save_to_disk`, for the data set in it.
    """
    each = locate_each((names,) if isinstance(names, str) else names, split, revision, key)
    return [source for found in each for source in found]


def locate_each(names: Sequence[str], split: str, revision: str | None, key: str) -> list[list[Path | HubSet]]:
    """As `locate`, name by name."""
    found: list[list[Path | HubSet]] = []
    problems: list[Problem] = []
    for name in names:
        try:
            found.append(_sources_of(name, split, revision, key))
        except DataError as error:
            problems += error.problems
    if not found and not problems:
        problems.append(Problem(key, "names no source", "name a file, a folder or a hub id"))
    if problems:
        raise DataError(*problems)
    return found


def _sources_of(name: str, split: str, revision: str | None, key: str) -> list[Path | HubSet]:
    path = Path(name).expanduser()
    if path.is_dir():
        saved = arrow_folder(path, split)
        inside: list[Path | HubSet] = [saved] if saved else [*sorted(p for p in path.iterdir() if _in_folder(p))]
        if not inside:
            what = f"the folder {name} holds no {', '.join(_IN_FOLDERS)} file and no saved data set"
            fix = "folders inside it are not searched, and .json files must be named: name them"
            raise DataError(Problem(key, what, fix))
        return inside
    if path.is_file():
        if kind_of(path):
            return [path]
        what = f"{name} is no {', '.join(KINDS)} file (the first three may end in .gz or .zst too)"
        raise DataError(Problem(key, what, "write one JSON object on each line of a .jsonl file"))
    if _is_hub_id(name, path):
        return [HubSet(name, split, revision)]
    raise DataError(Problem(key, f"no such file or folder: {name}", _did_you_mean(path)))


def _in_folder(path: Path) -> bool:
    return path.is_file() and kind_of(path) in _IN_FOLDERS and not path.name.startswith(".")


def _is_hub_id(name: str, path: Path) -> bool:
    """owner/name, unless it looks like a slip in the name of something that is here."""
    if not _HUB_ID.fullmatch(name) or name.startswith(".") or kind_of(path):
        return False
    return not (path.parent.is_dir() and _did_you_mean(path))


def _did_you_mean(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=3)
    return "did you mean " + " or ".join(str(path.parent / name) for name in near) + "?" if near else ""


def _labels(sources: Iterable[Path | HubSet]) -> dict[Path | HubSet, str]:
    """The name of each source in places: a file's own name, or its path where two files share a name."""
    unique = list(dict.fromkeys(sources))
    names = Counter(s.name for s in unique if isinstance(s, Path))
    return {
        s: f"{s.name}[{s.split}]" if isinstance(s, HubSet) else s.name if names[s.name] == 1 else str(s) for s in unique
    }


def refuse_empty(rows: int, bad: Sequence[BadRow], labels: Sequence[str]) -> None:
    """Raises DataError where sources of these names have no good row."""
    if rows:
        return
    where = ", ".join(dict.fromkeys(labels))
    if bad:
        raise DataError(Problem(where, "holds no usable row"), *problems_of(bad)[:-1])
    raise DataError(Problem(where, "holds no rows"))


def source_rows(source: Path | HubSet, label: str, reader: RowReader) -> Iterator[tuple[str, Any]]:
    """(place, row) for each row; a row that can't even be parsed comes as a BadRow."""

    def wanted(columns: list[str]) -> list[str]:
        unfit = unfit_columns(columns, reader)
        if unfit:
            fix = "name the columns in data.columns, or turn each row into messages of role and content first"
            raise DataError(Problem(label, unfit, fix))
        meant = set(reader.columns.values())
        return [column for column in columns if column in meant]

    if isinstance(source, Path):
        yield from raw_rows(source, label, wanted)
        return
    dataset = source.load()
    for i, row in enumerate(dataset.select_columns(wanted(dataset.column_names))):
        yield f"{label} row {i}", row
