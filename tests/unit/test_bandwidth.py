"""Rates of this machine: measured, kept without a home folder, and what a plan makes of them."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from phi3_dist.cli import app
from phi3_dist.machine import measured_rates
from phi3_dist.machine.measure_rates import measure_rates
from phi3_dist.machine.measured_rates import MeasuredRates, keep_rates, rates_file, rates_measured_here
from phi3_dist.machine.process_group import Ranks, joined
from phi3_dist.planning.gpus import find_gpu
from phi3_dist.planning.rates_of_machine import with_measured
from phi3_dist.planning.timing import rates_of_gpu

SMALL = {"bf16": 32, "fp32": 64, "copy": 2**20, "network": 2**16}
DAY = "2026-11-28"
NETWORK = {"network_gbps": 12.0, "network_ranks": 8, "network_nodes": 1, "network_measured_at": DAY}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_one_process_measures_and_keeps() -> None:
    with joined() as ranks:
        found = measure_rates(ranks, "a CPU", budget_s=0.02, sizes=SMALL)
    assert ranks == Ranks()
    assert found.matrix_fp32_tflops is not None
    assert found.memory_gbps is not None
    assert 1e-6 < found.matrix_fp32_tflops < 100
    assert 1e-3 < found.memory_gbps < 10_000
    assert found.network_gbps is None
    assert keep_rates(found) == rates_file("a CPU")
    assert rates_measured_here("a CPU") == found


def test_one_process_leaves_the_networks_rates() -> None:
    keep_rates(MeasuredRates("card", DAY, memory_gbps=1.0, **NETWORK))
    keep_rates(MeasuredRates("card", "2027-01-01", memory_gbps=2.0))
    found = rates_measured_here("card")
    assert found is not None
    assert (found.measured_at, found.memory_gbps, found.network_gbps) == ("2027-01-01", 2.0, 12.0)
    assert found.network_measured_at == DAY


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"device": "card"}', '{"device": 1, "measured_at": 2}'])
def test_a_broken_file_is_as_none(text: str) -> None:
    file = rates_file("card")
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert rates_measured_here("card") is None
    values = {"device": "card", "measured_at": DAY, "memory_gbps": -1, "matrix_bf16_tflops": "1", "network_gbps": True}
    file.write_text(json.dumps({**values, "more": 3}))
    assert rates_measured_here("card") == MeasuredRates("card", DAY)


def test_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("phi3_dist.machine.storage.home_folder", lambda: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rates = MeasuredRates("card", DAY, memory_gbps=1.0)
    assert keep_rates(rates) == tmp_path / f"phi3_dist_{os.getuid()}" / "rates" / "card.json"
    assert rates_measured_here("card") == rates
    monkeypatch.setattr(measured_rates.os, "getuid", lambda: 12345)
    monkeypatch.setattr(measured_rates, "_folder", lambda: tmp_path / f"phi3_dist_{os.geteuid()}" / "rates")
    if rates_file("card").stat().st_uid:  # root's files are trusted
        assert rates_measured_here("card") is None


def test_a_plan_takes_what_was_measured_and_says_so() -> None:
    sheet = rates_of_gpu(find_gpu("h200"))
    assert with_measured(sheet, {}) == sheet
    found = MeasuredRates("card", DAY, matrix_bf16_tflops=700.0, memory_gbps=4000.0, **NETWORK).to_dict()
    here = with_measured(sheet, found)
    assert (here.flops, here.memory, here.network, here.between) == (700e12, 4000e9, 12e9, sheet.between)
    assert here.source.startswith(f"measured here on {DAY}: 700 TFLOP/s in bf16, memory 4,000 GB/s, network 12 GB/s")
    far = with_measured(sheet, {**found, "network_nodes": 2})
    assert (far.network, far.between) == (sheet.network, 12e9)
    part = with_measured(sheet, {"measured_at": DAY, "memory_gbps": 4000.0})
    assert part.flops == sheet.flops
    assert "flops and network from h200's data sheet" in part.source


def test_the_plan_of_a_run_file_names_the_day(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("model: {source: microsoft/Phi-3-mini-4k-instruct}\ndata: {train: me/rows}\n")
    words = ["plan", str(run), "--gpu", "h200"]
    before = CliRunner().invoke(app, words)
    assert "h200's data sheet" in before.output
    keep_rates(MeasuredRates("NVIDIA H200", DAY, matrix_bf16_tflops=700.0, memory_gbps=4000.0))
    after = CliRunner().invoke(app, words)
    assert f"measured here on {DAY}: 700 TFLOP/s in bf16, memory 4,000 GB/s; network from h200's" in after.output
