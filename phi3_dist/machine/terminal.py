"""What is printed reaches every terminal and log: whatever encoding it has, and without moving its cursor."""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata

__all__ = ["printable", "print_in_any_encoding"]

_ERRORS = "phi3_dist.plain"
_PLAIN = str.maketrans({
    **{"×": "x", "…": "...", "→": "->", "←": "<-", "–": "-", "—": "-", "−": "-", "·": "*", "•": "*"},
    **{"“": '"', "”": '"', "‘": "'", "’": "'", "≤": "<=", "≥": ">=", "±": "+-", "\u00a0": " "},
    **{"─": "-", "━": "-", "│": "|", "┃": "|"},
})  # fmt: skip


def print_in_any_encoding() -> None:
    """Make the standard streams write what their encoding lacks in ASCII (× as x, é as \\xe9) and raise nothing.

    A log on a cluster is often ASCII (LANG=C), and a name may hold bytes that are no text in any encoding.
    """
    codecs.register_error(_ERRORS, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    missing = error.object[error.start : error.end]
    return missing.translate(_PLAIN).encode("ascii", "backslashreplace").decode("ascii"), error.end


def printable(text: str) -> str:
    """The text with control characters, but for line ends, written as escapes: a terminal obeys some of them."""
    return "".join(
        letter if letter == "\n" or unicodedata.category(letter) != "Cc" else ascii(letter)[1:-1] for letter in text
    )
