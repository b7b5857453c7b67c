"""How much of the spread of a sweep's losses goes with each key that differs, and how often chance does as well.

Plain sums over a handful of candidates: what they can't tell, two keys that always change together, or a key of which
no value occurs twice and that has no order, is said and not guessed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Importance", "importance_of"]

SHUFFLES = 999
_LEAST = 4
"""Candidates below which nothing is told: four numbers can be put in order in too few ways."""


@dataclass(frozen=True)
class Importance:
    """One key. `share` of the losses' variance, from 0 to 1, None where it can't be told; `chance`: the share of
    shuffled losses that do as well; `best` is the value with the least mean loss, that mean, and of how many."""

    key: str
    share: float | None
    chance: float | None
    best: tuple[str, float, int]
    note: str


def importance_of(values: Mapping[str, Sequence[object]], losses: Sequence[float]) -> list[Importance]:
    """Of each key, whose values stand in the order of `losses`; those that explain most come first."""
    found = [_one(key, of, losses, values) for key, of in values.items()]
    return sorted(found, key=lambda one: -(one.share if one.share is not None else -1.0))


def _one(key: str, of: Sequence[object], losses: Sequence[float], values: Mapping[str, Sequence[object]]) -> Importance:
    groups = _numbered(of)
    best = _best(of, groups, losses)
    alike = [other for other, theirs in values.items() if other != key and _numbered(theirs) == groups]
    note = f"always changes together with {', '.join(alike)}" if alike else ""
    count, kinds = len(losses), len(set(groups))
    if count < _LEAST or len(set(losses)) < 2:
        return Importance(key, None, None, best, "too few candidates to tell")
    if kinds < count:
        share, chance = _by_chance(losses, lambda of_losses: _between(groups, of_losses))
        within = (1 - share) * _spread(losses) / (count - kinds)
        total = _spread(losses)
        # omega squared: what groups explain beyond what as many groups explain of noise
        adjusted = (share * total - (kinds - 1) * within) / (total + within) if total + within else 0.0
        return Importance(key, min(1.0, max(0.0, adjusted)), chance, best, note)
    numbers = [v for v in of if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < count:
        return Importance(key, None, None, best, "no value occurs twice, and they have no order")
    ranks = _ranks(numbers)
    share, chance = _by_chance(losses, lambda of_losses: _correlation(ranks, _ranks(of_losses)) ** 2)
    up = _correlation(ranks, _ranks(losses)) > 0
    trend = f"no value occurs twice: judged by order alone, {'lower' if up else 'higher'} is better"
    return Importance(key, share, chance, best, f"{trend}; {note}" if note else trend)


def _numbered(of: Sequence[object]) -> list[int]:
    """The values as numbers of groups, in the order in which they first occur."""
    known: dict[str, int] = {}
    return [known.setdefault(repr(value), len(known)) for value in of]


def _best(of: Sequence[object], groups: Sequence[int], losses: Sequence[float]) -> tuple[str, float, int]:
    means = []
    for group in dict.fromkeys(groups):
        mine = [loss for loss, g in zip(losses, groups, strict=True) if g == group]
        means.append((sum(mine) / len(mine), len(mine), str(of[groups.index(group)])))
    mean, count, value = min(means)
    return value, mean, count


def _spread(losses: Sequence[float]) -> float:
    mean = sum(losses) / len(losses)
    return sum((loss - mean) ** 2 for loss in losses)


def _between(groups: Sequence[int], losses: Sequence[float]) -> float:
    """The share of the variance that lies between the groups."""
    mean, sums, counts = sum(losses) / len(losses), dict.fromkeys(groups, 0.0), dict.fromkeys(groups, 0)
    for group, loss in zip(groups, losses, strict=True):
        sums[group] += loss
        counts[group] += 1
    between = sum(counts[g] * (sums[g] / counts[g] - mean) ** 2 for g in counts)
    return between / _spread(losses)


def _by_chance(losses: Sequence[float], measure: object) -> tuple[float, float]:
    """What `measure` says of the losses, and how often it says as much of the same ones shuffled."""
    assert callable(measure)
    measured: float = measure(losses)
    draw, mixed = random.Random(0), list(losses)
    as_much = 0
    for _ in range(SHUFFLES):
        draw.shuffle(mixed)
        as_much += measure(mixed) >= measured - 1e-12
    return measured, (1 + as_much) / (1 + SHUFFLES)


def _ranks(values: Sequence[float]) -> list[float]:
    """Places from 0 on; equal values share the mean of theirs."""
    order = sorted(values)
    return [order.index(value) + (order.count(value) - 1) / 2 for value in values]


def _correlation(one: Sequence[float], other: Sequence[float]) -> float:
    mean_one, mean_other = sum(one) / len(one), sum(other) / len(other)
    pairs = [(a - mean_one, b - mean_other) for a, b in zip(one, other, strict=True)]
    scale = (sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs)) ** 0.5
    return sum(a * b for a, b in pairs) / scale if scale else 0.0
