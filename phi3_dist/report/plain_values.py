"""What other programs, disks and crashes left of a run's files, as plain values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

__all__ = ["LARGEST_STEP", "count", "finite", "number", "parse", "printable", "read_object"]

LARGEST_STEP = 10**12
_BYTES_AT_MOST = 64 * 2**20


def parse(text: str | bytes) -> Any:
    """The value in a piece of JSON. Raises ValueError for whatever is none, nested too deep included."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def read_object(path: Path) -> tuple[dict[str, Any], str]:
    """The JSON object in a file, and what is wrong with it. No file is an empty object, and right."""
    try:
        with path.open("rb") as file:
            raw = file.read(_BYTES_AT_MOST + 1)
        if len(raw) > _BYTES_AT_MOST:
            return {}, f"larger than {_BYTES_AT_MOST // 2**20} MiB"
        value = parse(raw)
    except FileNotFoundError:
        return {}, ""
    except OSError as error:
        return {}, f"cannot be read: {error.strerror or error}"
    except ValueError as error:
        return {}, f"is not JSON: {error}"
    return (value, "") if isinstance(value, dict) else ({}, "is not a JSON object")


def number(value: object) -> float | None:
    """A number that can be drawn and written, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def finite(value: object) -> float | None:
    """As `number`, and no infinity."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def count(value: object) -> int | None:
    """A number of steps, or None."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_STEP:
        return None
    return value


def printable(text: object) -> str:
    """Text for one line of a terminal: what would move its cursor, colour it or can't be encoded is written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))
