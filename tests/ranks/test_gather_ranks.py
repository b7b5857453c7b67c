"""The gather on real ranks: rank 0 has what one process has, to the bit; the others have nothing; little moves.

That the values are right and that rank 1 keeps nothing is asserted on the ranks, in gather_bodies.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks.launcher import run_ranks

pytestmark = pytest.mark.ranks
KINDS = ("lora", "dora", "head", "rslora")


def run(world_size: int, cases: dict[str, dict[str, Any]], *, deepspeed: bool = False) -> dict[str, list[Any]]:
    """Results of each case, in the order of ranks."""
    args = {"cases": cases, "deepspeed": deepspeed}
    by_rank = run_ranks("tests.ranks.gather_bodies:run", world_size, args=args, deepspeed=deepspeed, timeout_s=200)
    return {name: [results[name] for results in by_rank] for name in cases}


def at_most_the_adapter(facts: list[dict[str, Any]], share: float = 1.1) -> None:
    assert facts[0]["moved"] > 0
    for rank, fact in enumerate(facts):
        assert fact["moved"] <= share * fact["size"], f"rank {rank} moved {fact}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    (path / "a_file").write_text("in the way of a folder")
    return path


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> dict[str, list[Any]]:
    return run(
        2,
        {
            "ddp": {"body": "ddp", "folder": str(folder)},
            "disagree": {"body": "disagree"},
            "bug": {"body": "bug"},
            "small_buckets": {"body": "small_buckets"},
            "columns": {"body": "fsdp2", "kind": "lora", "columns": True},
            **{kind: {"body": "fsdp2", "kind": kind} for kind in KINDS},
        },
    )


def test_ddp_moves_nothing_and_fails_together(two_ranks: dict[str, list[Any]], folder: Path) -> None:
    facts = two_ranks["ddp"]
    for fact in facts:
        assert (fact["moved"], fact["buckets"]) == (0, 0)
        assert "cannot be written" in fact["write_failure"]
        assert "NaN or infinity" in fact["not_finite"]
    assert facts[0]["write_failure"] == facts[1]["write_failure"]
    assert sorted(p.name for p in folder.iterdir()) == ["a_file", "adapter"]


def test_ranks_with_different_adapters_are_refused(two_ranks: dict[str, list[Any]]) -> None:
    first, second = two_ranks["disagree"]
    assert first == second
    assert "rank 1 would gather other tensors" in first


def test_a_bug_on_one_rank_does_not_leave_the_other_waiting(two_ranks: dict[str, list[Any]]) -> None:
    assert two_ranks["bug"] == ["AdapterError: rank 1: ZeroDivisionError: a bug", "ZeroDivisionError: a bug"]


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp2_moves_the_adapter_alone(two_ranks: dict[str, list[Any]], kind: str) -> None:
    """r = 3 (rslora) and 97 rows of lm_head over 2 ranks are uneven shards, sent padded to even ones."""
    at_most_the_adapter(two_ranks[kind], 1.2 if kind == "rslora" else 1.1)


def test_fsdp2_sharded_by_columns_goes_through_full_tensor(two_ranks: dict[str, list[Any]]) -> None:
    at_most_the_adapter(two_ranks["columns"])


def test_tensors_larger_than_a_bucket_are_cut(two_ranks: dict[str, list[Any]]) -> None:
    facts = two_ranks["small_buckets"]
    at_most_the_adapter(facts)
    assert facts[0]["buckets"] == facts[1]["buckets"] == -(-facts[0]["moved"] // 2**20)


def test_fsdp2_over_three_ranks_leaves_empty_shards() -> None:
    """4 rows over 3 ranks: 2, 2 and none."""
    at_most_the_adapter(run(3, {"fsdp2": {"body": "fsdp2", "kind": "lora"}})["fsdp2"], 1.5)


def test_hsdp_takes_one_replica_alone() -> None:
    facts = run(4, {"hsdp": {"body": "fsdp2", "kind": "lora", "replicas": 2}})["hsdp"]
    at_most_the_adapter(facts)
    assert [fact["moved"] > 0 for fact in facts] == [True, True, False, False]


@pytest.fixture(scope="module")
def two_deepspeed_ranks(deepspeed_ops: Path) -> dict[str, list[Any]]:
    return run(
        2,
        {
            "zero1": {"body": "zero", "stage": 1, "kind": "lora"},
            "zero2": {"body": "zero", "stage": 2, "kind": "lora"},
            "zero3 lora": {"body": "zero", "stage": 3, "kind": "lora"},
            "zero3 dora": {"body": "zero", "stage": 3, "kind": "dora"},
            "zero3 head offload": {"body": "zero", "stage": 3, "kind": "head", "offload": True},
            "zero3 bf16": {"body": "zero", "stage": 3, "kind": "lora", "bf16": True},
        },
        deepspeed=True,
    )


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_zero_1_and_2_move_nothing(two_deepspeed_ranks: dict[str, list[Any]], stage: str) -> None:
    for fact in two_deepspeed_ranks[stage]:
        assert fact["moved"] == fact["moved_after_step"] == 0


@pytest.mark.parametrize("case", ["zero3 lora", "zero3 dora", "zero3 head offload"])
def test_zero_3_moves_the_adapter_alone(two_deepspeed_ranks: dict[str, list[Any]], case: str) -> None:
    """The body fails if a frozen parameter is gathered."""
    facts = two_deepspeed_ranks[case]
    at_most_the_adapter(facts)
    at_most_the_adapter([fact["fallback"] for fact in facts])
    assert facts[0]["moved_after_step"] == facts[0]["moved"]
    assert facts[1]["moved"] == facts[0]["moved"] // 2, "rank 1 sends its own half and receives nothing"


def test_zero_3_in_bf16_gives_bf16(two_deepspeed_ranks: dict[str, list[Any]]) -> None:
    assert two_deepspeed_ranks["zero3 bf16"] == [{"ok": True}] * 2
