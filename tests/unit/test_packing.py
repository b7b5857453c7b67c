from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_dist.data.pack.bin_packing import best_fit


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 90))
def test_each_row_once_within_capacity_in_order(lengths: list[int], capacity: int) -> None:
    packs = best_fit(lengths, capacity)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    rooms = [capacity - sum(lengths[i] for i in pack) for pack in packs]
    assert all(room >= 0 for room in rooms)
    assert all(pack == sorted(pack) for pack in packs)
    assert [pack[0] for pack in packs] == sorted(pack[0] for pack in packs)
    # no two packs could have been one: else the later one would not have been opened
    fullest = sorted(capacity - room for room in rooms)
    assert len(fullest) < 2 or fullest[0] + fullest[1] > capacity


def test_known_layout() -> None:
    # 6 -> A; 5 -> B; 4 best fits A (0 left); 3 -> B (2 left); 2 -> B (0 left); the second 2 -> C
    assert best_fit([4, 6, 3, 5, 2, 2], 10) == [[0, 1], [2, 3, 4], [5]]
    assert best_fit([], 10) == []


def test_best_not_first_fit() -> None:
    # 7 and 8 open packs with 3 and 2 left; the 2 goes where it leaves nothing
    assert best_fit([7, 8, 2], 10) == [[0], [1, 2]]


@pytest.mark.parametrize("lengths", [[11], [3, 0], [-1]])
def test_rows_that_fit_no_pack(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"row {len(lengths) - 1} has"):
        best_fit(lengths, 10)


def test_many_rows_are_packed_tightly() -> None:
    lengths = [1 + (i * 7919) % 300 for i in range(100_000)]
    packs = best_fit(lengths, 2048)
    assert sum(lengths) / (len(packs) * 2048) > 0.99
