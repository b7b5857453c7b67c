"""`accelerate launch` without its last fifty lines: the exit code and the end of the rank that failed first.

A signal is handed on to the ranks, which save and stop in their own time. torch's launcher would kill them 30 s later.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import yaml

from phi3_dist.config.shipped_files import here_or_shipped
from phi3_dist.config.user_paths import user_path
from phi3_dist.errors import MachineError, Problem
from phi3_dist.planning.sbatch_body import STOPPED_EARLY

__all__ = ["Ended", "deepspeed_file_beside", "launch"]

TOLD_BY_RANK_0 = (*range(2, 10), STOPPED_EARLY, 130)
"""Exit codes of ranks that have said why: the user's mistakes, and a stop by a signal after a checkpoint."""
_HANDED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_LATER_S = 0.5


@dataclass(frozen=True)
class Ended:
    """How a launch ended: an exit code that the shell understands (128 + n after signal n), and a line or nothing."""

    code: int
    why: str = ""


class _HandedOn:
    """Within it, signals go to the children of this process, those that it starts later included. `signal`: the first.

    Ranks know two signals of one kind within a second, as from a terminal and from here, for one.
    """

    def __init__(self) -> None:
        self.signal: int = 0
        self._asked: dict[int, set[int]] = {}
        self._done = threading.Event()

    @contextlib.contextmanager
    def answered(self) -> Iterator[None]:
        before: dict[int, Any] = {}
        number: int
        for number in _HANDED_ON:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                before[number] = signal.signal(number, self._handle)
        # torch's launcher takes the signals that it is told to, when it starts the ranks: this one nobody sends
        named = os.environ.get("PET_SIGNALS_TO_HANDLE")
        os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"
        try:
            yield
        finally:
            self._done.set()
            os.environ.pop("PET_SIGNALS_TO_HANDLE")
            if named is not None:
                os.environ["PET_SIGNALS_TO_HANDLE"] = named
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = not self.signal
        self.signal = self.signal or number
        self._asked[number] = set()
        self._hand_on()
        if first:
            threading.Thread(target=self._again, daemon=True, name="signals").start()

    def _hand_on(self) -> None:
        for child in _children():
            for number, reached in list(self._asked.items()):
                if child not in reached:
                    reached.add(child)
                    with contextlib.suppress(OSError):
                        os.kill(child, number)

    def _again(self) -> None:
        while not self._done.wait(_LATER_S):
            self._hand_on()


def _children() -> list[int]:
    try:
        return [process.pid for process in psutil.Process().children()]
    except psutil.Error:
        return []


def launch(arguments: Sequence[str]) -> Ended:
    """Run `accelerate launch ARGUMENTS` in this process. Returns once all ranks of this node have ended.

    The command's own mistakes end the process with 2, as in Accelerate.
    """
    handed_on = _HandedOn()
    with handed_on.answered():
        ended = _launch(arguments, handed_on)
    if not handed_on.signal:
        return ended
    name = _name(handed_on.signal)
    stopped = 128 + handed_on.signal if handed_on.signal == signal.SIGINT else STOPPED_EARLY
    if ended.why and ended.code == 128 + handed_on.signal:
        return Ended(stopped, f"stopped by {name}, and a rank ended before it had begun")
    return ended


def _launch(arguments: Sequence[str], handed_on: _HandedOn) -> Ended:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = launch_command_parser().parse_args(_with_deepspeed_file(list(arguments)))
    if handed_on.signal:
        return Ended(128 + handed_on.signal)
    try:
        launch_command(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _ended(rank, failure.exitcode)
    except subprocess.CalledProcessError as error:  # one process, without torch's launcher
        return _ended(0, error.returncode)
    except ConnectionError as error:  # Accelerate's own look at the port
        port = f"MASTER_PORT={options.main_process_port}" if options.main_process_port else "port"
        what = f"cannot be used: {' '.join(str(error).split())[:200]}"
        raise MachineError(Problem(port, what, "--main_process_port with another one, or 0 for a free one")) from error
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


def _with_deepspeed_file(arguments: list[str]) -> list[str]:
    """A shipped config is found by its name in any folder, and the DeepSpeed file of a config beside it."""
    own = list(itertools.takewhile(lambda word: word not in ("-m", "--module"), arguments))
    names = [word.partition("=")[0].replace("-", "_") for word in own]
    if "__config_file" not in names:
        return arguments
    place = names.index("__config_file")
    option, _, value = own[place].partition("=")
    named = value or "".join(own[place + 1 : place + 2])
    config = here_or_shipped(user_path(Path(named)))
    if named and str(config) != named:
        arguments = [*arguments[:place], option, str(config), *arguments[place + (1 if value else 2) :]]
    beside = None if "__deepspeed_config_file" in names else deepspeed_file_beside(config)
    return arguments if beside is None else ["--deepspeed_config_file", str(beside), *arguments]


def deepspeed_file_beside(config: Path) -> Path | None:
    """The DeepSpeed file of an Accelerate config, where it lies beside that and not where Accelerate looks for it.

    Accelerate looks from the folder it is run in. Beside: the path counted from the folder above `configs/`, as in the
    shipped configs, or from the config's own folder. None where Accelerate finds the file, or nobody does.
    """
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None  # Accelerate will say so
    section = values.get("deepspeed_config") if isinstance(values, dict) else None
    file = section.get("deepspeed_config_file") if isinstance(section, dict) else None
    if not isinstance(file, str) or "\0" in file or Path(file).is_file():
        return None
    folder = config.resolve().parent
    places = (above / file for above in (folder.parent.parent, folder))
    return next((path for path in places if path.is_file()), None)
