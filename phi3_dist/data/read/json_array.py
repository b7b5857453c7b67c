"""JSON values of a file one after the other, in an array or end to end: a file of rows need not fit in memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from typing import Any

from phi3_dist.data.read.file_types import LONGEST_ROW
from phi3_dist.errors import DataError, Problem

__all__ = ["array_elements", "objects"]

_BOM = "\ufeff"
_BLANK = f" \t\n\r{_BOM}"
"""Between values; a mark stands where files were laid end to end."""


def array_elements(pieces: Iterable[bytes], label: str) -> Iterator[Any]:
    """What stands in the array that the pieces spell, in memory for a piece and the largest element.

    Raises DataError, naming `label`, where they are no UTF-8 or no JSON array; elements before that have come then.
    """
    text = _Text(pieces, label)
    text.take("[")
    if text.next_char() != "]":
        yield text.value()
        while text.next_char() == ",":
            text.take(",")
            yield text.value()
    text.take("]")
    if text.next_char():
        raise text.error("Extra data")


def objects(pieces: Iterable[bytes], label: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of each JSON value that the pieces spell end to end. Raises DataError as `array_elements` does."""
    text = _Text(pieces, label)
    while text.next_char():
        yield text.line(), text.value()


class _Text:
    def __init__(self, pieces: Iterable[bytes], label: str) -> None:
        self._pieces, self._label = iter(pieces), label
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._bytes = 0
        self._text, self._at = "", 0
        self._lines, self._counted = 1, 0

    def next_char(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _BLANK:
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def take(self, char: str) -> None:
        """Go past that character."""
        if self.next_char() != char:
            raise self.error(f"Expecting {char!r}")
        self._at += 1

    def value(self) -> Any:
        """The JSON value that begins here."""
        while True:
            self.next_char()
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > LONGEST_ROW:
                    what = f"a value of more than {LONGEST_ROW:,} characters, or {error.msg}"
                    raise self.error(what, error.pos) from error
                if self._more():
                    continue
                raise self.error(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of open brackets
                raise self.error("nested too deep or a number too long") from error
            if end == len(self._text) and self._more():
                continue  # of a number, more digits may follow
            self._at = end
            return value

    def line(self) -> int:
        """The line of what comes next, counted from 1."""
        self._lines += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._lines

    def error(self, what: str, at: int | None = None) -> DataError:
        line = self._lines + self._text.count("\n", self._counted, self._at if at is None else at)
        return DataError(Problem(self._label, f"not JSON: {what}: line {line}"))

    def _more(self) -> bool:
        """Read at least as much again as is left, so that a large element is not tried too often. False at the end."""
        self.line()
        found = [self._text[self._at :]]
        left, due = len(found[0]), max(len(found[0]), 1)
        self._at = self._counted = 0
        while due > 0:
            piece = next(self._pieces, b"")
            found.append(self._decoded(piece))
            due -= len(found[-1])
            if not piece:
                break
        self._text = "".join(found)
        return len(self._text) > left

    def _decoded(self, piece: bytes) -> str:
        before = self._bytes - len(self._utf8.getstate()[0])
        self._bytes += len(piece)
        try:
            found = self._utf8.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            raise DataError(Problem(self._label, f"not UTF-8 (byte {before + error.start})")) from error
        if found and before == 0:
            found = found.removeprefix(_BOM)
        return found
