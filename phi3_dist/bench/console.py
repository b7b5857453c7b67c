"""What a benchmark prints: line by line, seen at once through a pipe too."""

from __future__ import annotations

import sys

__all__ = ["say"]


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
