"""All rows of a data set as tokens: three arrays, in memory or mapped from a verified folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from phi3_dist.data.cache.array_folders import ArraysWriter, open_arrays
from phi3_dist.data.render.encode import Encoded
from phi3_dist.errors import DataError, Problem

__all__ = ["Places", "RowsWriter", "TokenRows", "save_rows"]

_NUMBERED = re.compile(r"(.*?)(0|[1-9][0-9]{0,17})", re.DOTALL)
_ROWS_AT_A_TIME = 65536


class Places(Sequence[str]):
    """Where each row was read, 12 bytes a row: nearly every place is a source's name and a number."""

    def __init__(self, prefixes: Sequence[str], which: NDArray[np.int32], numbers: NDArray[np.int64]) -> None:
        self.prefixes, self.which, self.numbers = prefixes, which, numbers

    def __len__(self) -> int:
        return len(self.which)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[str, ...]: ...
    def __getitem__(self, i: int | slice) -> str | tuple[str, ...]:
        if isinstance(i, slice):
            return tuple(self[at] for at in range(*i.indices(len(self))))
        number = int(self.numbers[i])
        return f"{self.prefixes[int(self.which[i])]}{number if number >= 0 else ''}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class TokenRows:
    """All rows in one array: row i is ids[offsets[i]:offsets[i+1]], its mask the same slice of `supervised`."""

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    places: Sequence[str]

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
    def join(cls, pieces: Sequence[TokenRows]) -> TokenRows:
        """One after the other."""
        lengths = np.concatenate([np.empty(0, np.int64), *(part.lengths for part in pieces)])
        return cls(
            np.concatenate([np.empty(0, np.int32), *(part.ids for part in pieces)]),
            np.concatenate([np.empty(0, np.bool_), *(part.supervised for part in pieces)]),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            tuple(place for part in pieces for place in part.places),
        )

    def select(self, which: NDArray[np.int64]) -> TokenRows:
        """Only these rows, in that order; a row may come more than once."""
        slices = [slice(int(self.offsets[i]), int(self.offsets[i + 1])) for i in which]
        return TokenRows(
            np.concatenate([np.empty(0, np.int32), *(self.ids[s] for s in slices)]),
            np.concatenate([np.empty(0, np.bool_), *(self.supervised[s] for s in slices)]),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths[which])]),
            tuple(self.places[int(i)] for i in which),
        )

    def pieces(self, rows_at_a_time: int = _ROWS_AT_A_TIME) -> Iterator[TokenRows]:
        """The same rows in pieces, each a view."""
        for start in range(0, len(self), rows_at_a_time):
            end = min(start + rows_at_a_time, len(self))
            first, last = int(self.offsets[start]), int(self.offsets[end])
            offsets = self.offsets[start : end + 1] - first
            yield TokenRows(self.ids[first:last], self.supervised[first:last], offsets, self.places[start:end])

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

    def targets(self) -> NDArray[np.int64]:
        """Predicted supervised positions of each row: supervised tokens but the first. Shape (rows,)."""
        found = [np.empty(0, np.int64)]
        for piece in self.pieces():
            starts = piece.offsets[:-1]
            found.append(np.add.reduceat(piece.supervised, starts, dtype=np.int64) - piece.supervised[starts])
        return np.concatenate(found)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of ids, mask and row boundaries; where the rows were read from is not part of it."""
        digest = hashlib.sha256()
        _update(digest, self.ids, "<i4")
        return _fingerprint(self.supervised, self.offsets, digest=digest)

    def save(self, folder: Path) -> None:
        """Write them into a folder of their own, which is whole or not there."""
        save_rows(folder, [self])

    @classmethod
    def load(cls, folder: Path, *, just_written: bool = False) -> TokenRows:
        """Map them; `just_written`: as `open_arrays`. Raises DataError where a file is missing, torn or changed."""
        arrays, metadata = open_arrays(folder, just_written=just_written)
        try:
            places = Places(metadata["prefixes"], arrays["which"], arrays["numbers"])
            rows = cls(arrays["ids"], arrays["supervised"], arrays["offsets"], places)
            rows.__dict__["fingerprint"] = metadata["fingerprint"]  # known and checksummed: not to be read for it again
        except KeyError as error:
            raise DataError(Problem(str(folder), f"holds no token rows: {error}")) from error
        return rows


class RowsWriter:
    """Writes the rows of one folder part by part, in memory for one part. The folder is there only after `finish`."""

    def __init__(self, folder: Path) -> None:
        self._writer = ArraysWriter(folder)
        self._prefixes: dict[str, int] = {}
        self._end = 0

    def __enter__(self) -> Self:
        self._writer.__enter__()
        try:
            self._writer.append("offsets", np.zeros(1, np.int64))
            self.add(TokenRows.of([], []))  # so that every array exists
        except OSError:
            self._writer.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.__exit__(*error)

    def add(self, part: TokenRows) -> None:
        """Write these rows after those before."""
        self._writer.append("ids", np.asarray(part.ids, np.int32))
        self._writer.append("supervised", np.asarray(part.supervised, np.bool_))
        self._writer.append("offsets", self._end + part.offsets[1:])
        self._end += int(part.offsets[-1])
        found = [_NUMBERED.fullmatch(place) for place in part.places]
        split = [
            (match[1], int(match[2])) if match else (place, -1) for match, place in zip(found, part.places, strict=True)
        ]
        codes = [self._prefixes.setdefault(prefix, len(self._prefixes)) for prefix, _ in split]
        self._writer.append("which", np.array(codes, np.int32))
        self._writer.append("numbers", np.array([number for _, number in split], np.int64))

    def finish(self) -> None:
        """Give the folder its name."""
        digest = self._writer.digest("ids")  # the fingerprint begins with the same bytes
        fingerprint = _fingerprint(*(self._writer.written(name) for name in ("supervised", "offsets")), digest=digest)
        self._writer.finish({"prefixes": list(self._prefixes), "fingerprint": fingerprint})


def save_rows(folder: Path, pieces: Iterable[TokenRows]) -> None:
    """Write parts one after the other as the rows of one folder; memory for one part and the row boundaries."""
    with RowsWriter(folder) as writer:
        for part in pieces:
            writer.add(part)
        writer.finish()


def _fingerprint(supervised: NDArray[np.bool_], offsets: NDArray[np.int64], *, digest: Any) -> str:
    """`digest` has read the ids already, as little-endian int32."""
    for array, dtype in ((supervised, "?"), (offsets, "<i8")):
        _update(digest, array, dtype)
    return str(digest.hexdigest())


def _update(digest: Any, array: NDArray[Any], dtype: str) -> None:
    for start in range(0, len(array), 2**22):
        digest.update(np.ascontiguousarray(array[start : start + 2**22], dtype=dtype).view(np.uint8).data)
