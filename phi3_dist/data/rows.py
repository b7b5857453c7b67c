"""All rows of a data set as tokens: three arrays in memory, one verified file on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from phi3_dist.data.chat import Encoded
from phi3_dist.errors import DataError, Problem

__all__ = ["TokenRows", "rename"]


@dataclass(frozen=True, eq=False)
class TokenRows:
    """All rows in one array: row i is ids[offsets[i]:offsets[i+1]], its mask the same slice of `supervised`."""

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    places: tuple[str, ...]

    @classmethod
    def of(cls, encoded: Sequence[Encoded], places: Sequence[str]) -> TokenRows:
        """Join encoded rows."""
        assert len(encoded) == len(places)
        ids = [np.asarray(row.ids, dtype=np.int32) for row in encoded]
        supervised = [np.asarray(row.supervised, dtype=np.bool_) for row in encoded]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in ids], out=offsets[1:])
        return cls(
            np.concatenate([np.empty(0, np.int32), *ids]),
            np.concatenate([np.empty(0, np.bool_), *supervised]),
            offsets,
            tuple(places),
        )

    @classmethod
    def join(cls, parts: Sequence[TokenRows]) -> TokenRows:
        """One after the other."""
        lengths = np.concatenate([np.empty(0, np.int64), *(part.lengths for part in parts)])
        return cls(
            np.concatenate([np.empty(0, np.int32), *(part.ids for part in parts)]),
            np.concatenate([np.empty(0, np.bool_), *(part.supervised for part in parts)]),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            tuple(place for part in parts for place in part.places),
        )

    def select(self, which: NDArray[np.int64]) -> TokenRows:
        """Only these rows, in that order."""
        slices = [slice(int(self.offsets[i]), int(self.offsets[i + 1])) for i in which]
        return TokenRows(
            np.concatenate([np.empty(0, np.int32), *(self.ids[s] for s in slices)]),
            np.concatenate([np.empty(0, np.bool_), *(self.supervised[s] for s in slices)]),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths[which])]),
            tuple(self.places[i] for i in which),
        )

    def cut(self, length: int) -> tuple[TokenRows, list[int]]:
        """Rows of more than `length` tokens end after the last learned answer that fits; also which were cut.

        A run of supervised tokens ends where its answer does, with the end-of-turn token. A row in which no whole
        answer fits stays as it is.
        """
        lengths = self.lengths.copy()
        cut: list[int] = []
        for i in np.flatnonzero(lengths > length).tolist():
            learned = self.supervised[self.offsets[i] : self.offsets[i] + length + 1]
            ends = np.flatnonzero(learned[:-1] & ~learned[1:]) + 1
            if len(ends):
                lengths[i] = ends[-1]
                cut.append(i)
        if not cut:
            return self, []
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        kept = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1] - offsets[:-1], lengths)
        return TokenRows(self.ids[kept], self.supervised[kept], offsets, self.places), cut

    def __len__(self) -> int:
        return len(self.places)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of ids, mask and row boundaries; where the rows were read from is no part of it."""
        digest = hashlib.sha256()
        for array, dtype in ((self.ids, "<i4"), (self.supervised, "?"), (self.offsets, "<i8")):
            digest.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write one safetensors file, under another name first, so that it is whole or not there."""
        places = np.frombuffer(json.dumps(self.places).encode("ascii"), dtype=np.uint8)
        arrays = {"ids": self.ids, "supervised": self.supervised, "offsets": self.offsets, "places": places}
        arrays["sha256"] = np.frombuffer(bytes.fromhex(self.fingerprint), dtype=np.uint8)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, unfinished)
        rename(unfinished, path)

    @classmethod
    def load(cls, path: Path) -> TokenRows:
        """Read it back. Raises DataError where the file is missing, torn or not what was written."""
        try:
            arrays = load_file(path)
            places = tuple(json.loads(arrays["places"].tobytes()))
            rows = cls(arrays["ids"], arrays["supervised"], arrays["offsets"], places)
            whole = rows.fingerprint == arrays["sha256"].tobytes().hex() and len(places) == len(rows.offsets) - 1
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise DataError(Problem(str(path), f"not a file of token rows: {error}")) from error
        if not whole:
            raise DataError(Problem(str(path), "holds other rows than its checksum says"))
        return rows


def rename(unfinished: Path, final: Path) -> None:
    """Flush a finished file to the disk, then give it its name."""
    with unfinished.open("rb+") as file:
        os.fsync(file.fileno())
    unfinished.replace(final)
