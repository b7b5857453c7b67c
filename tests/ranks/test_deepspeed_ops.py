"""DeepSpeed's CPU operators compile once and load from this clone's cache afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = [pytest.mark.ranks, pytest.mark.full]  # compiles for minutes in a fresh clone


def test_both_operators_lie_in_the_cache(deepspeed_ops: Path) -> None:
    assert {path.name for path in deepspeed_ops.rglob("*.so")} >= {"deepspeed_shm_comm.so", "cpu_adam.so"}
    assert not list(deepspeed_ops.rglob("lock"))
