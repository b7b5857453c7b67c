"""The benchmark of two settings: what it reads, and the ratios it prints."""

from __future__ import annotations

from phi3_dist.bench.pairs import lines_of, settings
from phi3_dist.bench.throughput_sides import Round


def test_settings_are_read_as_yaml() -> None:
    assert settings(["compile=true", "attention=sdpa", "dequantized_layers=3"]) == {
        "compile": True,
        "attention": "sdpa",
        "dequantized_layers": 3,
    }


def test_ratios_are_of_pairs_and_leave_out_the_first_pass() -> None:
    def one(seconds: float) -> Round:
        return Round(100, 50, 2 * seconds, 0.0, seconds)

    pairs = [[one(1.0), one(9.0)], *([one(float(n)), one(0.9 * n)] for n in (1, 2, 4, 8)), [one(1.0), one(2.0)]]
    first, second, by_cpu, by_clock = lines_of(pairs)
    assert first == "without  first pass 2.0 s, then 2.00 s of processor time"
    assert second.startswith("with     first pass 18.0 s")
    assert "by processor time: 0.900 " in by_cpu
    assert "4 of 5 below 1" in by_cpu
    assert "by the clock: 0.900 " in by_clock
