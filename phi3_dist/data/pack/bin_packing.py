"""Best-fit-decreasing bin packing: pure arithmetic on row lengths."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["best_fit", "pack_rows"]

_ROWS_AT_A_TIME = 65536


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """As `pack_rows`, as a list of the rows of each pack."""
    rows, starts = pack_rows(lengths, capacity)
    return [part.tolist() for part in np.split(rows, starts[1:-1])] if len(rows) else []


def pack_rows(lengths: ArrayLike, capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Put every row into a pack of at most `capacity` tokens; few packs, no row cut.

    Pack k is rows[starts[k]:starts[k+1]] of what is returned.

    Longest row first, each into the pack where it leaves the least room (best-fit-decreasing; at most 11/9 of the
    optimum plus one pack). Depends on nothing but its arguments: rows of equal length go in the order of their index.
    Packs hold ascending row indices and are ordered by their first. O(n log n) comparisons, about 50 bytes a row.
    Raises ValueError for a row that is longer than `capacity` or empty.
    """
    lengths_N = np.asarray(lengths, dtype=np.int64)
    unfit = np.flatnonzero((lengths_N <= 0) | (lengths_N > capacity))
    if len(unfit):
        raise ValueError(f"row {unfit[0]} has {lengths_N[unfit[0]]} tokens; a pack holds 1 to {capacity}")
    order_N = np.argsort(-lengths_N, kind="stable")
    pack_of_N = np.empty(len(lengths_N), np.int64)
    with_room: dict[int, list[int]] = {}  # tokens of room -> packs that have exactly that much
    rooms: list[int] = []  # the keys of with_room, ascending
    n_packs = 0
    for first in range(0, len(order_N), _ROWS_AT_A_TIME):
        rows = order_N[first : first + _ROWS_AT_A_TIME]
        chosen: list[int] = []
        for length in lengths_N[rows].tolist():
            at = bisect_left(rooms, length)
            if at == len(rooms):
                pack, room = n_packs, capacity
                n_packs += 1
            else:
                room = rooms[at]
                pack = with_room[room].pop()
                if not with_room[room]:
                    del with_room[room]
                    del rooms[at]
            chosen.append(pack)
            left = room - length
            if left > 0:
                if left not in with_room:
                    with_room[left] = []
                    insort(rooms, left)
                with_room[left].append(pack)
        pack_of_N[rows] = chosen
    first_row = np.full(n_packs, len(lengths_N), np.int64)
    np.minimum.at(first_row, pack_of_N, np.arange(len(lengths_N)))
    rank = np.empty(n_packs, np.int64)
    rank[np.argsort(first_row)] = np.arange(n_packs)
    rank_N = rank[pack_of_N]
    counts = np.bincount(rank_N, minlength=n_packs)
    return np.argsort(rank_N, kind="stable"), np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
