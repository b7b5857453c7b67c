"""Where the time from the command to the first step went."""

from __future__ import annotations

import time

import psutil

__all__ = ["StartClock"]


class StartClock:
    """Named spans, in seconds, from the start of this process on; `mark` closes one."""

    def __init__(self) -> None:
        self.spans_s: dict[str, float] = {}
        self._last = psutil.Process().create_time()

    def mark(self, name: str) -> None:
        """What went by since the last mark was `name`. Only the first mark of a name counts."""
        now = time.time()
        self.spans_s.setdefault(name, max(now - self._last, 0.0))
        self._last = now

    @property
    def total_s(self) -> float:
        return sum(self.spans_s.values())

    def line(self) -> str:
        """The spans in one line, for the person who waited."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.spans_s.items())
        return f"start: first step done {self.total_s:.1f} s after the process began ({parts})"
