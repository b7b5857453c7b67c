"""Rows laid out in packs of whole documents, once and for all runs that read the same cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from phi3_dist.data.cache.array_folders import ArraysWriter, open_arrays
from phi3_dist.data.pack.bin_packing import pack_rows
from phi3_dist.data.token_rows import TokenRows, save_rows
from phi3_dist.errors import DataError, Problem

__all__ = [
    "SHOWN_AT_MOST",
    "PackList",
    "Packed",
    "Packs",
    "evenly",
    "load_packed",
    "make_packs",
    "none_fits",
    "pack",
    "save_packed",
]

SHOWN_AT_MOST = 20
_PACKS_AT_A_TIME = 65536


class PackList(Sequence[tuple[int, ...]]):
    """The rows of each pack, in two arrays: pack k is rows[starts[k]:starts[k+1]]."""

    def __init__(self, rows: NDArray[np.int64], starts: NDArray[np.int64]) -> None:
        self.rows, self.starts = rows, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, i: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[tuple[int, ...], ...]: ...
    def __getitem__(self, i: int | slice) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
        if isinstance(i, slice):
            return tuple(self[at] for at in range(*i.indices(len(self))))
        at = range(len(self))[i]
        return tuple(self.rows[int(self.starts[at]) : int(self.starts[at + 1])].tolist())

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        for first in range(0, len(self), _PACKS_AT_A_TIME):
            starts = self.starts[first : first + _PACKS_AT_A_TIME + 1].tolist()
            rows = self.rows[starts[0] : starts[-1]].tolist()
            for start, end in pairwise(starts):
                yield tuple(rows[start - starts[0] : end - starts[0]])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(tuple.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Packs:
    """Rows laid out in packs of whole documents; pack k holds the rows packs[k]."""

    rows: TokenRows
    packs: Sequence[tuple[int, ...]]
    targets: NDArray[np.int64]
    """For each pack, its predicted supervised positions: supervised tokens that don't begin their document."""
    pack_length: int = 0
    """Tokens that a pack may hold; 0 where that is not known."""

    def __len__(self) -> int:
        return len(self.packs)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the rows' fingerprint and the layout."""
        digest = hashlib.sha256(self.rows.fingerprint.encode("ascii"))
        # the JSON of the whole list, pack by pack: fingerprints in older checkpoints were made of that
        for i, rows in enumerate(self.packs):
            digest.update(f"{', ' if i else '['}{json.dumps(rows)}".encode("ascii"))
        digest.update(b"]" if len(self.packs) else b"[]")
        return digest.hexdigest()


def make_packs(rows: TokenRows, pack_length: int, on_long_row: str) -> tuple[Packs, list[str]]:
    """Pack whole rows, best fit; also the places of the rows that are too long, which are then not in `Packs.rows`.

    With `on_long_row: cut_turn`, `rows` should have gone through `TokenRows.cut`: what is too long here is dropped.
    Raises DataError naming each long row with its length (`on_long_row: error`), or where no row is left.
    """
    dropped = [rows.places[i] for i in _long(rows, pack_length, on_long_row)]
    if dropped:
        rows = rows.select(np.flatnonzero(rows.lengths <= pack_length))
    return _packs(rows, pack_length), dropped


def _long(rows: TokenRows, pack_length: int, on_long_row: str) -> list[int]:
    """The rows that are longer than a pack, if they may be left out."""
    long = np.flatnonzero(rows.lengths > pack_length).tolist()
    if long and on_long_row == "error":
        named = [Problem(rows.places[i], f"{rows.lengths[i]:,} tokens") for i in long[:SHOWN_AT_MOST]]
        rest = f"and {len(long) - len(named):,} more; " if len(long) > len(named) else ""
        what = f"{rest}{len(long):,} of {len(rows):,} rows are longer than data.pack_length: {pack_length:,} tokens"
        fix = (
            f"data.pack_length: {int(rows.lengths.max())} holds them all; data.on_long_row: drop leaves them out, "
            "cut_turn cuts them after an answer"
        )
        raise DataError(*named, Problem("data", what, fix))
    if len(long) == len(rows):
        raise none_fits(len(rows), pack_length)
    return long


