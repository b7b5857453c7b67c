"""What is printed reaches every terminal and log, whatever encoding it has."""

from __future__ import annotations

import codecs
import io
import sys

__all__ = ["IN_ASCII", "print_in_any_encoding"]

IN_ASCII = "phi3_dist.ascii"
"""The error handler that writes what an encoding lacks in ASCII: × as x, é as \\xe9."""
_PLAIN = str.maketrans({
    **{"×": "x", "…": "...", "→": "->", "←": "<-", "–": "-", "—": "-", "−": "-", "·": "*", "•": "*"},
    **{"“": '"', "”": '"', "‘": "'", "’": "'", "≤": "<=", "≥": ">=", "±": "+-", "\u00a0": " "},
    **{"─": "-", "━": "-", "│": "|", "┃": "|"},
})  # fmt: skip


def print_in_any_encoding() -> None:
    """Make the standard streams write what their encoding lacks in ASCII (× as x, é as \\xe9) and raise nothing.

    A log on a cluster is often ASCII (LANG=C), and a name may hold bytes that are not text in any encoding.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=IN_ASCII)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    missing = error.object[error.start : error.end]
    return missing.translate(_PLAIN).encode("ascii", "backslashreplace").decode("ascii"), error.end


codecs.register_error(IN_ASCII, _in_ascii)
