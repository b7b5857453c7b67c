"""Folders of arrays on disk: written once and piece by piece, checksummed, whole or not there, mapped when read.

NAME/
    facts.json      dtype, length and sha256 of each array, and what else is worth knowing
    ARRAY.bin       the array's bytes, little-endian
    stamp.json      sizes and times of the files when their checksums were last right
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from phi3_dist.config.json_text import parse_json
from phi3_dist.errors import DataError, Problem

__all__ = ["ALWAYS_VERIFIED_BYTES", "ArraysWriter", "open_arrays", "read_whole", "remove_unfinished", "write_whole"]

ALWAYS_VERIFIED_BYTES = 256 * 2**20
"""Folders up to this size are verified whenever they are opened. Larger ones when their files were touched since."""


class ArraysWriter:
    """Writes one folder, piece by piece. It has its name only after `finish`; left otherwise, nothing stays."""

    def __init__(self, folder: Path) -> None:
        self._final = folder
        self._folder = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        self._files: dict[str, IO[bytes]] = {}
        self._dtypes: dict[str, str] = {}
        self._lengths: dict[str, int] = {}
        self._digests: dict[str, Any] = {}

    def __enter__(self) -> Self:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # what is still to be flushed finds the disk full again
                file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def append(self, name: str, piece: NDArray[Any]) -> None:
        """Add to the array `name`, which begins with its first piece."""
        piece = np.ascontiguousarray(piece)
        if name not in self._files:
            self._files[name] = (self._folder / f"{name}.bin").open("wb+")
            self._dtypes[name], self._lengths[name], self._digests[name] = piece.dtype.str, 0, hashlib.sha256()
        assert piece.dtype.str == self._dtypes[name]
        raw = piece.view(np.uint8).data if piece.size else b""
        self._files[name].write(raw)
        self._digests[name].update(raw)
        self._lengths[name] += len(piece)

    def written(self, name: str) -> NDArray[Any]:
        """What the array `name` holds so far, mapped."""
        self._files[name].flush()
        return _mapped(self._folder / f"{name}.bin", self._dtypes[name], self._lengths[name])

    def digest(self, name: str) -> Any:
        """The running sha256 of the array `name` (a `hashlib` object of the caller's own)."""
        return self._digests[name].copy()

    def finish(self, metadata: dict[str, Any]) -> None:
        """Flush everything to the disk and give the folder its name, in place of an older one."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        arrays = {
            name: {"dtype": self._dtypes[name], "length": self._lengths[name], "sha256": digest.hexdigest()}
            for name, digest in self._digests.items()
        }
        write_whole(self._folder / "facts.json", {"arrays": arrays, **metadata})
        _stamp(self._folder, list(arrays))
        shutil.rmtree(self._final, ignore_errors=True)
        self._folder.replace(self._final)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left half written; only where no other process can be writing there."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def open_arrays(folder: Path, *, just_written: bool = False) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays, mapped read-only, and the facts. Raises DataError for what is missing, torn or changed.

    What this process has `just_written` is not read again as long as its files are untouched.
    """
    metadata = read_whole(folder / "facts.json")
    try:
        described = metadata["arrays"]
        arrays = {
            name: _mapped(folder / f"{name}.bin", about["dtype"], about["length"]) for name, about in described.items()
        }
        total = sum(array.nbytes for array in arrays.values())
        small = total <= ALWAYS_VERIFIED_BYTES and not just_written
        if small or _stamp_of(folder, list(arrays)) != _stamped(folder):
            for name, about in described.items():
                if _sha256(folder / f"{name}.bin") != about["sha256"]:
                    raise DataError(Problem(str(folder / f"{name}.bin"), "holds something else than its checksum says"))
            _stamp(folder, list(arrays))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(Problem(str(folder), f"not a whole folder of arrays: {error}")) from error
    return arrays, metadata


def write_whole(path: Path, value: dict[str, Any]) -> None:
    """Write JSON with its own checksum, under another name first."""
    text = json.dumps(value, sort_keys=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="ascii") as file:
            file.write(f"{hashlib.sha256(text.encode('ascii')).hexdigest()}\n{text}\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def read_whole(path: Path) -> dict[str, Any]:
    """Read it back. Raises DataError where it is missing or not what was written."""
    try:
        digest, text = path.read_text(encoding="ascii").split("\n")[:2]
        if hashlib.sha256(text.encode("ascii")).hexdigest() != digest:
            raise DataError(Problem(str(path), "holds something else than its checksum says"))
        value: dict[str, Any] = parse_json(text)
    except (OSError, ValueError) as error:
        raise DataError(Problem(str(path), f"can't be read: {error}")) from error
    return value


def _mapped(path: Path, dtype: str, length: int) -> NDArray[Any]:
    size, due = path.stat().st_size, length * np.dtype(dtype).itemsize
    if size != due:
        raise ValueError(f"{path.name} has {size:,} bytes, not {due:,}")
    if length == 0:  # nothing can't be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r", shape=(length,))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp_of(folder: Path, names: Sequence[str]) -> dict[str, list[int]]:
    stats = {name: (folder / f"{name}.bin").stat() for name in names}
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in stats.items()}


def _stamped(folder: Path) -> object:
    try:
        return parse_json((folder / "stamp.json").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _stamp(folder: Path, names: Sequence[str]) -> None:
    """A help for the next start alone: where it can't be written, that one verifies once more."""
    unfinished = folder / f".stamp.{os.getpid()}.tmp"
    try:
        unfinished.write_text(json.dumps(_stamp_of(folder, names)), encoding="ascii")
        unfinished.replace(folder / "stamp.json")
    except OSError:
        unfinished.unlink(missing_ok=True)