def none_fits(rows: int, pack_length: int) -> DataError:
    """What is raised where all rows are longer than a pack."""
    what = f"no row is left: all {rows:,} are longer than data.pack_length: {pack_length:,} tokens"
    return DataError(Problem("data", what, "raise data.pack_length"))


def _packs(rows: TokenRows, pack_length: int) -> Packs:
    in_packs, starts = pack_rows(rows.lengths, pack_length)
    targets = np.add.reduceat(rows.targets()[in_packs], starts[:-1])
    return Packs(rows, PackList(in_packs, starts), targets, pack_length)


def evenly(packs: Packs, at_most: int | None) -> Packs:
    """The same, or so many of its rows, evenly spread over all, in packs of their own."""
    rows = packs.rows
    if at_most is None or len(rows) <= at_most:
        return packs
    return _packs(rows.select(np.arange(at_most) * len(rows) // at_most), packs.pack_length)


@dataclass(frozen=True, eq=False)
class Packed:
    """Packs, and what had to be done to the rows for that."""

    packs: Packs
    dropped: list[str]
    """Places of rows that are too long."""
    cut: dict[str, str]
    """For the place of each cut row, its tokens before and after."""


def pack(rows: TokenRows, pack_length: int, on_long_row: str) -> Packed:
    """Cut where `cut_turn` asks for it, then as `make_packs`. All in memory."""
    cut: dict[str, str] = {}
    if on_long_row == "cut_turn":
        before = rows
        rows, which = rows.cut(pack_length)
        cut = {rows.places[i]: f"{before.lengths[i]:,} to {rows.lengths[i]:,} tokens" for i in which}
    packs, dropped = make_packs(rows, pack_length, on_long_row)
    return Packed(packs, dropped, cut)


def save_packed(folder: Path, rows: TokenRows, pack_length: int, on_long_row: str) -> None:
    """As `pack`, into a folder; rows that had to be changed are written anew next to it, piece by piece.

    Raises DataError as `make_packs`.
    """
    cut: dict[str, str] = {}
    dropped: list[str] = []
    own = bool((rows.lengths > pack_length).any())
    if own:
        if on_long_row != "cut_turn":
            dropped = [rows.places[i] for i in _long(rows, pack_length, on_long_row)]

        def kept() -> Iterator[TokenRows]:
            for piece in rows.pieces():
                short = piece
                if on_long_row == "cut_turn":
                    short, which = piece.cut(pack_length)
                    cut.update({piece.places[i]: f"{piece.lengths[i]:,} to {short.lengths[i]:,} tokens" for i in which})
                    dropped.extend(short.places[i] for i in np.flatnonzero(short.lengths > pack_length).tolist())
                yield short.select(np.flatnonzero(short.lengths <= pack_length))

        changed = folder.with_name(f"{folder.name}.rows")
        save_rows(changed, kept())
        if len(dropped) == len(rows):
            _long(rows, pack_length, "drop")
        rows = TokenRows.load(changed, just_written=True)
    packs = _packs(rows, pack_length)
    assert isinstance(packs.packs, PackList)
    with ArraysWriter(folder) as writer:
        writer.append("rows", packs.packs.rows)
        writer.append("starts", packs.packs.starts)
        writer.append("targets", packs.targets)
        writer.finish({"own": own, "dropped": dropped, "cut": cut, "fingerprint": packs.fingerprint})


def load_packed(folder: Path, rows: TokenRows, pack_length: int, *, just_written: bool = False) -> Packed:
    """What `save_packed` wrote for the same rows, mapped. Raises DataError where it is missing or torn."""
    arrays, metadata = open_arrays(folder, just_written=just_written)
    try:
        if metadata["own"]:
            rows = TokenRows.load(folder.with_name(f"{folder.name}.rows"), just_written=just_written)
        packs = Packs(rows, PackList(arrays["rows"], arrays["starts"]), arrays["targets"], pack_length)
        packs.__dict__["fingerprint"] = metadata["fingerprint"]  # known and checksummed: not to be computed again
        return Packed(packs, metadata["dropped"], metadata["cut"])
    except (KeyError, TypeError) as error:
        raise DataError(Problem(str(folder), f"holds no packs: {error}")) from error
