"""A run file while it is being written from foreign keys: its values, and what became of each key and why."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from phi3_dist.recipes.entries import Computed, Entry, Foreign

__all__ = ["Draft", "Finding", "Rule", "as_flag", "as_number", "flag", "number", "text"]

Verdict = Literal["taken", "changed", "not supported"]


@dataclass(frozen=True)
class Finding:
    """What became of one key of the source."""

    key: str
    verdict: Verdict
    value: Any
    """As the source has it."""
    reason: str
    """Why, where it is not simply taken."""
    target: str = ""
    """Dotted path in the run file, or nothing."""
    place: str = ""


@dataclass
class Draft:
    """Values by dotted path. The first key that sets a path has it; a later one that says otherwise is told so."""

    foreign: Foreign
    devices: int
    values: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, list[str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    set_by: dict[str, Entry] = field(default_factory=dict)
    batch: dict[str, tuple[Entry, int]] = field(default_factory=dict)
    """per_device, accumulation, global: settled together at the end."""

    def take(self, entry: Entry, path: str, value: Any, reason: str = "") -> None:
        """The source's value is the run file's. A `reason` here is a remark."""
        self._set(entry, path, value, "taken", reason)

    def change(self, entry: Entry, path: str, value: Any, reason: str) -> None:
        """The run file gets another value than the source, for this reason, which is written beside it."""
        self._set(entry, path, value, "changed", reason)

    def note(self, entry: Entry, verdict: Verdict, reason: str, target: str = "") -> None:
        """Nothing is written to the run file."""
        self.findings.append(Finding(entry.key, verdict, entry.value, reason, target, entry.place))

    def refuse(self, entry: Entry, reason: str) -> None:
        self.note(entry, "not supported", reason)

    def _set(self, entry: Entry, path: str, value: Any, verdict: Verdict, reason: str) -> None:
        if path in self.values and self.values[path] != value:
            first = self.set_by[path]
            self.refuse(
                entry, f"{path} is set by {first.key} at {first.place}; one value has to win, and the first does"
            )
            return
        self.values[path] = value
        self.set_by.setdefault(path, entry)
        if verdict == "changed":
            self.comments.setdefault(path, []).append(f"{entry.key}: {reason}")
        self.findings.append(Finding(entry.key, verdict, entry.value, reason, path, entry.place))


Rule = Callable[[Draft, Entry], None]


def as_number(value: Any) -> float | None:
    """A finite number, also one that YAML 1.1 reads as text (`1e-4`); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        out = float(value)
    except (ValueError, OverflowError):
        return None
    return out if math.isfinite(out) else None


def as_flag(value: Any) -> bool | None:
    """true or false, also where they stand as text."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower())
    return value if isinstance(value, bool) else None


def number(path: str, *, whole: bool = False, low: float | None = None) -> Rule:
    """A rule that takes a number: whole where the field counts, and `low` or more."""

    def rule(draft: Draft, entry: Entry) -> None:
        value = as_number(entry.value)
        if value is None or (whole and value != int(value)):
            draft.refuse(entry, f"{path} takes a {'whole ' if whole else ''}number")
        elif low is not None and value < low:
            draft.refuse(entry, f"{path} takes {low:g} or more")
        else:
            draft.take(entry, path, int(value) if whole or isinstance(entry.value, int) else value)

    return rule


def flag(path: str) -> Rule:
    """A rule that takes true or false."""

    def rule(draft: Draft, entry: Entry) -> None:
        value = as_flag(entry.value)
        if value is None:
            draft.refuse(entry, f"{path} takes true or false")
        else:
            draft.take(entry, path, value)

    return rule


def text(path: str) -> Rule:
    """A rule that takes text."""

    def rule(draft: Draft, entry: Entry) -> None:
        if isinstance(entry.value, str) and not isinstance(entry.value, Computed):
            draft.take(entry, path, entry.value)
        else:
            draft.refuse(entry, f"{path} takes text")

    return rule
