"""Ranks that differ in a fact are told which rank, which fact, and both values."""

from __future__ import annotations

from phi3_dist.training.same_on_all_ranks import differences

FACTS = {"config": "a1", "data": "d1", "torch": "2.13.0", "world size": "3", "strategy": "zero3"}


def test_equal_facts_are_no_difference() -> None:
    assert differences([FACTS, dict(FACTS), dict(reversed(FACTS.items()))]) == []
    assert differences([FACTS]) == []


def test_each_difference_names_the_rank_the_fact_and_both_values() -> None:
    found = differences([FACTS, {**FACTS, "torch": "2.12.1"}, {**FACTS, "config": "b2", "data": "d2"}])
    assert [problem.where for problem in found] == ["rank 1", "rank 2", "rank 2"]
    assert [problem.what for problem in found] == [
        "torch is 2.12.1, on rank 0 it is 2.13.0",
        "config is b2, on rank 0 it is a1",
        "data is d2, on rank 0 it is d1",
    ]
    assert all(problem.fix for problem in found)


def test_a_fact_that_one_rank_lacks_is_a_difference_either_way() -> None:
    without = {k: v for k, v in FACTS.items() if k != "torch"}
    assert [p.what for p in differences([FACTS, without])] == ["torch is missing, on rank 0 it is 2.13.0"]
    assert [p.what for p in differences([without, FACTS])] == ["torch is 2.13.0, on rank 0 it is missing"]
