"""Processes that a launcher started: which of them are ranks, and which still live."""

from __future__ import annotations

from pathlib import Path

from tests import warm


def descendants(pid: int) -> list[int]:
    """Living children of a process, and theirs. In place of a client of `tests/warm`: the process it stands for."""
    pid = warm.forked(pid) or pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    processes = [warm.forked(int(child)) or int(child) for child in children]
    return [p for process in processes for p in (process, *descendants(process))]


def command_of(pid: int) -> bytes:
    """Its command line, words ended by zeros; empty for a zombie and for one that has gone.

    A forked process has its client's.
    """
    try:
        return Path(f"/proc/{warm.client(pid) or pid}/cmdline").read_bytes()
    except OSError:
        return b""


def lives(pid: int) -> bool:
    """Whether a process of ours still runs: neither gone, nor a zombie, nor another one under its old number."""
    return b"phi3_dist" in command_of(pid)


def ranks_below(pid: int) -> list[int]:
    """The ranks that a launcher started, in order. What a rank forks has its command line until it executes another."""
    ranks = [p for p in descendants(pid) if lives(p) and b"launch" not in command_of(p).split(b"\0")]
    return [p for p in ranks if not any(p in descendants(other) for other in ranks)]
