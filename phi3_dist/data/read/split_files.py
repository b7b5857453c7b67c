"""Which files of a folder are rows of one split.

A clone of a hub set says it in its README (`configs:`), others by the names of files and folders: `train.jsonl`,
`test/rows.csv`, the hub's `data/validation-00000-of-00001.parquet`. Splits are never mixed: one is read, and what is
left out is said. A folder in which no name says a split is read whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from phi3_dist.data.read.file_types import kind_of
from phi3_dist.data.read.printable import clipped
from phi3_dist.errors import DataError, Problem

__all__ = ["Inside", "files_of", "left_out"]

IN_FOLDERS = (".jsonl", ".csv", ".parquet")
"""Kinds that a folder's name stands for. Not .json: most of those in a folder describe it."""
_SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
_FRONT = re.compile(r"\s*---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", re.DOTALL)
_LONGEST_FRONT = 2**18


@dataclass(frozen=True)
class Inside:
    """The files that are read, in order; their split, if names say one; and how many files the others have."""

    files: tuple[Path, ...]
    split: str
    others: Mapping[str, int]


def files_of(folder: Path, name: str, split: str, subset: str | None, key: str) -> Inside:
    """The files of a split in a folder. Raises DataError where there are none."""
    fix = f"{key.replace('train', 'split').replace('validation', 'validation_split')}, or name the files"
    declared = _declared(folder)
    if declared:
        splits = _of_subset(declared, name, subset, key)
    elif subset is not None and (folder / subset).is_dir():
        return files_of(folder / subset, f"{name}/{subset}", split, None, key)
    else:
        splits = _named(folder)
    if not any(splits.values()):
        what = f"the folder {name} holds no {', '.join(IN_FOLDERS)} file and no saved data set"
        inside = [sub.name for sub in _folders(folder) if any(_named(sub).values())]
        more = "folders inside it are not searched, and .json files must be named: name them"
        found = clipped(f" ({', '.join(inside[:5])})") if inside else ""
        raise DataError(Problem(key, what, more + found))
    wanted = split if split in splits else _SPLIT_OF.get(split.lower(), split)
    if not set(splits) - {wanted, ""}:  # nothing that could be mixed
        files = [*splits.get(wanted, []), *splits.get("", [])]
        return Inside(tuple(sorted(files)), wanted if wanted in splits else "", {})
    chosen = wanted if wanted in splits else "" if wanted == "train" and "" in splits else None
    if chosen is None:
        known = clipped(", ".join(s for s in splits if s))
        raise DataError(Problem(key, f"the folder {name} has no split {split!r}; it has {known}", f"set {fix}"))
    others = {s: len(files) for s, files in splits.items() if s != chosen}
    return Inside(tuple(splits[chosen]), wanted, others)


def left_out(name: str, split: str, others: Mapping[str, int], what: str, offered: bool) -> str:
    """What a user should know about the splits of a folder that are not read; "" where there are none."""
    if not others:
        return ""
    told = ", ".join(f"{s or 'no split'} ({n} {what}{'s' * (n > 1)})" for s, n in others.items())
    notice = f"{name}: split {split} is read (data.split), left out: {told}"
    held = next((s for s in ("validation", "test", *others) if s in others and s), None)
    if offered and held:
        more = "" if held == "test" else f" with data.validation_split: {held}"
        notice += f"; data.validation: {name}{more} would hold out {held}"
    return clipped(notice)


def _named(folder: Path) -> dict[str, list[Path]]:
    """The files of each split as names say it, `""` for those that say none, in the order of the names."""
    splits: dict[str, list[Path]] = {}
    direct = _files(folder)
    for path in direct:
        splits.setdefault(_split_of(path), []).append(path)
    if direct:
        return splits
    for inside in _folders(folder):
        said = _SPLIT_OF.get(inside.name.lower())
        if said:
            splits.setdefault(said, []).extend(_files(inside))
        elif inside.name == "data":
            for name, files in _named(inside).items():
                splits.setdefault(name, []).extend(files)
    return {name: files for name, files in splits.items() if files}


def _files(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if kind_of(p) in IN_FOLDERS and p.is_file() and not p.name.startswith(".")
    )


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _split_of(path: Path) -> str:
    stem = re.sub(r"(\.jsonl?|\.csv|\.parquet)?(\.gz|\.zst)?$", "", path.name.lower())
    shard = _SHARD.fullmatch(stem)
    if shard:
        return _SPLIT_OF.get(shard[1], shard[1])
    said = {_SPLIT_OF[word] for word in re.split(r"[^a-z]+", stem) if word in _SPLIT_OF}
    return said.pop() if len(said) == 1 else ""


# --- the README of a hub set ------------------------------------------------------------------------------------------


def _declared(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """For each configuration of a hub set the files of its splits; {} where no README says so."""
    try:
        with (folder / "README.md").open(encoding="utf-8") as file:
            front = _FRONT.match(file.read(_LONGEST_FRONT))
        if front is None or any(isinstance(token, yaml.AliasToken) for token in yaml.scan(front[1])):
            return {}
        about: Any = yaml.safe_load(front[1])
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    configs = about.get("configs") if isinstance(about, dict) else None
    found: dict[str, dict[str, list[Path]]] = {}
    for config in configs if isinstance(configs, list) else ():
        if isinstance(config, dict) and config.get("data_files"):
            splits = {split: _matching(folder, patterns) for split, patterns in _patterns(config["data_files"])}
            if any(splits.values()):
                found[str(config.get("config_name", "default"))] = {s: files for s, files in splits.items() if files}
    return found


def _patterns(data_files: Any) -> Iterator[tuple[str, list[str]]]:
    """(split, patterns) of the forms that the hub knows."""
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    if isinstance(data_files, str) or (isinstance(data_files, list) and all(isinstance(f, str) for f in data_files)):
        data_files = [{"split": "train", "path": data_files}]
    for entry in data_files if isinstance(data_files, list) else ():
        if isinstance(entry, dict):
            paths = entry.get("path")
            yield str(entry.get("split", "train")), [str(p) for p in (paths if isinstance(paths, list) else [paths])]


def _matching(folder: Path, patterns: list[str]) -> list[Path]:
    root = folder.resolve()
    found: set[Path] = set()
    for pattern in patterns:
        if pattern.startswith("/") or ".." in Path(pattern).parts:
            continue
        try:
            found |= {p for p in folder.glob(pattern) if kind_of(p) and p.is_file() and _inside(p, root)}
        except (ValueError, NotImplementedError):
            continue
    return sorted(found)


def _inside(path: Path, root: Path) -> bool:
    """Whether a file lies in the clone, or is a link of the hub's cache (into `blobs` beside the snapshots)."""
    return path.parent.resolve().is_relative_to(root)


def _of_subset(
    declared: Mapping[str, dict[str, list[Path]]], name: str, subset: str | None, key: str
) -> dict[str, list[Path]]:
    if subset is None and (len(declared) == 1 or "default" in declared):
        return declared.get("default") or next(iter(declared.values()))
    if subset is not None and subset in declared:
        return declared[subset]
    what = clipped(f"the folder {name} has several configurations: {', '.join(declared)}")
    raise DataError(Problem(key, what, "choose one with data.subset"))
