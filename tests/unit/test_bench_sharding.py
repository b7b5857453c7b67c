"""The benchmark of prefetch settings: its table, and real ranks that take turns."""

from __future__ import annotations

import pytest

from phi3_dist.bench import sharding
from phi3_dist.bench.throughput_sides import Round


def _round(seconds: float) -> Round:
    return Round(100, 50, seconds, 0.0, 2 * seconds)


def test_each_setting_stands_beside_the_shipped_one_of_its_strategy() -> None:
    found = {
        "zero3 as shipped": [_round(3.0), _round(9.0), _round(6.0)],
        "zero3 without prefetch": [_round(3.0)],
        "fsdp2 as shipped": [_round(6.0)],
        "fsdp2 1 layer ahead": [_round(12.0)],
    }
    _, *lines, last = sharding.table(found)
    assert [line.split()[-1] for line in lines] == ["1.00", "0.50", "1.00", "2.00"]
    assert "2.000   1.000 … 3.000" in lines[0]  # a step, of three in a round
    assert last == "fastest: zero3 without prefetch, 0.50 of shipped; fsdp2 as shipped, 1.00 of shipped"


@pytest.mark.full
def test_ranks_take_turns_under_two_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sharding, "SETTINGS", [s for s in sharding.SETTINGS if s.name in ("fsdp2 as shipped", "fsdp2 1 layer ahead")]
    )
    found = sharding.measure(1, 2, "25M", cpu=True)
    (shipped,), (ahead,) = found.values()
    assert shipped.tokens == ahead.tokens > 2 * 3 * 512
    assert shipped.seconds > 0
