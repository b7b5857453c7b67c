"""A folder that takes its name when it is whole, compared and on the disk, and not before."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from phi3_dist.adapters.durable_files import file_sha256, sync
from phi3_dist.errors import AdapterError, Problem

__all__ = ["new_folder", "seal"]

SUMS = "checksums.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHORT_WRITE = "requested and"
"""NumPy's words for a full disk: `2048 requested and 0 written`, without a number."""
_FULL_IN_WORDS = (*map(os.strerror, _FULL), _SHORT_WRITE)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write to, which takes that name at the end of the block.

    On an error, and after a kill at the next call for the same target, nothing is left of it. Raises AdapterError for a
    target that exists or can't be written.
    """
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise AdapterError(Problem(str(target), "exists", "choose another folder, or remove it"))
    partial = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _drop_dead(target)
        partial.mkdir()
        try:
            yield partial
            for path in sorted(partial.rglob("*")):
                sync(path)
            sync(partial)
            if target.is_dir():
                target.rmdir()
            partial.rename(target)
            sync(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError, shutil.Error) as error:
        cause = getattr(error, "strerror", None) or str(error)
        full = getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _FULL_IN_WORDS)
        cause = "No space left on device" if full and _SHORT_WRITE in cause else cause
        fix = "free some space, or raise the quota" if full else "choose a folder that can be written"
        raise AdapterError(Problem(str(target), f"cannot be written: {cause}", fix)) from error


def _drop_dead(target: Path) -> None:
    """Remove what writers of this target have left that live no more."""
    for path in target.parent.glob(f"{target.name}.tmp-*"):
        found = re.fullmatch(re.escape(target.name) + r"\.tmp-(\d+)", path.name)
        if found and path.is_dir() and not path.is_symlink() and not _lives(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def _lives(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def seal(folder: Path) -> None:
    """Write SHA-256 of each file in `folder` to checksums.json."""
    sums = {p.relative_to(folder).as_posix(): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    (folder / SUMS).write_text(json.dumps({"sha256": sums}, indent=2) + "\n", encoding="utf-8")
