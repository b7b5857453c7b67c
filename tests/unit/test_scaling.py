"""The scaling benchmark's cases: packs that are full, models of the size they are called, a table of ratios."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3_dist.bench.scaling import LENGTHS, SIZES, Case, plot, rows_of_length, shape_of, table
from phi3_dist.bench.throughput_sides import Round
from phi3_dist.family.variants import Shape


@pytest.mark.parametrize("length", LENGTHS)
def test_rows_fill_a_pack_to_the_last_token(length: int) -> None:
    rows = rows_of_length(length)
    assert sum(len(ids) for ids, _ in rows) == length
    assert all(0 <= answer < len(ids) <= 1000 for ids, answer in rows)
    assert 100 < length / len(rows) < 400


@pytest.mark.parametrize("size", SIZES)
def test_a_model_has_the_size_it_is_called(size: str) -> None:
    shape = Shape.of(shape_of(size))
    assert round(shape.parameters / 1e6) == pytest.approx(int(size.removesuffix("M")), abs=1)
    assert shape.hidden == shape.heads * shape.head_dim


def test_the_table_compares_with_the_first_case_and_is_drawn(tmp_path: Path) -> None:
    slow = Case("512", 4e9, [Round(1000, 1, 9.0, 0.0, seconds) for seconds in (1.0, 3.0, 2.0)])
    fast = Case("1,024", 4e9, [Round(2000, 1, 9.0, 0.0, 2.0)])
    curves = {"pack length, tokens": [slow, fast], "model": [slow], "processes": [slow, fast]}
    lines = table(curves)
    assert lines[1].split() == ["512", "2000", "1.00", "2.0", "1.00"]
    assert lines[2].split() == ["1,024", "1000", "0.50", "2.0", "1.00"]
    plot(curves, tmp_path / "docs" / "scaling.png")
    assert (tmp_path / "docs" / "scaling.png").read_bytes().startswith(b"\x89PNG")
