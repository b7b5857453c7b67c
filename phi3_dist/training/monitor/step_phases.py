"""What the run's page needs of a run and metrics.jsonl would not hold: parts of a step, memory, lengths, hardware."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phi3_dist.data.pack.packs import Packs
from phi3_dist.machine.probe import probe
from phi3_dist.modeling.lora import count_parameters
from phi3_dist.training.context import RunContext
from phi3_dist.training.engines.backward_and_update import Engine

__all__ = ["GIB", "TimedEngine", "lengths_of", "peak_gib", "run_description"]

BINS = 16
GIB = 2**30


class TimedEngine:
    """An engine for one step that notes where its passes begin and end. Nothing waits for the device.

    A GPU's times are events on its stream: `seconds` may be asked once the step's numbers have been read.
    """

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self.optimizer, self._engine = engine.optimizer, engine
        self.model: Any = self._forward  # train_step calls it, and no more
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    def start_micro_batch(self, *, last: bool) -> None:
        self._engine.start_micro_batch(last=last)

    def _forward(self, **batch: Any) -> Tensor:
        loss: Tensor = self._timed("forward", lambda: self._engine.model(**batch))
        return loss

    def backward(self, loss: Tensor) -> None:
        self._timed("backward", lambda: self._engine.backward(loss))

    def update(self, lr: float) -> Tensor:
        norm: Tensor = self._timed("update", lambda: self._engine.update(lr))
        return norm

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        begun = self._now()
        done = work()
        self._spans.append((name, begun, self._now()))
        return done

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        """`forward_s`, `backward_s` and `update_s` of this rank, each summed over the micro batches."""
        found = {"forward_s": 0.0, "backward_s": 0.0, "update_s": 0.0}
        for name, begun, ended in self._spans:
            found[f"{name}_s"] += begun.elapsed_time(ended) / 1000 if self._on_gpu else ended - begun
        return {key: round(value, 4) for key, value in found.items()}


def peak_gib(device: torch.device) -> float:
    """The most memory so far, GiB: of torch's tensors on a GPU, of this whole process on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / GIB, 3)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(largest * (1 if sys.platform == "darwin" else 1024) / GIB, 3)


def _histogram(values: NDArray[np.int64]) -> dict[str, list[int]]:
    """Equal bins from 0 to the largest value: the upper edge of each (inclusive), and how many fall in it."""
    largest = int(values.max())
    width = max(1, -(-largest // BINS))
    bins = np.maximum(-(-values // width) - 1, 0)
    counts = np.bincount(bins, minlength=-(-largest // width))
    return {"up_to": [width * (i + 1) for i in range(len(counts))], "count": counts.tolist()}


def lengths_of(packs: Packs) -> dict[str, Any]:
    """How long rows and packs are, in tokens: counts and two histograms."""
    rows = packs.rows.lengths.astype(np.int64)
    sizes = np.fromiter(map(len, packs.packs), np.int64, len(packs.packs))
    members = np.fromiter(chain.from_iterable(packs.packs), np.int64, int(sizes.sum()))
    filled = np.add.reduceat(rows[members], np.concatenate(([0], np.cumsum(sizes)[:-1])))
    return {
        "rows": len(rows),
        "packs": len(filled),
        "tokens": int(filled.sum()),
        "supervised_tokens": int(packs.targets.sum()),
        "pack_length": packs.pack_length,
        "row_tokens": _histogram(rows),
        "pack_tokens": _histogram(filled),
    }


def run_description(ctx: RunContext) -> dict[str, Any]:
    """`lengths`, `parameters` and `hardware` of a run, for plan.json; the hardware is that of this rank's node."""
    machine, counts = probe(), count_parameters(ctx.engine.model)
    lengths = {"train": lengths_of(ctx.train)}
    if ctx.held_out is not None:
        lengths["held_out"] = lengths_of(ctx.held_out)
    hardware = {
        "device": machine.device_name,
        "devices_per_node": machine.devices_per_node,
        "device_memory_gib": round(machine.device_memory_gib, 1),
        "host_memory_gib": round(machine.host_memory_gib, 1),
        "cores": machine.cpu_count,
    }
    return {
        "lengths": lengths,
        "parameters": {"total": counts.total, "trainable": counts.trainable},
        "hardware": hardware,
    }
