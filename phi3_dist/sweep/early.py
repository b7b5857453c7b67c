"""Who ends early: successive halving, a pure function of the held-out losses.

At rung n (from 0) every candidate has made `eval_every * first * 2**n` steps. Those with the lowest held-out losses go
on: the share `keep` of those still running, rounded up, and never fewer than `floor`. A NaN is the
worst; equal losses are told apart by the order of the candidates. Jamieson and Talwalkar, arXiv 1502.07943.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi3_dist.sweep.file import EarlyConfig

__all__ = ["Decision", "decide", "rung_step"]


@dataclass(frozen=True)
class Decision:
    """What was decided at a rung, and by which losses."""

    step: int
    losses: Mapping[str, float]
    kept: tuple[str, ...]
    ended: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        losses = {name: loss if math.isfinite(loss) else None for name, loss in self.losses.items()}
        return {"step": self.step, "losses": losses, "kept": list(self.kept), "ended": list(self.ended)}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Decision:
        losses = {name: math.nan if loss is None else float(loss) for name, loss in said["losses"].items()}
        return cls(int(said["step"]), losses, tuple(said["kept"]), tuple(said["ended"]))

    def why(self, name: str) -> str:
        """The reason why `name` ended, in one line."""
        order = sorted(self.losses, key=lambda one: _worth(self.losses[one]))
        place = order.index(name) + 1
        return (
            f"ended after step {self.step}: held-out loss {self.losses[name]:.4f} is number {place} of {len(order)}, "
            f"and {len(self.kept)} continue"
        )


def _worth(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def rung_step(early: EarlyConfig, eval_every: int, rung: int) -> int:
    """The steps made at rung `rung` (from 0)."""
    return int(eval_every * early.first * 2**rung)


def decide(early: EarlyConfig, step: int, losses: Mapping[str, float], order: Sequence[str]) -> Decision:
    """Who goes on after `step`. `losses`: of all that still run; `order`: every name, as the file has them."""
    ranked = sorted(losses, key=lambda name: (_worth(losses[name]), order.index(name)))
    count = max(early.floor, math.ceil(early.keep * len(ranked)))
    kept = ranked[:count]
    return Decision(
        step,
        dict(losses),
        tuple(name for name in order if name in kept),
        tuple(name for name in order if name in losses and name not in kept),
    )
