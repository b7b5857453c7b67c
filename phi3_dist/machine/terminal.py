"""Saying something never stops a run: a log that is full, closed or gone loses lines, which are counted and told later.

Standard output and error are replaced for as long as a run speaks. Each line goes to the descriptor at once and leaves
nothing in a buffer, so that the end of the process has nothing to fail at. A character that the terminal's encoding
lacks is shown by its number, and tokens and passwords that a library writes are left out.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO, cast

from phi3_dist.errors import MachineError, Problem, redacted
from phi3_dist.machine.print_encoding import IN_ASCII

__all__ = [
    "Failing",
    "Unfailing",
    "failing_output",
    "lost_lines",
    "open_standard_streams",
    "unfailing",
    "unfailing_streams",
]

_SLOW_S = 5.0
"""How long a descriptor that somebody has set to non-blocking may take before a line counts as lost."""
_streams: list[Unfailing] = []


class Unfailing(io.TextIOBase):
    """A text stream over another one. `lost` counts the lines that could not be written, over its whole life."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._line = ""
        self._untold = 0
        self.lost = 0
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
        self._descriptor: int | None = None
        if isinstance(stream, io.TextIOWrapper):  # another kind of stream does more than to hand on
            with contextlib.suppress(OSError, ValueError):
                self._descriptor = stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return IN_ASCII

    def isatty(self) -> bool:
        try:
            return bool(self._stream.isatty())
        except (OSError, ValueError, AttributeError):
            return False

    def fileno(self) -> int:
        return int(self._stream.fileno())

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        whole, ended, rest = (self._line + text).rpartition("\n")
        self._line = rest
        if ended:
            self._say(whole + ended)
        return len(text)

    def flush(self) -> None:
        text, self._line = self._line, ""
        if text:
            self._say(text)

    def _say(self, text: str) -> None:
        text = redacted(text)  # libraries name addresses with all that stands in them
        untold = f"\n[{self._untold} lines could not be written here]\n" if self._untold else ""
        if self._emit(untold + text):
            self._untold = 0
        else:
            lines = max(text.count("\n"), 1)
            self.lost, self._untold = self.lost + lines, self._untold + lines

    def _emit(self, text: str) -> bool:
        try:
            if self._descriptor is None:
                self._stream.write(text)
                self._stream.flush()
            else:
                _write_all(self._descriptor, text.encode(self.encoding, IN_ASCII))
        except (OSError, ValueError):
            return False
        return True


class Failing(io.TextIOWrapper):
    """Standard output of a verb that only answers: a full disk behind it is a MachineError, not a traceback.

    A closed pipe stays a BrokenPipeError: `| head -1` has read what it wanted.
    """

    def write(self, text: str) -> int:
        with _said():
            return super().write(text)

    def flush(self) -> None:
        with _said():
            super().flush()


@contextlib.contextmanager
def _said() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)  # what is left in a buffer must not fail at the process's end
        os.close(nowhere)
        what = f"cannot be written: {error.strerror or error}"
        raise MachineError(Problem("standard output", what, "make room, or send it elsewhere")) from error


def failing_output() -> None:
    """Let standard output say why it can't be written. Only the process's own, on descriptor 1."""
    stream = sys.stdout
    if type(stream) is not io.TextIOWrapper or stream.fileno() != 1:
        return
    encoding, errors, by_line = stream.encoding, stream.errors, stream.line_buffering
    sys.stdout = Failing(stream.detach(), encoding, errors, line_buffering=by_line)


def _write_all(descriptor: int, data: bytes) -> None:
    until = time.monotonic() + _SLOW_S
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


def unfailing(stream: Any) -> Unfailing:
    """`stream` itself where it is one already."""
    return stream if isinstance(stream, Unfailing) else Unfailing(stream)


def lost_lines() -> int:
    """Lines that this process had to say since it began and could not."""
    return sum(stream.lost for stream in _streams)


@contextlib.contextmanager
def unfailing_streams() -> Iterator[None]:
    """Standard output and error cannot fail in the block."""
    out, error = unfailing(sys.stdout), unfailing(sys.stderr)
    _streams[:] = [out, error]
    with contextlib.redirect_stdout(cast(TextIO, out)), contextlib.redirect_stderr(cast(TextIO, error)):
        try:
            yield
        finally:
            out.flush()
            error.flush()


def open_standard_streams() -> None:
    """Put /dev/null where a standard stream was closed: else the next file opened gets its number, and what is said.

    Python has None in the place of such a stream.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
