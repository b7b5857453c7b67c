"""How far a long preparation is: one line that changes on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

__all__ = ["EVERY_S", "progress_line"]

EVERY_S = 10.0
"""Seconds between two lines of a log, while the same thing is being done."""


@contextmanager
def progress_line(console: Console | None = None) -> Iterator[Callable[[str, int], None]]:
    """A function that reports what is being done and to how many rows. Writes to standard error."""
    out = console or Console(stderr=True, highlight=False)
    began = time.perf_counter()
    doing, printed, rows_then, since = "", began, 0, began

    def text(what: str, rows: int, now: float) -> str:
        rate = f", {(rows - rows_then) / (now - since):,.0f} rows/s" if rows > rows_then and now > since else ""
        return f"{what}{f': {rows:,} rows' if rows else ''}{rate}, {now - began:.0f} s"

    def plain(what: str, rows: int) -> None:
        nonlocal doing, printed, rows_then, since
        now = time.perf_counter()
        if what == doing and now - printed < EVERY_S:
            return
        if what != doing:
            rows_then, since = rows, now
        doing, printed = what, now
        out.print(text(what, rows, now), soft_wrap=True)

    if not out.is_terminal:
        yield plain
        return
    with out.status("preparing") as status:

        def live(what: str, rows: int) -> None:
            nonlocal doing, rows_then, since
            now = time.perf_counter()
            if what != doing:
                doing, rows_then, since = what, rows, now
            status.update(text(what, rows, now))

        yield live
