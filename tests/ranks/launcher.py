"""Run one function on several real ranks, each an operating-system process, as `accelerate launch` would.

    results = run_ranks("tests.ranks.bodies:train", 2, args={"folder": str(tmp_path)})

Every rank imports `module:function`, calls it with `args` and hands its result back as JSON. If a rank fails, the
others are killed and an AssertionError shows the traceback of the rank that failed first: the other tracebacks are
mostly about a peer that has gone. If ranks hang, it names them and shows where each one stands.

No rank outlives the call: each is a session of its own that is killed as a whole, and a rank whose parent dies
(it sees the end of its standard input) kills its own session.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import warm

REPO = Path(__file__).resolve().parent.parent.parent
POLL_S = 0.02
DUMP_WAIT_S = 3.0
LOG_LINES = 40
# What an outer launcher may have left in this process's environment.
NOT_INHERITED = (
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "ACCELERATE_",
    "DS_",
    "FSDP_",
    "TORCHELASTIC_",
)


@dataclass
class Rank:
    """One started rank and the files it writes: `result`, `error`, `log` (both streams) and `stacks`."""

    number: int
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    ended_at_s: float = 0.0
    waiter: threading.Thread | None = field(default=None, repr=False)

    def file(self, kind: str) -> Path:
        return self.folder / f"{kind}_{self.number}"

    def start(self, command: list[str], env: Mapping[str, str]) -> None:
        with self.file("log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=REPO, env=env, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        self.process = process

        def wait() -> None:
            process.wait()
            self.ended_at_s = time.time()  # at once, so that deaths without a word can be put in order

        self.waiter = threading.Thread(target=wait, daemon=True)
        self.waiter.start()

    @property
    def returncode(self) -> int | None:
        return self.process.returncode if self.process is not None and self.ended_at_s else None

    def kill(self) -> None:
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its children too, also after it has ended itself
        if self.waiter is not None:
            self.waiter.join()
        if self.process.stdin is not None:
            self.process.stdin.close()

    def failure(self) -> tuple[float, str] | None:
        """Time and text of this rank's failure, or None."""
        if self.file("error").exists():
            error = json.loads(self.file("error").read_text())
            return error["at_s"], error["traceback"]
        code = self.returncode
        if code is None or (code == 0 and self.file("result").exists()):
            return None
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        tail = self.file("log").read_text(errors="replace").splitlines()[-LOG_LINES:]
        return self.ended_at_s, "\n".join([f"{how} before it returned; the end of its output:", *tail])


