"""What an inode says of a file: enough to tell that somebody touched it since.

Size and times of change can be put back by whoever restores a file; the inode's own time (ctime) and number can't.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

__all__ = ["State", "changed_files", "settled", "state_of", "states_of"]

State = list[int]
"""Size, time of change, inode's time of change (both in ns), inode. No device: another node may number it otherwise."""
_TICK_NS = 2 * 10**9


def state_of(path: Path) -> State:
    """Raises OSError where it is not there."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def states_of(paths: Iterable[Path]) -> dict[str, State]:
    """The state of each file by its path; an empty one for a file that is not there."""
    found: dict[str, State] = {}
    for path in paths:
        try:
            found[str(path.absolute())] = state_of(path)
        except OSError:
            found[str(path.absolute())] = []
    return found


def changed_files(before: dict[str, State]) -> list[str]:
    """The files that are no longer as they were."""
    return [path for path, state in before.items() if states_of([Path(path)]).get(path) != state]


def settled(states: dict[str, State]) -> bool:
    """Whether no file was touched within the last 2 s: one more change could fall into the same tick of its time."""
    return all(state and time.time_ns() - max(state[1], state[2]) > _TICK_NS for state in states.values())
