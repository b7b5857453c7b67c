"""JSON of files that others wrote: damage of every kind is a ValueError."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["parse_json"]


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, for thousands of open brackets too (`json`: RecursionError)."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it nests too deep to be read") from error
