"""All rows of a data set as tokens: three arrays, in memory or mapped from a verified folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from phi3_dist.data.chat import Encoded
from phi3_dist.data.store import ArraysWriter, open_arrays
from phi3_dist.errors import DataError, Problem

__all__ = ["Places", "TokenRows"]

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
        """sha256 (hex) of ids, mask and row boundaries; where the rows were read from is no part of it."""
        return _fingerprint(self.ids, self.supervised, self.offsets)

    def save(self, folder: Path) -> None:
        """Write them into a folder of their own, which is whole or not there."""
        save_rows(folder, [self])

    @classmethod
    def load(cls, folder: Path) -> TokenRows:
        """Map them. Raises DataError where a file is missing, torn or not what was written."""
        arrays, facts = open_arrays(folder)
        try:
            places = Places(facts["prefixes"], arrays["which"], arrays["numbers"])
            rows = cls(arrays["ids"], arrays["supervised"], arrays["offsets"], places)
            rows.__dict__["fingerprint"] = facts["fingerprint"]  # known and checksummed: not to be read for it again
        except KeyError as error:
            raise DataError(Problem(str(folder), f"holds no token rows: {error}")) from error
        return rows


def save_rows(folder: Path, parts: Iterable[TokenRows]) -> None:
    """Write parts one after the other as the rows of one folder; memory for one part and the row boundaries."""
    prefixes: dict[str, int] = {}
    end = 0
    with ArraysWriter(folder) as writer:
        writer.append("offsets", np.zeros(1, np.int64))
        for part in _with_empty(parts):
            writer.append("ids", np.asarray(part.ids, np.int32))
            writer.append("supervised", np.asarray(part.supervised, np.bool_))
            writer.append("offsets", end + part.offsets[1:])
            end += int(part.offsets[-1])
            found = [_NUMBERED.fullmatch(place) for place in part.places]
            split = [
                (match[1], int(match[2])) if match else (place, -1)
                for match, place in zip(found, part.places, strict=True)
            ]
            codes = [prefixes.setdefault(prefix, len(prefixes)) for prefix, _ in split]
            writer.append("which", np.array(codes, np.int32))
            writer.append("numbers", np.array([number for _, number in split], np.int64))
        fingerprint = _fingerprint(*(writer.written(name) for name in ("ids", "supervised", "offsets")))
        writer.finish({"prefixes": list(prefixes), "fingerprint": fingerprint})


def _with_empty(parts: Iterable[TokenRows]) -> Iterator[TokenRows]:
    """First no rows at all, so that every array exists."""
    yield TokenRows.of([], [])
    yield from parts


def _fingerprint(ids: NDArray[np.int32], supervised: NDArray[np.bool_], offsets: NDArray[np.int64]) -> str:
    digest = hashlib.sha256()
    for array, dtype in ((ids, "<i4"), (supervised, "?"), (offsets, "<i8")):
        for start in range(0, len(array), 2**22):
            digest.update(np.ascontiguousarray(array[start : start + 2**22], dtype=dtype).tobytes())
    return digest.hexdigest()
