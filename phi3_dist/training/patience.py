"""When a run has learned what it will: evaluations in a row that bring too little end it early."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from phi3_dist.config.schema import TrainConfig

__all__ = ["Patience"]


class Patience:
    """Counts held-out losses that are not `train.min_improvement` below the best before them, a NaN among them.

    Every rank sees the same losses and decides the same. What `state` gives stands in each checkpoint, so that a
    resumed run ends at the same step; a loss that is measured again after a start counts once.
    """

    def __init__(self, cfg: TrainConfig, saved: Mapping[str, Any] | None = None) -> None:
        """`saved` is what `state` gave when a checkpoint was written."""
        self._patience, self._least = cfg.patience, cfg.min_improvement
        state = saved or {}
        self._best = float(state["best"]) if state.get("best") is not None else math.inf
        self._waited, self._step = int(state.get("waited", 0)), int(state.get("step", -1))

    def state(self) -> dict[str, Any]:
        return {"best": self._best if math.isfinite(self._best) else None, "waited": self._waited, "step": self._step}

    def saw(self, step: int, loss: float) -> None:
        """Take in the held-out loss after `step`."""
        if step <= self._step:
            return
        self._step = step
        if loss < self._best - self._least or (loss < self._best and not self._least):
            self._best, self._waited = loss, 0
        else:
            self._waited += 1

    def exhausted(self) -> bool:
        """Whether the run is to end."""
        return bool(self._patience) and self._waited >= self._patience

    def line(self, step: int) -> str:
        """Why the run ends, for a person."""
        least = f" by {self._least:g}" if self._least else ""
        return (
            f"ended early after step {step}: {self._waited} evaluations in a row have not improved on the held-out "
            f"loss {self._best:.4f}{least} (train.patience)"
        )
