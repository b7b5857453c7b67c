"""Groups of training ranks that start in a fraction of a second: forked from a process that has imported everything.

A rank runs the same `phi3-dist train …` as under a launcher, with the launcher's environment. What differs is only
that Python and torch are in memory already, so that a hundred runs can be killed in minutes.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from tests.ranks.launcher import NOT_INHERITED, free_port


def nursery() -> ForkServerContext:
    """The context whose server holds the imported modules; started with the first group."""
    for name in [name for name in os.environ if name.startswith(NOT_INHERITED)]:
        del os.environ[name]
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm.preload"])
    return context


def _rank(arguments: Sequence[str], environment: dict[str, str], log: str, before: Callable[[], None] | None) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ |= environment
    sys.argv = ["phi3-dist", *arguments]
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    from phi3_dist.cli import main

    if before is not None:
        before()
    main()


class Group:
    """The ranks of one run. `log` collects what all of them print."""

    def __init__(
        self,
        context: ForkServerContext,
        arguments: Sequence[str],
        world: int,
        log: Path,
        *,
        before: Callable[[], None] | None = None,
        more: Mapping[str, str] | None = None,
    ) -> None:
        """`before`, a function of a module, is called in each rank first of all; `more`: environment variables."""
        self.log, port = log, free_port()
        self.ranks: list[ForkServerProcess] = []
        for rank in range(world):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            environment = {name: str(value) for name, value in names.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
            environment |= more or {}
            process = context.Process(target=_rank, args=(list(arguments), environment, str(log), before), daemon=True)
            process.start()
            self.ranks.append(process)

    def alive(self) -> bool:
        return any(rank.is_alive() for rank in self.ranks)

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        for rank in self.ranks:
            rank.join(max(0.0, end - time.monotonic()))

    def kill(self, *numbers: int) -> None:
        """SIGKILL the ranks named; without numbers all of them, and wait for their end."""
        for number in numbers or range(len(self.ranks)):
            self.ranks[number].kill()
        if not numbers:
            for rank in self.ranks:
                rank.join()

    @property
    def exit_codes(self) -> list[int | None]:
        return [rank.exitcode for rank in self.ranks]

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""
