"""Numbers that go wrong: steps that are skipped because a number in them is none, and losses that jump."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from phi3_dist.errors import Problem, TrainingError
from phi3_dist.training.context import RunContext
from phi3_dist.training.train_step import StepResult

__all__ = ["Health", "spike_limit"]

WINDOW, ENOUGH, SIGMAS = 50, 20, 6.0
ROWS_SHOWN = 8


def spike_limit(losses: Sequence[float]) -> float:
    """Mean plus six standard deviations (of the population); infinity before there are 20 losses to judge by."""
    if len(losses) < ENOUGH:
        return math.inf
    return statistics.fmean(losses) + SIGMAS * statistics.pstdev(losses)


def _rows_of(ctx: RunContext, packs: Sequence[int]) -> str:
    places = [ctx.train.rows.places[row] for pack in packs for row in ctx.train.packs[pack]]
    return ", ".join(places[:ROWS_SHOWN]) + (
        f" and {len(places) - ROWS_SHOWN} more" if len(places) > ROWS_SHOWN else ""
    )


class Health:
    """Counts skipped steps and watches the last 50 losses. Every rank sees the same numbers and decides the same.

    The engines (engines/backward_and_update.py) have made no update in a step whose gradient norm is not finite.
    """

    def __init__(self, ctx: RunContext, saved: Mapping[str, Any] | None = None) -> None:
        """`saved` is what `state` gave when a checkpoint was written."""
        self.ctx = ctx
        self.skipped = int((saved or {}).get("skipped", 0))
        self.in_a_row = int((saved or {}).get("in_a_row", 0))
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def state(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def check(self, done: int, result: StepResult, nlls: Sequence[float], loss: float, grad_norm: float) -> bool:
        """Whether step `done` was made. `nlls`: each rank's summed negative log likelihood; `loss`: the global mean.

        Raises TrainingError after `train.max_bad_steps` skipped steps in a row, and for a first step in which no
        gradient reaches the adapter.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._skip(done, result, nlls, loss, grad_norm)
            return False
        if done == 1 and grad_norm == 0:
            what, fix = "no gradient reaches the adapter", "this is a fault of the set-up: please report it"
            raise TrainingError(Problem("step 1", what, fix))
        self.in_a_row = 0
        limit = spike_limit(self._losses)
        if loss > limit:
            rows = _rows_of(self.ctx, result.packs)
            self.ctx.metrics.note("spike", {"step": done, "loss": loss, "limit": limit, "rows": rows})
            self.ctx.metrics.say(
                f"step {done}: loss {loss:.4f} jumps above {limit:.4f} (mean + 6 sd of the last {len(self._losses)}), "
                f"in rows {rows}"
            )
        self._losses.append(loss)
        return True

    def _skip(self, done: int, result: StepResult, nlls: Sequence[float], loss: float, grad_norm: float) -> None:
        ctx = self.ctx
        self.skipped += 1
        self.in_a_row += 1
        bad = [rank for rank, nll in enumerate(nlls) if not math.isfinite(nll)]
        micro, world = ctx.runtime.plan.micro_batch, len(nlls)
        packs = [
            pack for rank in bad for slot in ctx.order.slots(done - 1, rank, world, micro) for pack in slot
        ] or result.packs
        ranks = f"rank {', '.join(map(str, bad))}" if bad else "the sum over ranks"
        what = f"loss {loss}, gradient norm {grad_norm}, on {ranks}, in rows {_rows_of(ctx, packs)}"
        ctx.metrics.note(
            "skipped",
            {
                "step": done,
                "loss": str(loss),  # JSON has no word for a number that is none
                "grad_norm": str(grad_norm),
                "ranks": bad,
                "rows": _rows_of(ctx, packs),
                "skipped_steps": self.skipped,
            },
        )
        if self.in_a_row >= ctx.cfg.train.max_bad_steps:
            raise TrainingError(
                Problem(
                    f"step {done}",
                    f"{what}; {self.in_a_row} such steps in a row",
                    "look at the rows, lower optim.lr, or model.precision=fp32; train.max_bad_steps is the limit",
                )
            )
        ctx.metrics.say(f"step {done} skipped: {what}")
