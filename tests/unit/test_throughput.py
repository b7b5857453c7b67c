"""The throughput benchmark's arithmetic: its rows, its count of FLOPs, and the lines that it ends with."""

from __future__ import annotations

import statistics

import pytest

from phi3_dist.bench.throughput import _report, _Result, make_rows, step_flops
from phi3_dist.bench.throughput_sides import SHAPE, Round


def test_rows_are_ragged_chats_with_an_answer_and_always_the_same() -> None:
    rows = make_rows(400)
    assert rows == make_rows(400)
    assert rows != make_rows(400, seed=1)
    lengths = [len(ids) for ids, _ in rows]
    assert statistics.mean(lengths) == pytest.approx(220, rel=0.02)
    assert statistics.mean(len(ids) for ids, _ in make_rows(36)) == pytest.approx(220, rel=0.05)
    assert max(lengths) <= 1000
    assert len(set(lengths)) > 200
    answered = [1 - answer / len(ids) for ids, answer in rows]
    assert statistics.mean(answered) == pytest.approx(0.5, abs=0.05)
    assert all(0 < answer < len(ids) for ids, answer in rows)


def test_flops_are_those_of_a_count_by_hand() -> None:
    hidden, inner, layers, vocab = 576, 1536, 6, 32064
    assert (SHAPE["hidden_size"], SHAPE["intermediate_size"]) == (hidden, inner)
    assert (SHAPE["num_hidden_layers"], SHAPE["vocab_size"]) == (layers, vocab)
    weights = hidden * 3 * hidden + hidden * hidden + hidden * 2 * inner + inner * hidden
    adapter = 16 * (hidden + 3 * hidden + hidden + hidden + hidden + 2 * inner + inner + hidden)
    want = 4 * 300 * layers * weights - 2 * 300 * 3 * hidden * hidden + 6 * 300 * layers * adapter
    want += 4 * 120 * hidden * vocab + 7 * (100**2 + 200**2) * hidden * layers
    assert step_flops([100, 200], 120) == want
    # a pack is no document: the same tokens in one are dearer by attention alone
    assert step_flops([300], 120) - want == 7 * 2 * 100 * 200 * hidden * layers


def test_the_report_ends_with_the_median_of_paired_ratios() -> None:
    rows = make_rows(3)
    tokens = sum(len(ids) for ids, _ in rows)
    ours = [Round(tokens, 50, seconds, 100.0, 2 * seconds) for seconds in (1.0, 2.0, 1.0)]
    theirs = [Round(tokens, 50, seconds, 400.0) for seconds in (2.0, 6.0, 9.0)]
    facts = {"parameters": 61_700_000, "trainable": 880_000}
    lines: list[str] = []
    peft = [Round(tokens, 50, seconds, 200.0) for seconds in (1.0, 4.0, 2.0)]
    alone = _Result(
        {"ours": ours, "peft": peft}, [(1e10, 1e10), (2e10, 1e10), (4e10, 1e10)], {"ours": facts}, 2, [0.0, 3.0, 1.0]
    )
    figures = _report(alone, rows, lines.append)
    assert "best peer" not in lines[-1]
    assert "others' load: 1.0 processes" in lines[2]
    assert figures["ours"]["tokens_per_s"] == tokens
    assert "matrix rate: 20.0 GFLOP/s (median over the rounds), 10.0 by processor time" in lines[2]
    flops = step_flops([len(ids) for ids, _ in rows], 50)
    assert figures["ours"]["share"] == pytest.approx(statistics.median([flops / 1e10, flops / 4e10, flops / 4e10]))
    assert figures["ours"]["cpu_share"] == pytest.approx(flops / 2 / 1e10)
    pytest.importorskip("trl")
    sides = {"ours": ours, "peft": peft, "trl": theirs}
    figures = _report(_Result(sides, [(1e10, 1e10)] * 3, {"ours": facts}, 2, [0.0] * 3), rows, lines.append)
    assert figures["ratios"] == {"peft": 2, "trl": 3}
    assert figures["ratio"] == 3
    assert lines[-1] == "ratio to the best peer: 3.00"
    assert "peak memory 0.25" in lines[-2]
