"""Memory of the first step and the time of the next ones beside what was planned: a line each, and kept in plan.json.

On a GPU the tensors that torch has allocated are what the plan counts, and the two are compared. On a CPU nobody counts
tensors: what is known is the peak of the whole process, with its libraries and the pages of mapped files. It is shown
beside the plan and no error is computed.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from phi3_dist.config.json_text import parse_json
from phi3_dist.errors import RunFolderError
from phi3_dist.machine.probe import probe
from phi3_dist.planning.facts import LaunchFacts
from phi3_dist.planning.memory import total_gib
from phi3_dist.planning.planned_step import planned_step
from phi3_dist.training.context import RunContext
from phi3_dist.training.monitor.step_phases import GIB, peak_gib

__all__ = ["KEY", "AgainstPlan"]

KEY = "first_step"
"""Of plan.json."""
_TIMED = 5
"""Steps after which the time of one is written down; the first, which warms up, is left out."""


class AgainstPlan:
    """Measures on every rank; speaks and writes on rank 0 alone."""

    def __init__(self, ctx: RunContext) -> None:
        self._ctx = ctx
        self._first: int | None = None
        self._timed = False
        # of loading and of the evaluation before the first step
        self._before_gib = peak_gib(ctx.runtime.device)

    def peaks(self) -> dict[str, float]:
        """This rank's most memory so far in GiB: of tensors; on a GPU of torch's allocator and the whole device too."""
        device = self._ctx.runtime.device
        found = {"measured_gib": peak_gib(device), "before_gib": self._before_gib}
        if device.type == "cuda":
            free, whole = torch.cuda.mem_get_info(device)
            found["reserved_gib"] = round(torch.cuda.max_memory_reserved(device) / GIB, 3)
            found["device_used_gib"] = round((whole - free) / GIB, 3)
        return found

    def record(self, ranks: Sequence[Mapping[str, float]], tensors: Mapping[str, int]) -> None:
        """`ranks`: the peaks of each; `tensors`: how many trained ones moved, and why others did not."""
        ctx = self._ctx
        if not ctx.runtime.is_main:
            return
        worst = {key: max(one[key] for one in ranks) for key in ranks[0]}
        on_gpu = ctx.runtime.device.type == "cuda"
        terms = ctx.runtime.plan.memory
        planned = None if terms is None else round(total_gib(terms, "device" if on_gpu else "host"), 3)
        kept: dict[str, Any] = {"tensors": dict(tensors), "planned_gib": planned, **worst}
        kept["measures"] = "tensors" if on_gpu else "process"
        if planned and on_gpu:
            kept["memory_error"] = round(worst["measured_gib"] / planned - 1, 4)
        self._write(kept)
        ctx.metrics.say(_memory_line(kept))

    def next_step(self, step: int) -> None:
        """Before step `step` (from 0) is made."""
        ctx = self._ctx
        self._first = step if self._first is None else self._first
        last = step == ctx.total - 1
        if self._timed or step == self._first or (step < self._first + _TIMED and not last):
            return
        self._timed = True
        if not ctx.runtime.is_main or not ctx.time_left.steps_s:
            return
        steps_s = ctx.time_left.steps_s[1:] or ctx.time_left.steps_s
        measured = statistics.median(steps_s)
        timing: dict[str, Any] = {"step_s": round(measured, 4), "timed_steps": len(steps_s)}
        expected = self._planned_step()
        if expected is not None:
            timing |= {"planned_step_s": round(expected[0], 4), "planned_step_by": expected[1]}
            timing["time_error"] = round(measured / expected[0] - 1, 4)
            of = f"median of {len(steps_s)}" if len(steps_s) > 1 else "of one"
            ctx.metrics.say(
                f"step time: {measured:.3f} s measured ({of}), {expected[0]:.3f} s planned for full packs "
                f"({timing['time_error']:+.0%}); {expected[1]}"
            )
        self._write(timing)

    def _planned_step(self) -> tuple[float, str] | None:
        ctx, plan = self._ctx, self._ctx.runtime.plan
        configs = (getattr(module, "config", None) for module in ctx.engine.model.modules())
        config = next((one for one in configs if hasattr(one, "num_hidden_layers")), None)
        if config is None:
            return None
        launch = LaunchFacts(plan.world_size, plan.nodes, plan.strategy, zero_settings=ctx.runtime.ds_config or {})
        return planned_step(ctx.cfg, probe(), launch, plan, config.to_dict())

    def _write(self, more: Mapping[str, Any]) -> None:
        """A disk that is full or gone ends no training here: the lines have been said."""
        with contextlib.suppress(OSError, ValueError, RunFolderError):
            plan = parse_json((self._ctx.folder.held / "plan.json").read_text("utf-8"))
            self._ctx.folder.write_json("plan.json", {**plan, KEY: {**plan.get(KEY, {}), **more}})


def _memory_line(memory: Mapping[str, Any]) -> str:
    planned, measured = memory["planned_gib"], memory["measured_gib"]
    of_plan = "nothing was planned" if planned is None else f"{planned:.2f} GiB"
    if memory["measures"] == "process":
        return (
            f"memory: the plan counts {of_plan} of tensors a rank; a process took {measured:.2f} GiB at its most, "
            "with its libraries and the pages of its files"
        )
    error = f" ({memory['memory_error']:+.0%})" if "memory_error" in memory else ""
    early = "; loading or the held-out loss took as much" if measured <= memory["before_gib"] else ""
    return f"memory: {measured:.2f} GiB of tensors at the peak of the worst rank, {of_plan} planned{error}{early}"
