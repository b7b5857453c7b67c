"""Numbers and values in the words of a page."""

from __future__ import annotations

from collections.abc import Mapping

from phi3_dist.report.plain_values import finite, number

__all__ = ["bytes_of", "duration", "gib", "many", "shown"]

_LONGEST = 4000
_A_MILLENNIUM_S = 3.2e10


def shown(item: object) -> str:
    """A cell of a table."""
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, int | float):
        return _number(item)
    if isinstance(item, list):  # a prompt is a list of messages
        return "\n".join(shown(part) for part in item[:200])
    if isinstance(item, Mapping):
        return _mapping(item)[:_LONGEST]
    return "" if item is None else str(item)[:_LONGEST]


def _number(item: int | float) -> str:
    """Four significant digits of a fraction, thousands apart."""
    value = number(item)
    if value is None:
        return "too large"  # Python refuses to print a whole number of thousands of digits
    if isinstance(item, int) and abs(value) < 1e15:
        return f"{item:,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def _mapping(item: Mapping[object, object]) -> str:
    if {"role", "content"} <= item.keys():
        return f"{item['role']}: {item['content']}"
    value = item.get("value", item.get("mean"))
    if {"low", "high"} <= item.keys() and value is not None:
        return f"{shown(value)} ({shown(item['low'])} to {shown(item['high'])})"
    return "\n".join(f"{key}: {shown(inner)}" for key, inner in list(item.items())[:200])


def duration(seconds: float) -> str:
    if abs(seconds) < 1:
        return f"{seconds * 1000:.3g} ms"
    if not abs(seconds) < _A_MILLENNIUM_S:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.3g} s"


def gib(value: object) -> str:
    """GiB with three digits, MiB below a tenth of one; empty for what is not a number."""
    found = finite(value)
    if found is None:
        return ""
    return f"{found:.3g} GiB" if found >= 0.1 else f"{found * 1024:.3g} MiB"


def many(value: object) -> str:
    """A count as people say it: 812, 3,012, 13.3 k, 3.82 B; empty for what is not a number."""
    found = finite(value)
    if found is None:
        return ""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(found) >= size:
            return f"{found / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{found:,.0f}"


def bytes_of(size: int) -> str:
    return f"{size:,} bytes" if size < 1e5 else f"{size / 1e6:,.1f} MB"
