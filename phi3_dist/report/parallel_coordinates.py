"""Parallel coordinates: an upright axis for each key, and each candidate as a line through its values to its loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Axis", "Line", "Parallel", "parallel_of"]

AXIS_WIDTH, HEIGHT, TOP, BOTTOM = 170, 320, 46, 24
_TICKS = 9
_LOG_FROM = 10.0
"""Greatest over least value from which an axis is logarithmic."""


@dataclass(frozen=True)
class Axis:
    """One axis at `x`; `ticks` are (y, text)."""

    name: str
    x: float
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Line:
    """A candidate: `points` as SVG has them; `rank` from 0 (the best) to 1; `whole` if it was trained to its end."""

    name: str
    points: str
    rank: float
    whole: bool
    tooltip: str


@dataclass(frozen=True)
class Parallel:
    """What the template draws."""

    width: int
    height: int
    axes: tuple[Axis, ...]
    lines: tuple[Line, ...]


def parallel_of(
    names: Sequence[str], columns: Sequence[tuple[str, Sequence[object]]], whole: Sequence[bool]
) -> Parallel:
    """Lay out `columns`, each a name and a value by candidate; the last one is what they are ranked by, least first."""
    axes, places = [], []
    for i, (name, values) in enumerate(columns):
        x = AXIS_WIDTH / 2 + AXIS_WIDTH * i
        ys, ticks = _placed(values, even=i < len(columns) - 1)
        axes.append(Axis(name, x, ticks))
        places.append((x, ys))
    order = sorted(range(len(names)), key=lambda i: _number(columns[-1][1][i]))
    rank = {i: place / max(1, len(order) - 1) for place, i in enumerate(order)}
    lines = []
    for i in reversed(order):  # the best is drawn last, above the others
        said = "; ".join(f"{name} {_text(values[i])}" for name, values in columns)
        points = " ".join(f"{x:.1f},{ys[i]:.1f}" for x, ys in places)
        lines.append(Line(names[i], points, rank[i], whole[i], f"{names[i]}: {said}"))
    return Parallel(AXIS_WIDTH * len(columns), HEIGHT, tuple(axes), tuple(lines))


def _number(value: object) -> float:
    sound = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if sound else math.inf  # type: ignore[arg-type]


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _placed(values: Sequence[object], *, even: bool) -> tuple[list[float], tuple[tuple[float, str], ...]]:
    """The height of each value, the least at the bottom, and the ticks."""
    numbers = [_number(value) for value in values]
    if all(map(math.isfinite, numbers)):
        low, high = min(numbers), max(numbers)
        log = even and low > 0 and high / low >= _LOG_FROM
        at = [_share(n, low, high, log=log) for n in numbers]
        shown = sorted(set(numbers)) if even and len(set(numbers)) <= _TICKS else _between(low, high, log=log)
        ticks = [(_y(_share(n, low, high, log=log)), f"{n:.4g}") for n in shown]
        return [_y(share) for share in at], tuple(ticks)
    kinds = list(dict.fromkeys(_text(value) for value in values))
    share = {kind: (i + 0.5) / len(kinds) for i, kind in enumerate(kinds)}
    return [_y(share[_text(value)]) for value in values], tuple((_y(share[k]), _cut(k)) for k in kinds[: 2 * _TICKS])


def _share(number: float, low: float, high: float, *, log: bool) -> float:
    if high == low:
        return 0.5
    if log:
        return math.log(number / low) / math.log(high / low)
    return (number - low) / (high - low)


def _between(low: float, high: float, *, log: bool) -> list[float]:
    if high == low:
        return [low]
    shares = [i / 4 for i in range(5)]
    return [low * (high / low) ** s if log else low + s * (high - low) for s in shares]


def _y(share: float) -> float:
    return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)


def _cut(text: str) -> str:
    return text if len(text) <= 18 else f"{text[:17]}…"
