"""A signal at any moment ends a run with the exit code of a stop and without a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phi3_dist.training import signals
from phi3_dist.training.signals import StopFlag, Stopped, exit_code_of, stop_signals
from tests.ranks.launcher import REPO

ALL = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGHUP: 75, signal.SIGINT: 130}


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", ALL)
def test_before_there_is_something_to_save_a_run_unwinds(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"stopped by {number.name} before its first step") as raised, StopFlag():
        send(number)
    assert raised.value.code == raised.value.exit_code == CODES[number] == exit_code_of(number)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", ALL)
def test_while_it_trains_a_run_is_only_told(number: signal.Signals) -> None:
    with StopFlag() as flag:
        flag.save_first()
        send(number)
        send(signal.SIGTERM)
        assert flag.signal == number


def test_one_that_was_lost_in_a_callback_is_raised_later() -> None:
    with StopFlag() as flag:
        with pytest.raises(Stopped):
            send(signal.SIGTERM)
        with pytest.raises(Stopped):
            flag.save_first()


def test_one_ctrl_c_that_comes_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the terminal, and handed on by a launcher; the second a second later is another."""
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with StopFlag() as flag:
        flag.save_first()
        send(signal.SIGINT)
        send(signal.SIGINT)
        assert (flag.signal, ended) == (signal.SIGINT, [])
        monkeypatch.setattr(signals, "SAME_S", 0.0)
        send(signal.SIGINT)
        assert ended == [130]


def test_a_hangup_that_nohup_has_had_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals()
        with StopFlag():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def python(*arguments: str, path: Path = REPO) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{REPO}"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=REPO, env=env, text=True, capture_output=True, timeout=60, check=False)


def test_a_main_thread_that_never_comes_to_it_holds_nobody() -> None:
    """As in a process group that waits for its ranks for half an hour: here what the handler raises is lost."""
    code = """
import os, signal, threading, time
from phi3_dist.training import signals
signals.GRACE_S = 0.2

class Callback:
    def __del__(self):
        time.sleep(20)

with signals.StopFlag():
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    Callback()
    time.sleep(20)
"""
    began = time.monotonic()
    done = python("-c", code)
    assert done.returncode == 75, done.stderr
    assert time.monotonic() - began < 15
    assert "stopped by SIGUSR1 while it started" in done.stderr


@pytest.mark.parametrize(("number", "verb"), [(s, "train") for s in ALL] + [(15, "launch"), (2, "runs")])
def test_a_signal_amid_the_first_imports_is_no_traceback(number: int, verb: str, tmp_path: Path) -> None:
    """Ctrl-C at 0.3 s."""
    (tmp_path / "typer.py").write_text(f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(20)\n")
    done = python("-m", "phi3_dist", verb, "run.yaml", path=tmp_path)
    assert done.returncode == CODES[signal.Signals(number)]
    assert done.stderr == f"phi3-dist: stopped by {signal.Signals(number).name} before it began\n"


# --- the launcher ---------------------------------------------------------------------------------------------------

LAUNCHER = """
import subprocess, sys, time
from phi3_dist.machine import launcher

def one_rank(arguments, handed_on):
    print("up", flush=True)
    if "late" in arguments:
        while not handed_on.signal:
            time.sleep(0.01)
    code = subprocess.Popen([sys.executable, "-c", sys.argv[1]]).wait()
    return launcher._ended(0, code)

launcher._launch = one_rank
ended = launcher.launch(sys.argv[2:])
print(ended.code, ended.why, flush=True)
"""
SAVES = """
import signal, sys, time
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, lambda n, f: sys.exit(130 if n == 2 else 75))
print("up", flush=True)
time.sleep(30)
"""
STARTS = "import time; print('up', flush=True); time.sleep(30)"


@pytest.mark.parametrize("number", ALL)
@pytest.mark.parametrize("rank", [SAVES, STARTS], ids=["trains", "starts"])
def test_a_signal_to_the_launcher_reaches_the_ranks_and_has_their_code(number: signal.Signals, rank: str) -> None:
    command = [sys.executable, "-c", LAUNCHER, rank]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["up\n", "up\n"]
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
    assert out.startswith(f"{CODES[number]} ")
    assert ("before it had begun" in out) is (rank == STARTS)


def test_a_signal_before_the_ranks_are_there_is_handed_on_when_they_are() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, SAVES, "late"], cwd=REPO, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.terminate()
        out, _ = process.communicate(timeout=30)
    assert out.splitlines()[-1].startswith("75")


AT_THE_END = """
import os, signal, sys
from phi3_dist.training.signals import finishing

class Last:
    def __init__(self): self.kill, self.pid = os.kill, os.getpid()
    def __del__(self): [self.kill(self.pid, number) for number in (10, 15, 1)]

sys.last = Last()
finishing()
sys.exit(75)
"""


def test_a_signal_while_the_interpreter_ends_changes_no_exit_code() -> None:
    """A job asks its ranks again and again to stop, and Python takes its handlers back before it takes down modules."""
    assert subprocess.run([sys.executable, "-c", AT_THE_END], cwd=REPO, check=False).returncode == 75
