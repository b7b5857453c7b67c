"""Signals as a flag. A handler does no I/O and no collective; ranks agree to stop at the end of a step.

SIGTERM and SIGUSR1 (a scheduler's notice) and SIGINT (Ctrl-C) ask for a checkpoint and an end. A second SIGINT ends at
once.
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopFlag"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopFlag:
    """A context in which the signals only set `signal`, the number of the first that came, else 0."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            os._exit(128 + number)
        if not self.signal:
            self.signal = number
