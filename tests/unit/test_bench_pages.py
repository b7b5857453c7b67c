"""Tables that benchmarks write into pages, and a step's time on a CPU as it is planned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from phi3_dist.bench.cluster_table import Storage, choices, start_up
from phi3_dist.bench.page_table import put_table
from phi3_dist.bench.timing import markdown, predicted
from phi3_dist.bench.timing_runs import RUNS, TimedRun
from phi3_dist.planning.cpu_time import CpuRates

REPO = Path(__file__).resolve().parents[2]
RATES = CpuRates(0.1, 10.0, 1.0, 1e-4)


def test_a_table_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- one -->\n| old |\n<!-- end of one -->\nbelow\n")
    put_table(page, "one", "| new |\n")
    assert page.read_text() == "above\n<!-- one -->\n| new |\n<!-- end of one -->\nbelow\n"
    with pytest.raises(ValueError, match="no table two"):
        put_table(page, "two", "| new |\n")
    for name in ("bench-memory", "bench-timing"):
        assert f"<!-- {name} -->\n|" in (REPO / "docs" / "memory.md").read_text()


def test_ten_run_files_are_timed_and_each_field_that_costs_time_is_planned_to() -> None:
    assert len(set(map(str, RUNS))) == len(RUNS) == 10
    assert {run.world for run in RUNS} == {1, 2}
    plain = TimedRun()
    seconds = predicted(plain, RATES).total_s
    slower = {
        "length": replace(plain, length=2048),
        "accumulation": replace(plain, accumulation=2),
        "checkpointing": replace(plain, model={"activation_checkpointing": True}),
        "rank": replace(plain, lora={"r": 64}),
        "dropout": replace(plain, lora={"dropout": 0.1}),
        "network": replace(plain, world=2, strategy="ddp"),
        "gathers": replace(plain, world=2, strategy="zero3"),
    }
    for name, run in slower.items():
        assert predicted(run, RATES).total_s > 1.001 * seconds, name
    assert predicted(plain, replace(RATES, matrix_fp32_tflops=0.2)).arithmetic_s == pytest.approx(
        predicted(plain, RATES).arithmetic_s / 2
    )
    row = {"run": "x", "binds": "memory", **dict.fromkeys(("wall_planned_s", "wall_s", "processor_s"), 1.0)}
    row |= dict.fromkeys(("wall_error", "wall_spread", "processor_error"), 0.04)
    assert markdown([row]).splitlines()[-1] == "| x | 1.000 | 1.000 | +4% | 4% | 1.000 | +4% | memory |"


def test_docs_scaling_has_the_planners_own_tables() -> None:
    page = (REPO / "docs" / "scaling.md").read_text()
    assert start_up(Storage(20.0, 2.0)) in page
    assert choices(("l4",)).splitlines()[2] in page
