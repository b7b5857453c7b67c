"""metrics.jsonl of a run that goes on: which rows go, and whether a held-out loss stands in it already."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from phi3_dist.errors import Problem, RunFolderError
from phi3_dist.training.context import RunContext

__all__ = ["cut_metrics", "measured"]


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


def measured(ctx: RunContext, step: int) -> bool:
    """Whether metrics.jsonl holds the held-out loss after `step`, as rank 0 sees it. Collective."""
    found = False
    if ctx.runtime.is_main:
        with contextlib.suppress(OSError):
            lines = ctx.folder.metrics.read_text("utf-8", errors="replace").splitlines()
            rows = (json.loads(line) for line in lines if '"kind": "eval"' in line)  # torn lines are cut by now
            found = any(row.get("step") == step for row in rows)
    return bool(ctx.runtime.broadcast("yes" if found else ""))