def run_ranks(
    target: str,
    world_size: int,
    *,
    args: Mapping[str, Any] | None = None,
    env: Mapping[str, str | None] | None = None,
    timeout_s: float = 120,
    deepspeed: bool = False,
    real: bool = False,
) -> list[Any]:
    """Results of `target(**args)` on `world_size` ranks of this machine, in the order of ranks.

    target: "package.module:function", importable from the repository root.
    args: keyword arguments, of what JSON can hold; paths are handed over as strings.
    env: more environment variables; None takes one away. GPUs are hidden unless CUDA_VISIBLE_DEVICES is given.
    deepspeed: set DeepSpeed's CPU accelerator up in place of Accelerate's CPU mode; the two cannot be combined.
    real: each rank is an interpreter of its own, and no fork of the warm server (`tests/warm`).
    Raises AssertionError with the first failing rank's own traceback, or with the stacks of ranks that hang.
    """
    environment = _environment(world_size, deepspeed=deepspeed, more=env or {})
    arguments = json.dumps(dict(args or {}), default=os.fspath)
    program = sys.executable if real else warm.python()
    with tempfile.TemporaryDirectory(prefix="ranks_") as name:
        ranks = [Rank(number, Path(name)) for number in range(world_size)]
        try:
            for rank in ranks:
                command = [program, "-m", "tests.ranks.launcher", target, arguments, name]
                rank.start(command, environment | {"RANK": str(rank.number), "LOCAL_RANK": str(rank.number)})
            wait_for(ranks, target, timeout_s)
            return [json.loads(rank.file("result").read_text()) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()


def _environment(world_size: int, *, deepspeed: bool, more: Mapping[str, str | None]) -> dict[str, str]:
    base = {k: v for k, v in os.environ.items() if not k.startswith(NOT_INHERITED)}
    base |= {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        # ninja lies beside this interpreter; torch looks for it on the path when it compiles an extension
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }
    base |= {"DS_ACCELERATOR": "cpu"} if deepspeed else {"ACCELERATE_USE_CPU": "true"}
    for key, value in more.items():
        base.pop(key, None)
        if value is not None:
            base[key] = value
    return base


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(ranks: list[Rank], target: str, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while True:
        all_ended = all(rank.returncode is not None for rank in ranks)
        failures = sorted((f[0], rank.number, f[1]) for rank in ranks if (f := rank.failure()))
        if failures:
            raise AssertionError(_failure_text(target, failures))
        if all_ended:
            return
        if time.monotonic() > deadline_s:
            raise AssertionError(_hang_text(target, ranks, timeout_s))
        time.sleep(POLL_S)


def _failure_text(target: str, failures: list[tuple[float, int, str]]) -> str:
    first_s, number, text = failures[0]
    later = [f"rank {n}, {at_s - first_s:.2f} s later: {_last_line(t)}" for at_s, n, t in failures[1:]]
    return "\n".join([f"{target}: rank {number} failed first", text.rstrip(), *later])


def _last_line(text: str) -> str:
    return text.rstrip().rsplit("\n", 1)[-1]


def _hang_text(target: str, ranks: list[Rank], timeout_s: float) -> str:
    hanging = [rank for rank in ranks if rank.returncode is None]
    for rank in hanging:
        assert rank.process is not None
        rank.process.send_signal(signal.SIGUSR1)
    until_s = time.monotonic() + DUMP_WAIT_S
    while time.monotonic() < until_s and not all(_dumped(rank) for rank in hanging):
        time.sleep(POLL_S)
    names = ", ".join(f"rank {rank.number}" for rank in hanging)
    lines = [f"{target}: still running after {timeout_s:g} s: {names} (of {len(ranks)})"]
    for rank in hanging:
        stack = rank.file("stacks").read_text() if _dumped(rank) else "no stack: it does not run Python code yet"
        tail = rank.file("log").read_text(errors="replace").splitlines()[-LOG_LINES:]
        lines += [f"--- rank {rank.number} stands at", stack.rstrip(), *(["its output:", *tail] if tail else [])]
    return "\n".join(lines)


def _dumped(rank: Rank) -> bool:
    return rank.file("stacks").exists() and rank.file("stacks").stat().st_size > 0


# --- the side of a rank -------------------------------------------------------------------------------------------


def _die_with_the_parent() -> None:
    """Kill this rank's whole session when standard input ends: the parent held the other end and is gone."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _write(path: Path, content: object) -> None:
    """Whole or not at all: the parent may look at any moment."""
    text = json.dumps(content)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.rename(path)


def _rank_main(target: str, arguments: str, folder: Path) -> None:
    number = os.environ["RANK"]
    # A bare descriptor that is never closed: a rank that hangs in its own shutdown can still be asked where it stands.
    stacks_fd = os.open(folder / f"stacks_{number}", os.O_WRONLY | os.O_CREAT)
    faulthandler.register(signal.SIGUSR1, file=stacks_fd, all_threads=True)
    faulthandler.enable()
    _die_with_the_parent()
    try:
        module, _, name = target.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        _write(folder / f"result_{number}", function(**json.loads(arguments)))
    except BaseException as error:
        at_s = time.time()
        text = "".join(traceback.format_exception(error))
        _write(folder / f"error_{number}", {"at_s": at_s, "traceback": text})
        raise


if __name__ == "__main__":
    _rank_main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
