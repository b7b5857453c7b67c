"""Every cell of the support matrix on a GPU that is not there: what ran, what the plan refuses, what went wrong.

Each cell is rehearsed in a process forked off one that has imported everything: a rehearsal leaves process groups,
engines and environment variables behind.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

from phi3_dist.bench.counting import Wait
from phi3_dist.bench.rehearsal import Report, import_all, load_on_host, rehearse
from phi3_dist.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from phi3_dist.errors import PlanError
from phi3_dist.planning.support import PRECISIONS, QUANTIZATIONS, STRATEGIES

__all__ = ["NOT_REHEARSED", "Cell", "Outcome", "by_design", "cells", "forked", "rehearse_cells", "small_config"]

WORLD = 2
PACK_LENGTH = 64

NOT_REHEARSED = {
    "all": "numbers, and therefore overflow, skipped steps and what depends on values; kernels' own limits and speed",
    "ddp": "the exchange, and buckets laid out anew after the first step: the reducer is DDP's own",
    "zero": "the exchange, and the comparison of all ranks' module order before the first step",
    "fsdp2": "the exchange",
    "nf4": "bitsandbytes' parameter classes and transformers' reading of the weights: the linears, quantising and "
    "dequantising operators are bitsandbytes', the parameters plain ones with the same attributes",
    "int8": "bitsandbytes' parameter classes and transformers' reading of the weights, and products with outliers",
}
"""What stands in for the real thing, by strategy or quantisation."""


@dataclass(frozen=True)
class Cell:
    """One combination of the matrix. `device` is cpu for loading on a host that has a GPU beside."""

    strategy: str
    quantization: str
    precision: str
    device: str = "cuda"

    def __str__(self) -> str:
        return f"{self.strategy} {self.quantization} {self.precision} {self.device}"


@dataclass(frozen=True)
class Outcome:
    """`verdict` is ran, refused by the plan, or failed, with the reason; faults and unexpected waits of what ran."""

    cell: Cell
    verdict: str
    why: str = ""
    faults: tuple[str, ...] = ()
    waits: tuple[str, ...] = ()
    by_design: dict[str, int] = field(default_factory=dict)
    held: str = ""

    @property
    def sound(self) -> bool:
        return self.verdict == "refused" or (self.verdict == "ran" and not self.faults and not self.waits)

    @property
    def not_rehearsed(self) -> str:
        keys = ("all", self.cell.strategy.removesuffix("_offload").rstrip("123"), "fsdp2", self.cell.quantization)
        named = (key for key in keys if key != "fsdp2" or self.cell.strategy.startswith("fsdp2"))
        return "; ".join(NOT_REHEARSED[key] for key in named if key in NOT_REHEARSED)


def cells() -> list[Cell]:
    """Strategy × quantisation × precision on a GPU, and quantised loading on the CPU of a machine that has one."""
    every = [Cell(*names) for names in product(STRATEGIES, QUANTIZATIONS, PRECISIONS)]
    return every + [Cell("single", quantization, "fp32", "cpu") for quantization in QUANTIZATIONS]


_BY_DESIGN = (
    ("int8", "", "what", "outliers", "LLM.int8() looks for outliers in each product"),
    ("zero", "update", "where", "", "DeepSpeed reads overflow and norm on the host before it updates"),
    ("fsdp2_offload", "", "what", "Event.synchronize", "FSDP2 waits for the offloaded gradients, which the host steps"),
    ("zero2_offload", "", "where", "zero/stage_1_and_2.py", "DeepSpeed sums the offloaded gradients' norm on the host"),
    ("zero3", "", "where", "zero/stage3.py", "DeepSpeed empties its bucket of gradients"),
    ("zero3_offload", "", "where", "zero/partition_parameters.py", "DeepSpeed copies offloaded weights one by one"),
)
"""Strategy or quantisation (its beginning), phase (empty: any), field of the wait, text in it, and why it is there."""


def by_design(wait: Wait, strategy: str, quantization: str) -> str:
    """Why this wait belongs to what was asked for; empty where it is a fault."""
    for asked, phase, place, text, why in _BY_DESIGN:
        applies = quantization == asked or strategy.startswith(asked)
        if applies and phase in {"", wait.phase} and text in getattr(wait, place):
            return why
    return ""


def small_config(layers: int = 2) -> Any:
    """A Phi-3 in all but size, with LongRoPE and grouped queries."""
    from transformers import Phi3Config

    return Phi3Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        original_max_position_embeddings=2048,
        sliding_window=None,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 2048,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
        },
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def _config_of(cell: Cell) -> RunConfig:
    world = 1 if cell.strategy == "single" else WORLD
    return RunConfig(
        model=ModelConfig(source="rehearsed", precision=cell.precision, quantization=cell.quantization),
        data=DataConfig(train="none", pack_length=PACK_LENGTH),
        train=TrainConfig(global_batch=world),
    )


def _rehearse(cell: Cell) -> Outcome:
    if cell.device == "cpu":
        return Outcome(cell, "ran", held=load_on_host(_config_of(cell), small_config()))
    try:
        world = 1 if cell.strategy == "single" else WORLD
        report = rehearse(_config_of(cell), small_config(), cell.strategy, world=world)
    except PlanError as error:
        return Outcome(cell, "refused", "; ".join(problem.what for problem in error.problems))
    return outcome_of(cell, report)


def outcome_of(cell: Cell, report: Report) -> Outcome:
    """The report's faults, and its waits apart by whether they are expected."""
    expected: Counter[str] = Counter()
    unexpected = []
    for wait, count in report.waits.items():
        why = by_design(wait, cell.strategy, cell.quantization)
        if why:
            expected[why] += count
        else:
            unexpected.append(f"{wait.phase}: {count} × {wait.what} at {wait.where}")
    faults = tuple(f"{fault.phase}: {n} × {fault.what} at {fault.where}" for fault, n in report.faults.items())
    return Outcome(cell, "ran", "", faults, tuple(unexpected), dict(expected), report.held)


