"""Sweeps over two processes: every candidate has one process's numbers, with the base whole and with it sharded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from phi3_dist.bench.load import write_base
from tests import warm
from tests.ranks.launcher import run_ranks
from tests.ranks.test_strategies import REPO, clean_environment, rows
from tests.unit.test_sweep import RUN, run, sweep_of

pytestmark = pytest.mark.ranks
SECTION: dict[str, Any] = {
    "axes": {"optim.lr": [1e-2, 1e-3]},
    "pass_tokens": 1280,  # two candidates in a pass, then the third
    "candidates": [{"name": "odd", "lora.targets": ["qkv_proj"], "lora.dropout": 0.0, "train.seed": 3}],
}


def over_two(config: str, file: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    launcher = [warm.python(), "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    options = [f"configs/accelerate/{config}.yaml", "--num_processes", "2", "--main_process_port", "0"]
    command = [*launcher, *options, "-m", "phi3_dist", "sweep", str(file), f"save.folder={folder}", *words]
    return subprocess.run(
        command, cwd=REPO, env=clean_environment(), text=True, capture_output=True, timeout=600, check=False
    )


FULL = [
    pytest.param(config, marks=(pytest.mark.full, pytest.mark.timeout(900)))
    for config in ("cpu_2", "zero2", "zero3", "zero2_offload", "zero3_offload")
]


@pytest.mark.parametrize("config", ["fsdp2", *FULL])
def test_two_processes_give_one_process_numbers(config: str, tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, SECTION)
    run(sweep)
    done = over_two(config, tmp_path / "sweep.yaml", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    for one in sweep.candidates:
        ours, theirs = rows(tmp_path / "two" / one.name), rows(tmp_path / "runs" / one.name)
        assert len(ours) == len(theirs) == 4
        for our, their in zip(ours, theirs, strict=True):
            for key in ("loss", "grad_norm", "lr"):
                assert our[key] == pytest.approx(their[key], rel=1e-5), (one.name, our["step"], key)
    assert "<html" in (tmp_path / "two" / "sweep.html").read_text()
    both = [json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("two", "runs")]
    assert [c["name"] for c in both[0]["candidates"]] == [c["name"] for c in both[1]["candidates"]]


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_sweep_of_two_processes_is_cut_and_goes_on_in_one(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, SECTION)
    run(sweep)
    values = yaml.safe_load((tmp_path / "sweep.yaml").read_text())
    short = {**values, "train": {**RUN["train"], "max_steps": 4}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(short))
    done = over_two("cpu_2", tmp_path / "two.yaml", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    for one in sweep.candidates:
        folder = tmp_path / "two" / one.name
        (folder / "exit.json").unlink()
        for path in (folder / "adapter").iterdir():
            path.unlink()
        (folder / "adapter").rmdir()
        for path in (folder / "checkpoints" / "step_000004").iterdir():
            path.unlink()
        (folder / "checkpoints" / "step_000004").rmdir()
    command = [warm.python(), "-m", "phi3_dist", "sweep", str(tmp_path / "two.yaml"), f"save.folder={tmp_path / 'two'}"]
    done = subprocess.run(
        [*command, "--resume"], cwd=REPO, env=clean_environment(), text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for one in sweep.candidates:
        ours, theirs = rows(tmp_path / "two" / one.name), rows(tmp_path / "runs" / one.name)
        assert [row["step"] for row in ours] == [1, 2, 3, 4]
        assert ours[-1]["loss"] == pytest.approx(theirs[-1]["loss"], rel=1e-5)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_two_processes_end_early_revive_and_take_a_new_candidate(tmp_path: Path) -> None:
    """What halving ended continues beside a new candidate, with the numbers of one process without halving."""
    rates = {"axes": {"optim.lr": [1e-2, 1e-3, 1e-4]}}
    sweep = sweep_of(tmp_path, rates)
    run(sweep)
    for name, section in (
        ("first", {"axes": {"optim.lr": [1e-2, 1e-4]}, "early": "halving"}),
        ("more", {**rates, "early": {"rule": "halving", "floor": 3}}),
    ):
        values = yaml.safe_load((tmp_path / "sweep.yaml").read_text())
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**values, "sweep": section}))
    done = over_two("cpu_2", tmp_path / "first.yaml", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "two" / "sweep.json").read_text())
    assert [one["ended"] for one in said["early"]] == [["lr=0.0001"]]
    done = over_two("cpu_2", tmp_path / "more.yaml", tmp_path / "two", "--resume", "--revive", "lr=0.0001")
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "two" / "sweep.json").read_text())
    assert {one["name"]: one["state"] for one in said["candidates"]} == {
        f"lr={rate}": "finished" for rate in ("0.01", "0.001", "0.0001")
    }
    for one in sweep.candidates:
        ours, theirs = rows(tmp_path / "two" / one.name), rows(tmp_path / "runs" / one.name)
        assert [row["step"] for row in ours] == [1, 2, 3, 4]
        for our, their in zip(ours, theirs, strict=True):
            assert our["loss"] == pytest.approx(their["loss"], rel=1e-5), (one.name, our["step"])


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_each_rank_holds_its_half_of_the_base(strategy: str, tmp_path: Path, deepspeed_ops: Path) -> None:
    write_base(tmp_path / "base", layers=2, hidden=128, shard="1GB")
    args = {"strategy": strategy, "folder": str(tmp_path / "base")}
    for held, whole in run_ranks("tests.ranks.sweep_bodies:held", 2, args=args, deepspeed=strategy == "zero3"):
        assert held == whole // 2


def test_ranks_with_different_memory_make_the_same_passes() -> None:
    for found in run_ranks("tests.ranks.sweep_bodies:sized", 2):
        assert found == [4, 2, "by rank 1"]


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_each_weight_is_gathered_once_for_all_candidates(strategy: str, deepspeed_ops: Path) -> None:
    """A run also gathers its adapter, so that a candidate's share is less than a half."""
    command = [sys.executable, "-m", "phi3_dist.bench.sweep_gathers", "--strategies", strategy, "--candidates", "2"]
    done = subprocess.run(
        command, cwd=REPO, env=clean_environment(), text=True, capture_output=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["run_mib"] > 2 * found["base_mib"] / 2, "more than one pass, of half of the base"
    assert 0.4 < found["a_candidate_of_a_run"] <= 0.5
