"""What adapters and checkpoints share when they write: tensors under the user's umask, the flush, the checksum."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from phi3_dist.machine.storage import as_os_error

__all__ = ["failed_copy", "file_sha256", "sync", "write_tensors"]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file with the user's umask: safetensors 0.8 gives its files mode 600, whoever else may read them.

    Raises OSError; a disk that is full, which safetensors reports as an error of its own, included.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise as_os_error(error) from error
    path.chmod(stat.S_IMODE(mode))


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def failed_copy(error: OSError | ValueError) -> str:
    """Why a folder can't be copied, in words. `shutil.copytree` lists every file that failed: the first one's."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        _, _, why = error.args[0][0]
        return re.sub(r"^\[Errno \d+\] (.*?)(: '.*)?$", r"\1", str(why))
    return getattr(error, "strerror", None) or str(error)
