"""How wide a claim is: intervals by drawing rows anew, the same ones for both sides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Difference", "paired"]

SAMPLES, SHARE = 2000, 0.95


@dataclass(frozen=True)
class Difference:
    """One side's mean less the other's, and where it lies in 95 % of the draws."""

    value: float
    low: float
    high: float

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def paired(
    ours_R: NDArray[np.float64],
    theirs_R: NDArray[np.float64],
    weights_R: NDArray[np.float64] | None = None,
    seed: int = 0,
) -> Difference:
    """The paired percentile bootstrap (Efron 1979) over rows of the same prompts.

    A side's mean is its sum over rows divided by the sum of `weights_R` (by default 1 each): supervised tokens for a
    loss. Each draw weighs every row by how often it came.
    """
    count = len(ours_R)
    weights_R = np.ones(count) if weights_R is None else weights_R
    differences_R = ours_R - theirs_R
    value = float(differences_R.sum() / weights_R.sum())
    random = np.random.default_rng(seed)
    drawn = np.empty(SAMPLES)
    for sample in range(SAMPLES):
        often_R = np.bincount(random.integers(0, count, count), minlength=count)
        drawn[sample] = (often_R @ differences_R) / (often_R @ weights_R)
    low, high = np.quantile(drawn, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return Difference(value, float(low), float(high))
