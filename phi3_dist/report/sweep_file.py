"""sweep.json, and a sweep's candidates under one line in `phi3-dist runs`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_dist.report.plain_values import finite, printable, read_object

__all__ = ["SWEEP_FILE", "SweepLine", "is_sweep", "read_sweep", "sweep_line"]

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class SweepLine:
    """A sweep at a glance. `places`: each candidate's folder name and its place in the ranking, from 1."""

    name: str
    summary: str
    places: Mapping[str, int]


def is_sweep(folder: Path) -> bool:
    """Whether a sweep has written into this folder."""
    return (folder / SWEEP_FILE).is_file()


def read_sweep(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """sweep.json and its candidates, in the order of the ranking; empty where it can't be read."""
    sweep, _ = read_object(folder / SWEEP_FILE)
    listed = sweep.get("candidates")
    candidates = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    return sweep, [one for one in candidates if isinstance(one.get("folder"), str)]


def sweep_line(folder: Path) -> SweepLine | None:
    """What `phi3-dist runs` says above a sweep's candidates; None for a folder of something else."""
    sweep, candidates = read_sweep(folder)
    if not candidates:
        return None
    states = [printable(one.get("state") or "") for one in candidates]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    best, loss = candidates[0], finite(candidates[0].get("heldout_loss"))
    first = f"; first is {printable(best.get('name'))}" + (f", held-out loss {loss:.4f}" if loss is not None else "")
    places = {one["folder"]: place for place, one in enumerate(candidates, start=1)}
    return SweepLine(
        printable(sweep.get("name") or folder.name), f"{len(candidates)} candidates, {counted}{first}", places
    )
