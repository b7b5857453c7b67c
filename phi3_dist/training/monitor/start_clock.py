"""What makes a start slow: said beforehand where it takes minutes, and measured up to the first step."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path, PurePath

import psutil

from phi3_dist.machine.doctor import extensions_root
from phi3_dist.planning.plan import RunPlan

__all__ = ["StartClock", "compile_notice"]

LAUNCHERS = {"launch", "accelerate-launch", "torchrun", "torch.distributed.run"}

CPU_OPERATOR = "deepspeed_shm_comm"
"""What DeepSpeed 0.19.8 compiles at its first start on a CPU. On GPUs nothing of what this toolkit uses is compiled."""


def compile_notice(plan: RunPlan, environ: Mapping[str, str]) -> list[str]:
    """A line that says what will be compiled in this start, how long that takes and where it is kept; or none."""
    if not plan.strategy.startswith("zero") or plan.device != "cpu":
        return []
    root = extensions_root(environ)
    patterns = (f"{CPU_OPERATOR}/*.so", f"*/{CPU_OPERATOR}/*.so")
    if any(any(root.glob(pattern)) for pattern in patterns) or any(_installed().glob(f"{CPU_OPERATOR}*.so")):
        return []
    return [
        f"DeepSpeed compiles {CPU_OPERATOR} now, once: this takes one to several minutes without output. "
        f"It is kept in {root} (TORCH_EXTENSIONS_DIR names another folder)"
    ]


def _installed() -> Path:
    """Where DeepSpeed has operators that were compiled at its installation (`DS_BUILD_OPS=1`)."""
    try:
        return Path(str(metadata.distribution("deepspeed").locate_file("deepspeed/ops/comm")))
    except metadata.PackageNotFoundError:
        return Path()


def _launcher_s(rank: psutil.Process) -> float:
    """Seconds between the start of the launcher and of this rank; 0 without a launcher, and for a rank restarted."""
    try:
        parent = rank.parent()
        if parent is None or not any(PurePath(word).name in LAUNCHERS for word in parent.cmdline()):
            return 0.0
        began_s: float = parent.create_time()
    except psutil.Error:  # it has ended, or is another user's
        return 0.0
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    return float(rank.create_time() - began_s) if first else 0.0


class StartClock:
    """Named spans, in seconds, from the start of the launcher or else of this process on; `mark` closes one."""

    def __init__(self) -> None:
        rank = psutil.Process()
        launcher_s = _launcher_s(rank)
        self.spans_s: dict[str, float] = {"launcher": launcher_s} if launcher_s else {}
        self._last = rank.create_time()

    def mark(self, name: str) -> None:
        """What went by since the last mark was `name`. Only the first mark of a name counts."""
        now = time.time()
        self.spans_s.setdefault(name, max(now - self._last, 0.0))
        self._last = now

    @property
    def total_s(self) -> float:
        return sum(self.spans_s.values())

    def line(self) -> str:
        """The spans in one line, for the person who waited."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.spans_s.items())
        return f"start: first step done {self.total_s:.1f} s after the command began ({parts})"
