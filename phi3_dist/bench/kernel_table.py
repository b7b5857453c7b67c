"""What the checks of kernels.py share: sizes, tensors, times, and one JSON line a check."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phi3_dist.bench.console import say

__all__ = ["DROPOUT", "RANK", "SCALING", "TOY", "Sizes", "Table", "failures", "gb_s", "judged", "rel"]

RANK, SCALING, DROPOUT = 16, 2.0, 0.05


@dataclass(frozen=True)
class Sizes:
    """Tokens, and a layer's widths; `turned` is half of the rotated values of a head."""

    tokens: int = 4096
    hidden: int = 3072
    inner: int = 8192
    heads: int = 32
    size: int = 96
    vocab: int = 32064

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of the four."""
        hidden = self.hidden
        return {
            "qkv": (3 * self.heads * self.size, hidden),
            "o": (hidden, self.heads * self.size),
            "gate_up": (2 * self.inner, hidden),
            "down": (hidden, self.inner),
        }


TOY = Sizes(tokens=24, hidden=64, inner=96, heads=4, size=16, vocab=96)


def rel(got: Tensor, want: Tensor) -> float:
    """The norm of the difference over that of `want`."""
    got32, want32 = got.detach().float(), want.detach().float()
    return float((got32 - want32).norm() / want32.norm().clamp_min(1e-20))


def failures() -> tuple[type[Exception], ...]:
    """What a check may end with: torch's, Triton's, and a library that is missing or has another signature."""
    from triton.errors import TritonError

    return (RuntimeError, ValueError, TypeError, AttributeError, ImportError, AssertionError, OSError, TritonError)


class Table:
    """Runs checks whose names the pattern `checks` finds, times functions and writes lines."""

    def __init__(self, *, toy: bool, dtype: torch.dtype, checks: str = "") -> None:
        self.toy, self.checks = toy, checks
        self.sizes = TOY if toy else Sizes()
        self.device = torch.device("cpu" if toy else "cuda")
        self.dtype = dtype
        self.group = ""
        self.flush = None if toy else torch.empty(512 * 2**20, dtype=torch.uint8, device=self.device)
        torch.manual_seed(0)

    @property
    def limit(self) -> float:
        """The error allowed: one or two roundings of the dtype. Triton's interpreter cuts bf16 off."""
        return {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2 if self.toy else 6e-3}[self.dtype]

    def make(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Random normal numbers."""
        return (torch.randn(*shape, device=self.device) * scale).to(dtype or self.dtype)

    def ms(self, function: Callable[[], Any], runs: int = 10) -> float:
        """The median of `runs`, the cache flushed before each; on a CPU one run."""
        if self.flush is None:
            start = time.perf_counter()
            function()
            return round((time.perf_counter() - start) * 1e3, 3)
        for _ in range(2):
            function()
        event: Any = torch.cuda.Event
        pairs = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(runs)]
        for start_event, end_event in pairs:
            self.flush.zero_()
            self.flush.zero_()  # long enough for the host to have queued what is timed
            start_event.record()
            function()
            end_event.record()
        torch.cuda.synchronize()
        return round(float(statistics.median(a.elapsed_time(b) for a, b in pairs)), 4)

    def times(self, functions: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        """Milliseconds of each; one that fails has its error there."""
        found: dict[str, Any] = {}
        for name, function in functions.items():
            try:
                found[name] = self.ms(function)
            except failures() as error:
                found[name] = f"{type(error).__name__}: {str(error)[:200]}"
        return found

    def check(self, name: str, facts: Callable[[], dict[str, Any]]) -> None:
        """One line, whatever happens."""
        if not re.search(self.checks, name):
            return
        start = time.perf_counter()
        row: dict[str, Any] = {"group": self.group, "check": name}
        try:
            row |= {"ok": True, **facts()}
        except ModuleNotFoundError as error:
            row |= {"ok": None, "skipped": f"{error.name} is not installed"}
        except failures() as error:
            row |= {"ok": False, "error": f"{type(error).__name__}: {str(error)[:500]}"}
        row["s"] = round(time.perf_counter() - start, 2)
        say(json.dumps(row))


def judged(errors: Mapping[str, float], limit: float) -> dict[str, Any]:
    """Each error, and whether all are within the limit."""
    return {
        "ok": all(error <= limit for error in errors.values()),
        "rel": {name: float(f"{error:.3g}") for name, error in errors.items()},
        "limit": limit,
    }


def gb_s(ms: Any, *tensors: Tensor) -> float | None:
    """GB/s of a pass that moves each of these once; None where there is no time."""
    moved = sum(t.numel() * t.element_size() for t in tensors)
    return round(moved / ms / 1e6, 1) if isinstance(ms, float) and ms else None
