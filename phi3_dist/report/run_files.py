"""The files of a run that pictures and pages are drawn from, and how those are written. No matplotlib, no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from phi3_dist.config.yaml_text import Document, YamlFault, read_yaml
from phi3_dist.errors import Problem, RunFolderError
from phi3_dist.report.plain_values import count, parse, printable, read_object

__all__ = ["Row", "of_kind", "read_config", "read_json", "read_metrics", "run_name", "written"]

Row = dict[str, Any]

SHOWN_AT_MOST, NAME_AT_MOST = 20, 200
DEEPEST = 30
"""Levels of a JSON file that a page shows."""
_RESTORE = "restore the file that the run wrote"


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """Where to write `path` until it is whole. Nothing stays of one that isn't. Raises RunFolderError (a full disk)."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        what = f"cannot be written: {error.strerror or error}"
        raise RunFolderError(Problem(str(path), what, "make room, or make the folder writable")) from error


def read_metrics(run_folder: Path) -> list[Row]:
    """Rows of `metrics.jsonl` in the order of the file, at least one.

    A last line without an end is what a killed run leaves behind: it is passed over.
    Raises RunFolderError when the folder or the file is missing, the file holds no row, or a line before the last
    is not a JSON object.
    """
    path = run_folder / "metrics.jsonl"
    if not path.is_file():
        what = "no metrics.jsonl in it" if run_folder.is_dir() else "no such folder"
        raise RunFolderError(Problem(str(run_folder), what, "name the folder of a run that has made a step"))
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise RunFolderError(Problem(str(path), f"cannot be read: {error.strerror}")) from error
    rows: list[Row] = []
    problems: list[Problem] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            problems.append(Problem(f"{path}:{number}", "not a JSON object", "remove the line"))
    if len(problems) > SHOWN_AT_MOST:
        problems[SHOWN_AT_MOST:] = [Problem(str(path), f"and {len(problems) - SHOWN_AT_MOST:,} more lines")]
    if problems:
        raise RunFolderError(*problems)
    if not rows:
        raise RunFolderError(Problem(str(path), "no row in it yet", "wait for the run's first step"))
    return rows


def of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    """Rows of one kind by step. A step that a resumed run made again counts once, as made last."""
    by_step = {row["step"]: row for row in rows if row.get("kind") == kind and count(row.get("step")) is not None}
    return [by_step[step] for step in sorted(by_step)]


def read_config(run_folder: Path) -> tuple[str, Document]:
    """The text of config.yaml and what it says, its lines as numbers; both empty where a run has none.

    Raises RunFolderError when it is not YAML.
    """
    path = run_folder / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return text, read_yaml(text, place=str)
    except YamlFault as error:
        where = f"{path}:{error.line}" if error.line else str(path)
        what = error.what if "YAML" in error.what else f"not YAML that a run writes: it {error.what}"
        raise RunFolderError(Problem(where, what[:1000], _RESTORE)) from error
    except (ValueError, OSError) as error:
        raise RunFolderError(Problem(str(path), f"not YAML: {error}"[:1000], _RESTORE)) from error


def run_name(run_folder: Path) -> str:
    """The run's name from its config.yaml, or the name of its folder where that says none.

    Raises RunFolderError when config.yaml is not YAML.
    """
    config = read_config(run_folder)[1].values
    name = config.get("name") if isinstance(config, dict) else None
    found = str(name) if isinstance(name, str | int) and name else run_folder.resolve().name
    return printable(found)[:NAME_AT_MOST]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no file. Raises RunFolderError for what is none."""
    content, wrong = read_object(path)
    if not wrong and _nests_deeper(content, DEEPEST):
        wrong = f"nests more than {DEEPEST} levels"
    if wrong:
        raise RunFolderError(Problem(str(path), wrong, _RESTORE))
    return content


def _nests_deeper(value: object, levels: int) -> bool:
    """Whether mappings and lists lie in one another more than so many levels deep; without recursion."""
    layer: list[object] = [value]
    for _ in range(levels + 1):
        layer = [inner for outer in layer for inner in _inside(outer)]
        if not layer:
            return False
    return True


def _inside(value: object) -> list[object]:
    found = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [inner for inner in found if isinstance(inner, dict | list)]
