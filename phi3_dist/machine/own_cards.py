"""This machine's GPUs as their driver lists them, without importing torch."""

from __future__ import annotations

import shutil
import subprocess

__all__ = ["own_cards"]


def own_cards() -> tuple[tuple[str, float], ...]:
    """Name and GiB of each card; empty without `nvidia-smi`, or where it finds none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    question = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(question, capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return cards_of(done.stdout) if done.returncode == 0 else ()


def cards_of(listing: str) -> tuple[tuple[str, float], ...]:
    """The cards in nvidia-smi's listing, whose memory is in MiB; lines of another form are no cards."""
    found = []
    for line in listing.splitlines():
        name, _, size = line.rpartition(",")
        if name and size.strip().isdecimal():
            found.append((name.strip(), int(size) / 1024))
    return tuple(found)
