"""A worker of a benchmark that ends at once. In a module of its own: its process imports this file, and no torch."""

from __future__ import annotations

from typing import Any


def dies(pipe: Any, _folder: Any, _shape: Any, name: str, _length: int) -> None:
    """As one does without bitsandbytes."""
    raise ImportError(f"no module for {name}")
