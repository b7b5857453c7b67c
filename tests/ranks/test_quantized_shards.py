"""ZeRO-3 and FSDP2 shard 4-bit weights: half of the bytes on each of two ranks, and one process's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks.launcher import run_ranks
from tests.ranks.test_strategies import tiny_base

pytestmark = pytest.mark.ranks
STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def trained(base: Path, strategy: str, world: int) -> list[dict[str, Any]]:
    args = {"strategy": strategy, "folder": str(base), "steps": STEPS}
    deepspeed = strategy.startswith("zero")
    return run_ranks("tests.ranks.load_bodies:quantized", world, args=args, deepspeed=deepspeed, timeout_s=150)


@pytest.fixture(scope="module")
def single(base: Path) -> dict[str, Any]:
    facts: dict[str, Any] = trained(base, "single", 1)[0]
    assert facts["layers"] == 8, "four linears in each of two layers"
    assert facts["norms"][-1] > 0.01, "no gradient after a pass in eval mode"
    assert facts["before"] == facts["after"], "the weights were repacked"
    return facts


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2", pytest.param("zero3_offload", marks=pytest.mark.full)])
def test_nf4_weights_are_sharded_and_train_alike(
    strategy: str, base: Path, single: dict[str, Any], deepspeed_ops: Path
) -> None:
    for facts in trained(base, strategy, 2):
        assert facts["layers"] == single["layers"]
        assert facts["before"] == facts["after"] == single["before"] // 2
        assert facts["losses"] == pytest.approx(single["losses"], rel=1e-5)
        assert facts["norms"] == pytest.approx(single["norms"], rel=1e-4)
