"""What halving would have ended, computed from the losses of a sweep that ran to its end."""

from __future__ import annotations

from phi3_dist.bench.halving import replay
from phi3_dist.sweep.file import EarlyConfig

CURVES = {
    "slow_start": {2: 5.0, 4: 4.0, 8: 1.0, 16: 0.5},
    "steady": {2: 3.0, 4: 2.5, 8: 2.0, 16: 1.5},
    "early_bird": {2: 2.0, 4: 2.0, 8: 2.0, 16: 2.0},
    "diverged": {2: float("nan")},
}


def test_the_losses_of_a_whole_sweep_give_the_decisions_of_one_that_halves() -> None:
    early = EarlyConfig(rule="halving", keep=0.5, first=1, floor=1)
    first, second = replay(early, 2, CURVES, 16)
    assert (first.step, first.ended) == (2, ("slow_start", "diverged"))  # the best of all at the end: a wrong decision
    assert (second.step, second.kept) == (4, ("early_bird",))


def test_a_floor_and_a_late_first_rung_keep_the_one_that_starts_slowly() -> None:
    late = EarlyConfig(rule="halving", keep=0.5, first=4, floor=2)
    (only,) = replay(late, 2, CURVES, 16)
    assert (only.step, only.kept) == (8, ("slow_start", "steady"))
