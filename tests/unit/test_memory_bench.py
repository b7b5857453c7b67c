"""The memory benchmark's short form: what is planned against what lives in real steps, in one process."""

from __future__ import annotations

import pytest

from phi3_dist.bench.memory import markdown
from phi3_dist.bench.memory_cells import CPU, REHEARSED, SHORT, MemoryCell, measure_on_cpu

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning"),
]


@pytest.mark.parametrize("cell", SHORT, ids=str)
def test_a_real_step_takes_what_was_planned(cell: MemoryCell) -> None:
    found = measure_on_cpu(cell)
    assert -0.01 <= found["error"] <= 0.03, found


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
