"""One check: facts of one function, run so that the others still run whatever becomes of it; one line of JSON each."""

from __future__ import annotations

import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["GONE", "Check", "Group", "Skip", "relative_error", "say"]

GONE = 3
"""Exit code of a group whose CUDA context an error has spoilt: the next group is a process of its own."""
Check = Callable[[], dict[str, Any] | None]


def say(out: Path, **row: Any) -> None:
    """One line of JSON on the terminal and in OUT/checks.jsonl."""
    line = json.dumps(row, default=str)
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
    with (out / "checks.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


class Skip(Exception):  # noqa: N818 -- no error: the check has no answer here
    """A check that cannot be made here, and why."""


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """|ours - exact| / |exact|, both as float32 vectors."""
    ours, exact = ours.detach().float(), exact.detach().float()
    return float((ours - exact).norm() / exact.norm().clamp_min(1e-20))


class Group:
    """Checks of one process, of those whose names the pattern `checks` finds.

    `cpu`: at toy sizes, without what only CUDA has.
    """

    def __init__(self, name: str, out: Path, *, cpu: bool, layers: int = 32, checks: str = "") -> None:
        self.name, self.out, self.cpu, self.layers, self.checks = name, out, cpu, layers, checks
        self.device = torch.device("cpu" if cpu else "cuda:0")

    def check(self, name: str, function: Check) -> Mapping[str, Any]:
        """Run one check and say its line; the facts, empty where it failed or was skipped."""
        if not re.search(self.checks, name):
            return {}
        start = time.perf_counter()
        facts: dict[str, Any] = {}
        try:
            facts = function() or {}
            say(self.out, group=self.name, check=name, ok=facts.pop("ok", True), s=self._since(start), **facts)
        except Skip as why:
            say(self.out, group=self.name, check=name, ok=None, skipped=str(why))
        except Exception as error:  # noqa: BLE001 -- said in full, and the other checks still have to run
            where = traceback.format_exc().strip().splitlines()[-6:]
            what = f"{type(error).__name__}: {str(error)[:600]}"
            say(self.out, group=self.name, check=name, ok=False, s=self._since(start), error=what, where=where)
            if "CUDA error" in what:
                sys.exit(GONE)
        return facts

    @staticmethod
    def _since(start: float) -> float:
        return round(time.perf_counter() - start, 2)

    def sync(self) -> None:
        if not self.cpu:
            torch.cuda.synchronize()

    def milliseconds(self, function: Callable[[], Any], runs: int = 20, warm: int = 5) -> float:
        """The median of single runs, between events on CUDA, between clock reads on a CPU."""
        runs, warm = (3, 1) if self.cpu else (runs, warm)
        for _ in range(warm):
            function()
        times = []
        for _ in range(runs):
            if self.cpu:
                start = time.perf_counter()
                function()
                times.append((time.perf_counter() - start) * 1e3)
            else:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                first.record()
                function()
                last.record()
                last.synchronize()
                times.append(first.elapsed_time(last))
        return round(sorted(times)[len(times) // 2], 4)

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype).requires_grad_(grad)
