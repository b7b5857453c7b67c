"""Best-fit-decreasing bin packing: pure arithmetic on row lengths."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

__all__ = ["best_fit"]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put every row into a pack of at most `capacity` tokens; few packs, no row cut.

    Longest row first, each into the pack where it leaves the least room (best-fit-decreasing; at most 11/9 of the
    optimum plus one pack). Depends on nothing but its arguments: rows of equal length go in the order of their index.
    Packs hold ascending row indices and are ordered by their first. O(n log n) comparisons.
    Raises ValueError for a row that is longer than `capacity` or empty.
    """
    for i, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"row {i} has {length} tokens; a pack holds 1 to {capacity}")
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # tokens of room -> packs that have exactly that much
    rooms: list[int] = []  # the keys of with_room, ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[i]
        at = bisect_left(rooms, length)
        if at == len(rooms):
            pack, room = len(packs), capacity
            packs.append([])
        else:
            room = rooms[at]
            pack = with_room[room].pop()
            if not with_room[room]:
                del with_room[room]
                del rooms[at]
        packs[pack].append(i)
        left = room - length
        if left > 0:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(pack)
    for rows in packs:
        rows.sort()
    return sorted(packs, key=lambda rows: rows[0])
