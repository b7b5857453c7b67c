"""Signals at every phase of a run. A handler does no I/O and no collective.

SIGTERM, SIGUSR1 (a scheduler's notice), SIGHUP (a closed terminal; not under nohup) and SIGINT (Ctrl-C) ask a run to
stop. While it trains they only set a flag, and the ranks agree to save and end after a step. Before that there is
nothing to save: the run unwinds and ends at once, with the exit code of a stop. Where the main thread sits in a library
that never returns (a process group waits for its ranks for half an hour), a thread ends the process after `GRACE_S`.
A second SIGINT ends at once. One that comes within `SAME_S` is the first one twice: a terminal sends it to every
process, and a launcher hands it on.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any

__all__ = [
    "EXIT_STOPPED",
    "SIGNALS",
    "StopFlag",
    "Stopped",
    "answered",
    "exit_code_of",
    "finishing",
    "starts_a_run",
    "state_of_stop",
    "stop_signals",
]

EXIT_STOPPED = 75
"""Exit code of a run that a signal stopped: sysexits' EX_TEMPFAIL, start it again."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
GRACE_S, SAME_S = 10.0, 1.0


def exit_code_of(number: int) -> int:
    """130 after Ctrl-C, as shells have it, else 75."""
    return 128 + number if number == signal.SIGINT else EXIT_STOPPED


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals to answer: SIGHUP only where nobody (nohup) has had it ignored."""
    return tuple(s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN)


def state_of_stop(number: int) -> str:
    """The word for a run that a signal ended, as `phi3-dist runs` shows it: a person's Ctrl-C is not a preemption."""
    return "interrupted" if number == signal.SIGINT else "preempted"


class Stopped(SystemExit):
    """A signal that came when there was nothing to save. Nothing but the end of the process catches it by accident."""

    def __init__(self, number: int) -> None:
        self.number, self.exit_code = number, exit_code_of(number)
        super().__init__(self.exit_code)

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name} before its first step; nothing is lost"


def starts_a_run(arguments: Sequence[str]) -> bool:
    """Whether this command line trains, or launches what does."""
    return bool(arguments) and arguments[0] in ("train", "launch", "sweep")


@contextlib.contextmanager
def answered(arguments: Sequence[str]) -> Iterator[None]:
    """While the command line is read and libraries are imported, a signal ends the process without a traceback.

    For verbs that start a run with a stop's exit code, for the others Ctrl-C alone, with 130. Nothing is begun yet.
    """
    wanted = stop_signals() if starts_a_run(arguments) else (signal.SIGINT,)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _leave) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is _leave:
                signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    _end(number, "before it began")


def _end(number: int, when: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that has gone
        os.write(2, f"phi3-dist: stopped by {signal.Signals(number).name} {when}\n".encode())
    os._exit(exit_code_of(number))


def finishing() -> None:
    """The run is done and what is left takes seconds: no signal stops that, but a second Ctrl-C.

    Nor one while the interpreter ends: Python has taken its handlers back by then, and SIGUSR1 would kill the process.
    """
    if threading.current_thread() is threading.main_thread():
        flag = StopFlag()
        flag.save_first()
        for number in stop_signals():
            signal.signal(number, flag._handle)
        atexit.register(_ignore_at_the_end)


def _ignore_at_the_end() -> None:
    for number in stop_signals():
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)


class StopFlag:
    """A context in which the signals set `signal`, the number of the first that came, else 0.

    Until `save_first` is called, they raise Stopped as well.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._saves = False
        self._came_s = 0.0
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._wakeup = -1

    def save_first(self) -> None:
        """From here on a signal waits for the end of the step. Raises Stopped for one that has come already."""
        self._saves = True
        if self.signal:
            raise Stopped(self.signal)

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in stop_signals():
            self._before[number] = signal.signal(number, self._handle)
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        _watched.add(self._pipe[1])
        threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True, name="signals").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pipe is None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._saves = True
        _watched.discard(self._pipe[1])
        os.close(self._pipe[1])  # which ends the thread
        self._pipe = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again = number == self.signal == signal.SIGINT and now - self._came_s > SAME_S
        if again:
            os._exit(exit_code_of(number))
        if not self.signal:
            self.signal, self._came_s = number, now
        if not self._saves:
            raise Stopped(self.signal)

    def _watch(self, pipe: int) -> None:
        """End a process whose main thread has not come to its handlers, or has lost what they raised."""
        with os.fdopen(pipe, "rb", buffering=0) as read:
            while number := read.read(1):
                if self._saves or number[0] not in self._before:
                    continue
                time.sleep(GRACE_S)
                if not self._saves:
                    _end(self.signal or number[0], "while it started")


_watched: set[int] = set()


def _forget() -> None:
    """A forked child has the handlers, and its parent's thread would hear of its signals."""
    if _watched:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)
