"""The memory benchmark's short form: what is planned against what lives in real steps, in one process."""

from __future__ import annotations

from typing import Any

import pytest

from phi3_dist.bench.memory import markdown
from phi3_dist.bench.memory_cells import CPU, REHEARSED, SHORT, MemoryCell, measure_on_cpu

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning"),
]


@pytest.fixture(scope="module")
def found() -> dict[MemoryCell, dict[str, Any]]:
    """Each cell, really run."""
    return {cell: measure_on_cpu(cell) for cell in SHORT}


@pytest.mark.parametrize("cell", SHORT, ids=str)
def test_a_real_step_takes_what_was_planned(cell: MemoryCell, found: dict[MemoryCell, dict[str, Any]]) -> None:
    assert -0.01 <= found[cell]["error"] <= 0.03, found[cell]


def test_a_term_left_out_would_be_seen(found: dict[MemoryCell, dict[str, Any]]) -> None:
    """In some cell the plan without it is too small: no term is too little to be held by these."""
    terms = {name for one in found.values() for name in one["predicted"]}
    assert {"base weights", "adapter", "gradients", "optimizer", "activations (estimate)"} <= terms
    for name in terms:
        without = [
            (one["predicted_gib"] - one["predicted"].get(name, 0.0)) / one["measured_gib"] - 1 for one in found.values()
        ]
        assert min(without) < -0.01, name


def test_there_are_enough_cells_and_their_table_is_sorted_by_error() -> None:
    assert len(set(REHEARSED)) == len(REHEARSED) >= 60
    assert len(set(CPU)) == len(CPU) >= 24
    assert {cell.world for cell in CPU} == {1, 2}
    rows = [
        {"how": "CPU", "cell": name, "predicted_gib": 1.0, "measured_gib": 1.0, "error": error}
        for name, error in (("small", 0.001), ("large", -0.02))
    ]
    assert markdown(rows).splitlines()[2:] == [
        "| CPU | large | 1.000 | 1.000 | -2.00% | - | - |",
        "| CPU | small | 1.000 | 1.000 | +0.10% | - | - |",
    ]