def _failure(error: BaseException) -> str:
    """The error in a line, with the innermost line of this package that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/phi3_dist/" in frame.filename]
    ours = [frame for frame in frames if "/bench/" not in frame.filename] or frames
    place = f" at {ours[-1].filename.rsplit('/phi3_dist/', 1)[-1]}:{ours[-1].lineno}" if ours else ""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}{place}"


def fork(function: Callable[[], Any]) -> tuple[int, int]:
    """Run `function` in a forked process; its process id, and the file that its JSON result will be read from.

    An error there comes back as `{"error": …}`.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    os.close(read)
    with os.fdopen(write, "w", encoding="utf-8") as pipe:
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 -- it is handed to the parent, and this process ends
            result = {"error": _failure(error)}
        json.dump(result, pipe)
    sys.stdout.flush()
    os._exit(0)


def _as_json(cell: Cell) -> dict[str, Any]:
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):  # noqa: PTH123
        outcome = _rehearse(cell)
    return {key: value for key, value in vars(outcome).items() if key != "cell"}


def forked(bodies: Sequence[Callable[[], Any]], jobs: int) -> Iterator[dict[str, Any]]:
    """What each body gives, in order; `jobs` of them run at a time, each in a process of its own."""
    waiting, running = list(bodies), list[tuple[int, int]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(fork(waiting.pop(0)))
        pid, read = running.pop(0)
        with os.fdopen(read, encoding="utf-8") as pipe:
            text = pipe.read()
        os.waitpid(pid, 0)
        yield json.loads(text) if text else {"error": "the process died"}


def _outcome(cell: Cell, found: dict[str, Any]) -> Outcome:
    if "error" in found:
        return Outcome(cell, "failed", found["error"])
    known: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    return Outcome(cell, **known)


def rehearse_cells(which: Sequence[Cell], jobs: int = 1) -> Iterator[Outcome]:
    """The outcome of each cell, in order; `jobs` of them run at a time."""
    import_all()
    results = forked([partial(_as_json, cell) for cell in which], jobs)
    yield from (_outcome(cell, found) for cell, found in zip(which, results, strict=True))
