"""`accelerate launch` without its last fifty lines: the exit code and the end of the rank that failed first."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Ended", "launch"]

TOLD_BY_RANK_0 = (*range(2, 10), 75, 130)
"""Exit codes of ranks that have said why: the user's mistakes, and a stop by a signal after a checkpoint."""


@dataclass(frozen=True)
class Ended:
    """How a launch ended: an exit code that the shell understands (128 + n after signal n), and a line or nothing."""

    code: int
    why: str = ""


def launch(arguments: Sequence[str]) -> Ended:
    """Run `accelerate launch ARGUMENTS` in this process. Returns once all ranks of this node have ended.

    The command's own mistakes end the process with 2, as in Accelerate.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = launch_command_parser().parse_args(list(arguments))
    try:
        launch_command(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _ended(rank, failure.exitcode)
    except SignalException as error:
        number = int(error.sigval)
        return Ended(128 + number, f"stopped by {signal.Signals(number).name}, and the ranks with it")
    return Ended(0)


def _ended(rank: int, code: int) -> Ended:
    if code in TOLD_BY_RANK_0:
        return Ended(code)
    if code < 0:
        why = f"rank {rank} was killed by {_name(-code)}, and the others were stopped"
        if -code == signal.SIGBUS:
            why += "; a mapped file was cut short: the base's weights, or the token cache"
        return Ended(128 - code, why)
    return Ended(code, f"rank {rank} ended first, with exit code {code}; the others were stopped")


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
