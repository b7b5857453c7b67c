"""What tells one process from all others: its number is given to another once it has ended."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

__all__ = ["lives", "where_pids_count", "who"]


def where_pids_count() -> str:
    """The boot of this machine and the namespace in which its process numbers mean something; empty if not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process, which no change of the clock touches; None: there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()  # the name before may hold anything
    return None if fields[0] in {b"Z", b"X"} else int(fields[19])


def who() -> dict[str, Any]:
    """This process, for a file that others read."""
    return {"pid": os.getpid(), "pid_counts_in": where_pids_count(), "pid_began_at_tick": _started(os.getpid())}


def lives(mark: dict[str, Any]) -> bool | None:
    """Whether the process of a mark that `who` made still runs; None where that can't be told from here."""
    pid, place, began = mark.get("pid"), mark.get("pid_counts_in"), mark.get("pid_began_at_tick")
    if not place or place != where_pids_count() or not isinstance(pid, int) or isinstance(pid, bool):
        return None
    found = _started(pid)
    return found is not None and (began is None or found == began)
