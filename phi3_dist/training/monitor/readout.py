"""The numbers of a step, read one step late on a GPU: no card stands idle while a number is on its way to the host.

Every rank's loss, its stop signal and the gradient norm are exchanged on the device and copied to pinned memory behind
the step. They are read after the next step has been queued, in the same place on every rank, so that all ranks log,
skip and stop alike. Before an evaluation, a checkpoint and the end all are read.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phi3_dist.training.context import RunContext
from phi3_dist.training.monitor.bad_steps import Health
from phi3_dist.training.monitor.step_phases import peak_gib
from phi3_dist.training.train_step import StepResult

__all__ = ["STEPS_BEHIND", "EvaluationWatch", "StepReadout", "has_row"]

STEPS_BEHIND = {"cpu": 0, "cuda": 1}
"""Steps that may be under way while one is read. A CPU computes before it returns: there is nothing to wait for."""

BEAT_S = 30.0
"""Seconds without a heartbeat after which one is written, whether or not a step is logged."""


@dataclass(frozen=True)
class _Step:
    """A step under way. `numbers`, (ranks, 3) in float64 on the host once `ready`: loss, stop signal, gradient norm."""

    done: int
    result: StepResult
    numbers: Tensor
    ready: Any
    start_s: float
    """When it began, by time.perf_counter."""


def has_row(ctx: RunContext, done: int) -> bool:
    """Whether step `done` has a row in metrics.jsonl, if it is made."""
    return done % ctx.cfg.log.every == 0 or done in {1, ctx.total}


class EvaluationWatch:
    """Shows an evaluation while it goes on, on rank 0: how far, how long still, and a heartbeat."""

    def __init__(self, ctx: RunContext, step: int) -> None:
        self.ctx, self.step = ctx, step
        self._start_s = self._beaten = time.perf_counter()

    def progress(self, done: int, groups: int) -> None:
        """`done` of `groups` are measured."""
        if not self.ctx.runtime.is_main:
            return
        now = time.perf_counter()
        if now - self._beaten > BEAT_S:
            self._beaten = now
            self.ctx.folder.heartbeat(self.step)
        self.ctx.metrics.evaluating(done / groups, (now - self._start_s) / done * (groups - done))


class StepReadout:
    """Reads steps in their order: health first, then the log. `stop` is the signal that any rank has got, or 0."""

    def __init__(self, ctx: RunContext, health: Health) -> None:
        self.ctx, self.health = ctx, health
        self.stop = 0
        self._behind = STEPS_BEHIND[ctx.runtime.device.type]
        self._under_way: deque[_Step] = deque()
        self._read_at = self._beaten = 0.0

    def add(self, done: int, result: StepResult, start_s: float) -> None:
        """Take step `done`, begun at `start_s` (perf_counter), and read what is due. Collective."""
        runtime, device = self.ctx.runtime, self.ctx.runtime.device
        # a fill and no copy from the host, which would wait for the device
        signal = torch.full((), float(self.ctx.flag.signal), dtype=torch.float64, device=device)
        mine = torch.stack((result.nll.double(), signal, result.grad_norm.double().to(device)))
        gathered = [mine]
        if runtime.world > 1:
            gathered = [torch.empty_like(mine) for _ in range(runtime.world)]
            torch.distributed.all_gather(gathered, mine)
        numbers, ready = torch.stack(gathered), None
        if device.type == "cuda":
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            numbers = host.copy_(numbers, non_blocking=True)
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        self._under_way.append(_Step(done, result, numbers, ready, start_s))
        self.read(self._behind)

    def read(self, behind: int = 0) -> None:
        """Read all steps but the newest `behind`. Raises TrainingError as `Health.check` does."""
        while len(self._under_way) > behind:
            self._read(self._under_way.popleft())

    def _read(self, step: _Step) -> None:
        if step.ready is not None:
            step.ready.synchronize()
        nlls, signals, norms = step.numbers.T.tolist()
        self.stop = self.stop or int(max(signals))
        loss = sum(nlls) / step.result.supervised_tokens
        # every rank has the same norm, and DeepSpeed's own number is none on some when it is none on others
        grad_norm = norms[self.ctx.runtime.rank]
        made = self.health.check(step.done, step.result, nlls, loss, grad_norm)
        now = time.perf_counter()
        step_s = now - max(step.start_s, self._read_at)
        self._read_at = now
        self.ctx.time_left.step(step_s)
        logged = made and has_row(self.ctx, step.done)
        if logged:
            self._log(step, loss, grad_norm, step_s)
        if self.ctx.runtime.is_main and (logged or now - self._beaten > BEAT_S):
            self._beaten = now
            self.ctx.folder.heartbeat(step.done)

    def _log(self, step: _Step, loss: float, grad_norm: float, step_s: float) -> None:
        ctx, result = self.ctx, step.result
        ctx.metrics.train(
            {
                "step": step.done,
                "epoch": round(step.done * ctx.order.global_batch / len(ctx.train.packs), 4),
                "loss": loss,
                "lr": result.lr,
                "grad_norm": grad_norm,
                "step_s": round(step_s, 4),
                "supervised_tokens": result.supervised_tokens,
                "tokens": result.tokens,
                "supervised_tokens_per_s": round(result.supervised_tokens / step_s, 1),
                "tokens_per_s": round(result.tokens / step_s, 1),
                **(result.seconds() if result.seconds else {}),
                "peak_gib": peak_gib(ctx.runtime.device),
            },
            ctx.time_left.left_s(step.done),
        )
