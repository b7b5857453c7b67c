"""A Python that has imported torch already: `warm.python()` is a program that stands where `sys.executable` would.

    subprocess.run([warm.python(), "-m", "phi3_dist", "train", ...], cwd=..., env=..., ...)

A process that imports torch, transformers and PEFT takes eight seconds of CPU time before it does anything. Here one
server (`server.py`) imports them once a test run and forks for each process that a test asks for; `client.py` is the
program that tests start. It hands its arguments, environment, folder, umask and streams to the server, hands signals on
to the forked process, and ends as that ends: with the same exit code, or by the same signal. A client that is killed
takes its process with it. The forked process runs what `python -m`, `-c` or a script would run, as `__main__`. Below it
`accelerate launch` and `phi3-dist launch`, which are the real ones, start their ranks through the same program.

What differs from a process of its own, so that tests about it start a real one, with `sys.executable`:

- what an interpreter or a library reads from the environment or its options as it starts (`READ_AT_IMPORT` in the
  server, which refuses a process that wants another value), encodings, closed streams, and what is imported when;
- the order of sets of strings is the same in all ranks, which share the server's hash seed;
- the parent of a process, and its command line (`tests/ranks/processes.py` finds the ranks below a launcher all the
  same, and a rank that is killed there takes its client with it by the same signal);
- destructors at the end of an interpreter: exit handlers run, then the process ends.

Real processes throughout are kept by a test of each form: `accelerate launch` with DDP (the last of
`test_strategies.py`) and ZeRO-3 (`test_two_launchers.py`; FSDP2 and two nodes there in `make test-full`),
`launch/local.sh` (`test_restarts.py`), the commands of the README (`test_page_commands.py`), and one process
(`test_missing_packages.py`, `test_wheel.py`).
"""

from __future__ import annotations

import fcntl
import functools
import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
START_S = 200  # within which the server has to answer, on a machine that is busy
# What every process that tests start is given, and libraries read as they are imported
AT_START = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
CLIENT = Path(__file__).with_name("client.py")


@functools.cache
def python() -> str:
    """The program. The first call starts the server, which xdist's workers share and which ends with the test run."""
    worker = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    folder = Path(tempfile.gettempdir()) / f"warm_{os.getuid()}_{worker or uuid.uuid4().hex}"
    folder.mkdir(mode=0o700, exist_ok=True)
    program = folder / "python"
    with (folder / "start.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            _start(folder, os.getppid() if worker else os.getpid())
            partial = folder / "python.partial"
            partial.write_text(f"#!{sys.executable} -IS\nSOCKET = {str(folder / 'socket')!r}\n{CLIENT.read_text()}")
            partial.chmod(0o700)
            partial.rename(program)
    return str(program)


def log() -> str:
    """What the server has written: a line for each process that ended. Empty where no test has asked for it yet."""
    path = Path(python()).parent / "log" if python.cache_info().currsize else None
    return path.read_text(errors="replace") if path and path.exists() else ""


def forked(client: int) -> int | None:
    """The process that a living client stands for; None if this is not a client."""
    return next((int(path.name.partition("_")[2]) for path in _living(f"{client}_*")), None)


def client(process: int) -> int | None:
    """The client that stands for a forked process; None if the server has not forked it, or it has ended."""
    return next((int(path.name.partition("_")[0]) for path in _living(f"*_{process}")), None)


def _living(pattern: str) -> list[Path]:
    return list((Path(python()).parent / "living").glob(pattern)) if python.cache_info().currsize else []


def environment(**more: str) -> dict[str, str]:
    """This process's, with what the server was started with, and more."""
    return {**os.environ, **AT_START, **more}


def _start(folder: Path, owner: int) -> None:
    """Start the server and wait until it listens. One that does not is killed: the next test may try again."""
    (folder / "socket.partial").unlink(missing_ok=True)
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.warm.server", str(folder), str(owner)],
            cwd=REPO,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    until_s = time.monotonic() + START_S
    try:
        while not (folder / "socket").exists():
            if server.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError(f"the warm server did not start:\n{(folder / 'log').read_text()[-4000:]}")
            time.sleep(0.02)
    except BaseException:
        server.kill()
        server.wait()
        raise
    server.returncode = 0  # it is not waited for: no warning when this handle goes
