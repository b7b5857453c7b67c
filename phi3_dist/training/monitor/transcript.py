"""What a rank prints, kept in the run folder too: for `phi3-dist logs`, after the terminal is gone.

Only what Python writes to its standard output and error is seen here. Escape sequences and lines that were drawn over,
such as those of a progress bar, are left out. A disk that is full ends no training: what could not be kept is counted,
and said in the file once there is room again.
"""

from __future__ import annotations

import re
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from phi3_dist.errors import Phi3DistError

__all__ = ["TRANSCRIPTS", "Transcript"]

TRANSCRIPTS = Path("logs", "terminal")
"""Where in the run folder: `rank_000.log`, … As in report/logs.py, which finds them."""
_EARLY_AT_MOST = 2**20
_LINE_AT_MOST = 2**16
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


class _Stream:
    """A text stream that also tells a transcript. Libraries may hold it for longer than the transcript is kept."""

    def __init__(self, stream: Any, transcript: Transcript) -> None:
        self._stream, self._transcript = stream, transcript

    def write(self, text: str) -> int:
        self._transcript.add(text)
        return int(self._stream.write(text) or 0)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Transcript:
    """Within it, what goes to `sys.stdout` and `sys.stderr` is kept, from `into` on in the run folder.

    An error that leaves the block is kept as its message, a bug with its traceback.
    """

    def __init__(self) -> None:
        self._pending, self._early, self._early_size = "", list[str](), 0
        self._path: Path | None = None
        self._file: IO[bytes] | None = None
        self._lost, self._closed = 0, False
        self._end = ""  # what ends a line that was cut by a full disk

    def __enter__(self) -> Transcript:
        self._before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = _Stream(sys.stdout, self), _Stream(sys.stderr, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stdout, sys.stderr = self._before
        if isinstance(value, Phi3DistError):
            self.add("\n".join([f"{type(value).__name__}:", *(f"  {problem}" for problem in value.problems)]) + "\n")
        elif isinstance(value, Exception):
            self.add("".join(traceback.format_exception(value)))
        elif value is not None and not isinstance(value, SystemExit):
            self.add(f"ended by {type(value).__name__}\n")
        if self._pending:
            self.add("\n")
        self._closed = True
        if self._file is not None:
            self._file.close()

    def into(self, run_folder: Path, rank: int) -> None:
        """Keep it in this run folder, which exists, from the first word on. A file is made once there is a word."""
        self._path = run_folder / TRANSCRIPTS / f"rank_{rank:03d}.log"
        if rank == 0:
            command = _CONTROLS.sub("", " ".join(sys.argv)).replace("\n", " ")
            self._write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S %z')}: {command}\n")
        for line in self._early:
            self._write(line)
        self._early.clear()

    def add(self, text: str) -> None:
        """Text as it was printed: whole lines are kept at once."""
        if self._closed:
            return
        *lines, self._pending = (self._pending + text).split("\n")
        for line in lines:
            self.line(line)
        if len(self._pending) > _LINE_AT_MOST:
            self._pending = self._pending.rsplit("\r", 1)[-1][-_LINE_AT_MOST:]

    def line(self, text: str) -> None:
        """One line, without what was drawn over and without what only a terminal understands."""
        drawn = _CONTROLS.sub("", _ESCAPES.sub("", text.rstrip("\r").rsplit("\r", 1)[-1]))
        line = f"{drawn.rstrip()}\n"
        if self._path is not None:
            self._write(line)
        elif self._early_size < _EARLY_AT_MOST:
            self._early.append(line)
            self._early_size += len(line)

    def _write(self, line: str) -> None:
        assert self._path is not None
        lost_note = f"{self._end}--- {self._lost} lines could not be kept here\n" if self._lost else ""
        try:
            if self._file is None:
                if not self._path.parents[2].is_dir():  # no run folder (any more), or not on this node
                    return
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("ab", buffering=0)
            raw = (lost_note + line).encode("utf-8", "backslashreplace")
            written = self._file.write(raw)
            whole = written == len(raw)
            self._end = "" if whole else "\n"
        except OSError:
            whole = False
        self._lost = 0 if whole else self._lost + 1
