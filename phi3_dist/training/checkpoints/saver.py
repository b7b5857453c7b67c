"""Saving while training: when, how long it stood still, and what a failed save means."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from phi3_dist.errors import Problem, RunFolderError, TrainingError
from phi3_dist.training.checkpoints.files import Checkpoint, CheckpointPruner, verify, write_checkpoint
from phi3_dist.training.checkpoints.state import export_state, restore
from phi3_dist.training.context import RunContext
from phi3_dist.training.held_out_loss import HeldOut
from phi3_dist.training.monitor.bad_steps import Health

__all__ = ["Saver"]


class Saver:
    """Writes checkpoints of one run. A failed one is told and tried again at the next interval; the run goes on."""

    def __init__(self, ctx: RunContext, health: Health, checkpoint: Checkpoint | None) -> None:
        """`checkpoint` is the one that the run goes on from: it knows which one has been the best so far."""
        self.ctx, self.health = ctx, health
        self.failed: str | None = None
        self.saves = 0
        self.stood_s = 0.0
        self.start_s = time.perf_counter()
        best = checkpoint.trainer.get("best") if checkpoint else None
        self._pruner = CheckpointPruner(checkpoint.folder if checkpoint else None)
        self._best: tuple[float, int] | None = (float(best[0]), int(best[1])) if best else None

    def due(self, done: int, held_out: HeldOut | None = None, *, early: bool = False) -> bool:
        """Whether a checkpoint of `done` steps is wanted; `held_out` is the loss after them, if it was measured.

        With `save.final: best` every best loss so far is kept; the last step is, `early` or not.
        """
        every = self.ctx.cfg.save.every
        if not every:
            return False
        best = self.ctx.cfg.save.final == "best" and held_out is not None and self._improves(held_out.loss)
        return done % every == 0 or done == self.ctx.total or best or early

    def _improves(self, loss: float) -> bool:
        return math.isfinite(loss) and (self._best is None or loss < self._best[0])

    @property
    def best(self) -> tuple[float, int] | None:
        """The lowest held-out loss of all checkpoints so far, and its step."""
        return self._best

    def save(self, done: int, held_out: HeldOut | None) -> None:
        """Write the checkpoint of `done` steps. Collective; only rank 0 holds the state and writes.

        `held_out` is the loss after just these steps, None where none was measured: an older one says nothing of them.
        """
        ctx, start_s = self.ctx, time.perf_counter()
        if self.health.skipped == done:
            ctx.metrics.say(f"no checkpoint of step {done}: every step was skipped, so there is nothing to keep")
            return
        before = self._best
        if held_out is not None and self._improves(held_out.loss):
            self._best = (held_out.loss, done)
        state = export_state(ctx.engine, keep=ctx.runtime.is_main)
        error: list[str | None] = [None]
        if ctx.runtime.is_main:
            trainer = {
                "identity": dict(ctx.identity),
                "world_size": ctx.runtime.world,
                "strategy": ctx.runtime.plan.strategy,
                "heldout_loss": held_out.loss if held_out and math.isfinite(held_out.loss) else None,
                "patience": ctx.patience.state(),
                "best": self._best,
                "health": self.health.state(),
            }
            error = [self._write(done, state, trainer)]
        if ctx.runtime.world > 1:
            torch.distributed.broadcast_object_list(error)
        self.failed = error[0]
        took = time.perf_counter() - start_s
        self.stood_s += took
        if self.failed is None:
            self.saves += 1
            size = sum(t.nbytes for t in state.values())
            ctx.metrics.save({"step": done, "save_s": round(took, 4), "save_bytes": size})
        else:
            self._best = before
            ctx.metrics.say(f"checkpoint of step {done} not written: {self.failed}; trying again at the next one")

    def _write(self, done: int, state: Mapping[str, Tensor], trainer: Mapping[str, Any]) -> str | None:
        """Write and prune, on rank 0. What went wrong, or None."""
        ctx, where = self.ctx, self.ctx.folder.checkpoints
        if moved := ctx.folder.moved():
            ctx.metrics.say(moved)
        try:
            root = ctx.folder.held / "checkpoints"
            written = write_checkpoint(root, done, state, trainer)
            if not self._pruner.verifies(written):
                return f"{where / written.name}: {verify(written)}"
            best = self._best[1] if self._best else None
            for line in self._pruner.prune(root, ctx.cfg.save.keep, best, done):
                ctx.metrics.say(line)
        except OSError as problem:
            return f"{where}: {problem.strerror or problem}"
        except RunFolderError as problem:
            return f"{problem.problems[0].where}: {problem.problems[0].what}"
        return None

    def report(self, done: int) -> None:
        """How long training stood still for its checkpoints, and the share of this run's time so far."""
        if not self.saves:
            return
        run_s = time.perf_counter() - self.start_s
        row = {"step": done, "saves": self.saves, "stood_s": round(self.stood_s, 4), "run_s": round(run_s, 3)}
        self.ctx.metrics.note("saves", row)
        self.ctx.metrics.say(
            f"checkpoints: {self.saves}, during which training waited {self.stood_s:.2f} s of {run_s:.1f} s "
            f"({self.stood_s / run_s:.1%})"
        )

    def settle_on_final(self, done: int, held_out: HeldOut | None) -> tuple[int, HeldOut | None]:
        """Set the model to the state that becomes the adapter: its step, and its held-out loss where one is known.

        Raises TrainingError where the best checkpoint has been damaged. Collective.
        """
        ctx = self.ctx
        if ctx.cfg.save.final == "best" and self._best is not None and self._best[1] != done:
            loss, step = self._best
            where = ctx.folder.held / "checkpoints" / f"step_{step:06d}"
            found = verify(where)
            if not isinstance(found, Checkpoint):
                what = f"was the best by held-out loss ({loss:.4f}), and can't be used: {found}"
                raise TrainingError(Problem(where.name, what, "--resume with save.final=last takes the last step's"))
            restore(ctx.engine, found)
            ctx.metrics.say(f"adapter: that of step {step} of {done}, whose held-out loss is the lowest, {loss:.4f}")
            return step, HeldOut.of_checkpoint(loss)
        if ctx.cfg.save.final == "best" and self._best is None:
            ctx.metrics.say(f"adapter: that of the last step, {done}: no checkpoint has a held-out loss")
        if held_out is None and self._best is not None and self._best[1] == done:
            held_out = HeldOut.of_checkpoint(self._best[0])
        return done, held_out

    def finish(self) -> None:
        """Raises TrainingError, on every rank, when the last checkpoint could not be written."""
        if self.failed is not None:
            raise TrainingError(
                Problem(
                    "the last checkpoint", f"could not be written: {self.failed}", "make room; the adapter is written"
                )
            )
