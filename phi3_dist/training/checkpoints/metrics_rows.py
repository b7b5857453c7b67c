"""metrics.jsonl of a run that goes on: which rows go, and whether a held-out loss stands in it already."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from phi3_dist.config.json_text import parse_json
from phi3_dist.errors import Problem, RunFolderError
from phi3_dist.training.context import RunContext

__all__ = ["cut_metrics", "measured", "rows_of_kind"]


def _stays(row: Any, step: int, measured_again: bool) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return False
    return row["step"] < step or (row["step"] == step and not (measured_again and row.get("kind") == "eval"))


def cut_metrics(path: Path, step: int, *, measured_again: bool = False) -> None:
    """Remove the rows of steps after `step`, which will be made again, and lines that are torn or damaged.

    measured_again: the held-out loss after `step` will be taken anew.
    """
    if not path.exists():
        return
    kept = []
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RunFolderError(Problem(str(path), f"cannot be read: {error.strerror}")) from error
    for line in raw.decode("utf-8", "replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _stays(row, step, measured_again):
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    try:
        if raw.startswith(whole := "".join(kept).encode("utf-8", "replace")):
            os.truncate(path, len(whole))  # needs no room
            return
        temporary.write_bytes(whole)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        what = f"cannot be written, and rows of steps that are made again must go: {error.strerror}"
        raise RunFolderError(Problem(str(path), what, "make room, or make it writable")) from error


def rows_of_kind(path: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of one kind in metrics.jsonl; torn lines are left out, and a file that cannot be read has none."""
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        if f'"kind": "{kind}"' in line:
            with contextlib.suppress(ValueError):
                found.append(parse_json(line))
    return [row for row in found if isinstance(row, dict) and row.get("kind") == kind]


def measured(ctx: RunContext, step: int) -> bool:
    """Whether metrics.jsonl holds the held-out loss after `step`, as rank 0 sees it. Collective."""
    found = False
    if ctx.runtime.is_main:
        found = any(row.get("step") == step for row in rows_of_kind(ctx.folder.metrics, "eval"))
    return bool(ctx.runtime.broadcast("yes" if found else ""))
