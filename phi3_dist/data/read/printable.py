"""Text out of rows and files as one line of a message."""

from __future__ import annotations

from phi3_dist.errors import plain

__all__ = ["clipped"]

_LONGEST = 600


def clipped(text: str) -> str:
    """One line that a terminal may have, short enough for a message."""
    line = plain(text).replace("\n", "\\n").replace("\t", "\\t")
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
