"""Text out of files as a terminal may have it: rows and names must not move a cursor or hide themselves."""

from __future__ import annotations

import re

__all__ = ["clipped", "printable"]

# C0 and C1 but tab and line end, marks that turn the direction of writing, line separators, halves of surrogates
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST = 600


def printable(text: str) -> str:
    """The text with every character that a terminal would obey written as an escape (`\\x1b`)."""
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def clipped(text: str) -> str:
    """One printable line, short enough for a message."""
    line = printable(text).replace("\n", "\\n").replace("\t", "\\t")
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
