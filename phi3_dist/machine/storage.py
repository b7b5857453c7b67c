"""Where things are kept between runs, and what a file system means by its error: each with what a user can do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

from phi3_dist.errors import MachineError, Problem

__all__ = [
    "CACHE_FIX",
    "DENIED",
    "NO_LOCKS",
    "SHM_BYTES_OF_A_RANK",
    "as_os_error",
    "cache_folder",
    "home_folder",
    "shared_memory_bytes",
    "shared_memory_problem",
    "storage_fault",
]

DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
"""What is here may be read, and not written."""
NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})
"""A file system that locks nothing: whoever needs no lock may go on."""
CACHE_FIX = "set XDG_CACHE_HOME, or data.cache in the run file, to a folder of your own"
_LOCAL = "keep it on a local disk"
_FAULTS: Mapping[int, tuple[str, str]] = {
    errno.EACCES: ("may not be written by this user", ""),
    errno.EPERM: ("may not be written by this user", ""),
    errno.EROFS: ("lies on a file system that is read-only", ""),
    errno.ENOSPC: ("its file system is full, of bytes or of files", "make room there"),
    errno.EDQUOT: ("your quota there is used up", "make room there"),
    errno.ENOLCK: ("its file server gives out no locks (ENOLCK)", f"let its lock service (lockd) run, or {_LOCAL}"),
    errno.EOPNOTSUPP: ("its file system has no locks (EOPNOTSUPP)", f"mount it with locks, or {_LOCAL}"),
    errno.ENOSYS: ("its file system has no locks (ENOSYS)", f"mount it with locks (Lustre: -o flock), or {_LOCAL}"),
    errno.ESTALE: ("its file server no longer knows it (ESTALE): removed there, or exported again", "mount it again"),
    errno.ENAMETOOLONG: ("is longer than a file's name can be there", "shorten it"),
    errno.ENOTDIR: ("has a file where a folder is needed", "name another folder"),
    errno.EEXIST: ("has a file where a folder is needed", "name another folder"),
    errno.EIO: ("its disk or file server failed (EIO)", "look into the system's log"),
}
SHM_BYTES_OF_A_RANK = 66 * 2**20
"""Of DeepSpeed's shared memory between the ranks of a node: `struct allreduce_workspace` in csrc/cpu/comm/shm.cpp."""


def storage_fault(error: OSError, fix: str = "") -> tuple[str, str]:
    """(what, fix) in words for what the system says. `fix` is the caller's way out, beside the system's own."""
    what, own = _FAULTS.get(error.errno or 0, (f"{error.strerror or error}", ""))
    return what, ", or ".join(part for part in (own, fix) if part)


def as_os_error(error: Exception) -> OSError:
    """What a library written in Rust says of the system, as the system's own error: `… (os error 28)`."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found is None:
        return OSError(str(error))
    number = int(found[1])
    return OSError(number, os.strerror(number))


def home_folder() -> Path | None:
    """The user's home; None where there is none: a uid without a passwd entry, and no HOME, as in containers."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home.is_absolute() else None


def cache_folder(named: str | None = None) -> Path:
    """Where tokens and hashes of weights are kept between runs.

    `named` (the run file's `data.cache`), else `$XDG_CACHE_HOME/phi3_dist`, else below ~/.cache. Raises MachineError
    where none of them is known.
    """
    if named:
        return Path(named)
    asked, home = os.environ.get("XDG_CACHE_HOME"), home_folder()
    if asked:
        return Path(asked) / "phi3_dist"
    if home is None:
        what = f"user {os.getuid()} has no home folder here: HOME is not set, and there is no passwd entry"
        raise MachineError(Problem("cache", what, CACHE_FIX))
    return home / ".cache" / "phi3_dist"


def shared_memory_bytes(folder: str = "/dev/shm") -> int | None:
    """Bytes that processes may share; None where there is no such place. In use or not: ranks start one by one."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_frsize * found.f_blocks


def shared_memory_problem(ranks: int, size: int | None) -> Problem | None:
    """What is wrong where DeepSpeed's ranks on CPUs would meet in `size` bytes: they die of SIGBUS, without a word."""
    needed = ranks * SHM_BYTES_OF_A_RANK
    if size is None or size >= needed:
        return None
    what = f"has {size / 2**20:.0f} MiB, and DeepSpeed's {ranks} ranks on this node share {needed / 2**20:.0f} MiB"
    return Problem("/dev/shm", what, "start the container with --shm-size=1g or --ipc=host, or use ddp")
