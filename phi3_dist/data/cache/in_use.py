"""Who has an entry of the token cache mapped: a shared lock on a file in it, for as long as its arrays live.

The system takes the lock back from a process that ends, however it ends, and a network file system with locks shows it
to other nodes. Where there are no locks, nothing is held, and only an entry's age keeps it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

__all__ = ["USED", "hold_while_alive", "is_in_use", "kept_from_others"]

USED = "used"
"""The file's name. Its time says when a run last read the entry."""
_TRIES, _PAUSE_S = 10, 0.01


def hold_while_alive(folder: Path, owner: object) -> None:
    """Mark the entry as in use until `owner` is collected; without the right to open its file, or locks, do nothing."""
    with contextlib.suppress(OSError):
        handle = os.open(folder / USED, os.O_RDONLY | os.O_CLOEXEC)
        for _ in range(_TRIES):  # whoever lists the cache has it for a moment
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_PAUSE_S)
            except OSError:
                break
            else:
                weakref.finalize(owner, os.close, handle)
                return
        os.close(handle)


@contextlib.contextmanager
def kept_from_others(folder: Path) -> Iterator[None]:
    """Within it nobody can begin to use the entry. Raises BlockingIOError where somebody does already."""
    try:
        handle = os.open(folder / USED, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:  # it was never finished, or an older version made it
        yield
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def is_in_use(folder: Path) -> bool:
    """Whether somebody has the entry mapped, as far as locks are shown here."""
    try:
        with kept_from_others(folder):
            return False
    except BlockingIOError:
        return True
    except OSError:  # another user's, or a file system without locks
        return False
