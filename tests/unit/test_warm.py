"""A forked process is to its caller what an interpreter of its own would be: streams, folder, exit code, signals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import warm

FACTS = """
import json, os, sys
sys.stderr.write("to stderr")
print(json.dumps([
    sys.argv[1:], __name__, sys.stdin.read(), os.getcwd(), os.environ.get("EXTRA"), os.environ.get("HOME"), os.umask(0),
    sys.path[0], "torch" in sys.modules, sys.executable == EXECUTABLE,
]))
"""


def ended(*words: str, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    env = env or warm.environment()
    return subprocess.run([warm.python(), *words], env=env, text=True, capture_output=True, check=False, **options)


@pytest.mark.parametrize("kind", ["-c", "script"])
def test_it_has_what_its_caller_gave_it(kind: str, tmp_path: Path) -> None:
    text = FACTS.replace("EXECUTABLE", repr(sys.executable))
    (tmp_path / "script.py").write_text(text)
    words = ("-c", text) if kind == "-c" else (str(tmp_path / "script.py"),)
    environment = warm.environment(EXTRA="yes")
    del environment["HOME"]
    done = ended(*words, "é", "two words", input="typed\n", cwd=tmp_path, env=environment, umask=0o027)
    assert (done.returncode, done.stderr) == (0, "to stderr")
    first = "" if kind == "-c" else str(tmp_path)
    found = json.loads(done.stdout)
    assert found == [["é", "two words"], "__main__", "typed\n", str(tmp_path), "yes", None, 0o027, first, True, True]


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('a reason')", 1, "a reason\n"),
        ("import atexit, sys; atexit.register(sys.stderr.write, 'at exit'); sys.exit(300)", 300 & 0xFF, "at exit"),
        ("import threading, sys; threading.Timer(0.1, sys.stderr.write, ['later']).start()", 0, "later"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import os; os.abort()", -signal.SIGABRT, ""),
    ],
)
def test_it_ends_as_an_interpreter_does(text: str, code: int, says: str) -> None:
    done = ended("-c", text)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", says)


def test_what_nobody_catches_is_a_traceback() -> None:
    done = ended("-c", "1 / 0")
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 7), (signal.SIGINT, -2), (signal.SIGKILL, -9)])
def test_a_signal_is_handed_on(number: signal.Signals, code: int) -> None:
    text = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda n, f: sys.exit(7))\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([warm.python(), "-c", text], env=warm.environment(), stdout=-1, stderr=-1) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert (warm.forked(process.pid), warm.client(pid)) == (pid, process.pid)
        process.send_signal(number)
        assert process.wait(timeout=30) == code
    until_s = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() or warm.forked(process.pid) is not None:
        assert time.monotonic() < until_s, "the process outlived its client"
        time.sleep(0.01)


def test_what_is_ignored_stays_ignored() -> None:
    """As under nohup, and in the background of a script."""
    text = (
        "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN, signal.getsignal(signal.SIGHUP) == 0)"
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        done = ended("-c", text)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.stdout, done.stderr) == ("True True\n", "")


def test_what_is_read_at_import_cannot_be_another() -> None:
    done = ended("-c", "print('ran')", env=warm.environment(PYTHONHASHSEED="5"))
    assert (done.returncode, done.stdout) == (96, "")
    assert done.stderr == "PYTHONHASHSEED=5 is read at import: start a real process for it\n"


def test_siblings_draw_other_numbers_and_know_nothing_of_each_other() -> None:
    text = "import random, sys; print(random.random(), 'left' in sys.modules); sys.modules['left'] = sys"
    first, second = (ended("-c", text).stdout.split() for _ in range(2))
    assert first[0] != second[0]
    assert first[1] == second[1] == "False"


def test_a_verb_is_the_same_with_a_real_python() -> None:
    words = ("-m", "phi3_dist", "config", "show", "no-such-file.yaml")
    ours = ended(*words, cwd=warm.REPO)
    theirs = subprocess.run(
        [sys.executable, *words], cwd=warm.REPO, env=warm.environment(), text=True, capture_output=True, check=False
    )
    assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)
    assert ours.returncode == 2
