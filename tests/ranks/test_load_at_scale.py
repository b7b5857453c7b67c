"""No rank of ZeRO-3 or FSDP2 ever holds the whole base; under DDP the ranks of a node share one mapped copy.

Memory is the proportional set size, in which a page that two ranks map counts half for each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phi3_dist.bench.load import write_base
from tests.ranks.launcher import run_ranks

pytestmark = pytest.mark.ranks
MIB = 2**20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A base of 330 MiB in float32, in several files with an index; and its bytes."""
    folder = tmp_path_factory.mktemp("base")
    size = write_base(folder, layers=6, hidden=1024, shard="90MB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert (folder / "model.safetensors.index.json").is_file()
    assert size > 250 * MIB
    return folder, size


def loaded(base: tuple[Path, int], *strategies: str) -> dict[str, list[dict[str, Any]]]:
    """By strategy, what the load took on each of two ranks. That the weights are the file's is asserted there."""
    args = {"strategies": list(strategies), "folder": str(base[0])}
    deepspeed = strategies[0].startswith("zero")
    by_rank = run_ranks("tests.ranks.load_bodies:load", 2, args=args, deepspeed=deepspeed, timeout_s=150, real=True)
    found = {strategy: [rank[strategy] for rank in by_rank] for strategy in strategies}
    for strategy, ranks in found.items():
        for rank in ranks:
            assert rank["base"] == base[1]
            print(strategy, {k: round(v / MIB) for k, v in rank.items() if k != "seconds"}, round(rank["seconds"], 2))
    return found


def never_held_the_whole_base(ranks: list[dict[str, Any]], size: int, *, peak: float) -> None:
    for rank in ranks:
        assert rank["resident"] < 0.51 * size, "more than its half of the weights"
        assert rank["held_pss"] > 0.45 * size, "the measurement misses this rank's own half"
        assert rank["peak_pss"] < peak * size, "the rank held the whole base"


@pytest.mark.full  # zero3 stays in make test: it is the harder one
def test_fsdp2_reads_into_shards_and_ddp_shares_the_files(base: tuple[Path, int]) -> None:
    found = loaded(base, "fsdp2", "ddp")
    never_held_the_whole_base(found["fsdp2"], base[1], peak=0.65)
    for rank in found["ddp"]:
        assert rank["resident"] == base[1], "float32 in the file, float32 in the model"
    both = sum(rank["held_pss"] for rank in found["ddp"])
    assert 0.9 * base[1] < both < 1.3 * base[1], "the ranks of a node share one copy"


def test_zero3_reads_into_shards(base: tuple[Path, int], deepspeed_ops: Path) -> None:
    """Its shards, and the largest weight whole (a tenth of this base) once as read and once as DeepSpeed holds it."""
    never_held_the_whole_base(loaded(base, "zero3")["zero3"], base[1], peak=0.85)
