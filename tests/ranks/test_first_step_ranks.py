"""The proof and the fields on `auto` over real ranks: every rank refuses alike, and the smallest host decides."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from phi3_dist.cli import app
from tests.ranks.launcher import REPO, run_ranks
from tests.ranks.test_strategies import clean_environment

pytestmark = [pytest.mark.ranks, pytest.mark.full]
WEIGHTS = [f"base_model.model.model.layers.1.mlp.down_proj.lora_{part}.default.weight" for part in "AB"]


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_every_rank_refuses_a_lora_that_the_loss_does_not_reach(
    strategy: str, tmp_path: Path, deepspeed_ops: Path
) -> None:
    args = {"strategy": strategy, "folder": str(tmp_path / "run")}
    zero = strategy.startswith("zero")
    body = "tests.ranks.first_step_bodies:detached"
    found = run_ranks(body, 2, args=args, deepspeed=zero, env={"TORCH_EXTENSIONS_DIR": str(deepspeed_ops)})
    why = "no gradient reached it on rank 0, 1"
    assert found == [[f"{WEIGHTS[0]}: {why} (2 tensors like it)", f"{WEIGHTS[1]}: {why} (2 tensors like it)"]] * 2
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_the_smallest_host_decides_for_all(strategy: str, tmp_path: Path, deepspeed_ops: Path) -> None:
    args = {"strategy": strategy, "folder": str(tmp_path / "run")}
    zero = strategy.startswith("zero")
    body = "tests.ranks.first_step_bodies:auto"
    found = run_ranks(body, 2, args=args, deepspeed=zero, env={"TORCH_EXTENSIONS_DIR": str(deepspeed_ops)})
    assert found[0] == found[1]
    assert found[0][1:] == [True, 1, 1]
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (plan["micro_batch"], plan["accumulation"]) == (1, 4)
    assert plan["first_step"]["tensors"]["moved"] == 8


@pytest.mark.parametrize("strategy", ["zero2", "fsdp2"])
def test_the_written_launch_command_starts(strategy: str, tmp_path: Path, deepspeed_ops: Path) -> None:
    """On two processes of a machine without a GPU, from another folder."""
    rows = REPO / "configs/run/debug_chats.jsonl"
    auto = ["data.pack_length=auto", "train.micro_batch=auto", "model.activation_checkpointing=auto"]
    base = "model.source=microsoft/Phi-3-mini-4k-instruct"  # whose shape is known; the start below takes a small one
    words = [base, f"data.train={rows}", "train.global_batch=8", *auto, "--gpus-per-node", "2", "--gpu", "a100-40gb"]
    words += ["--why", strategy, "--write", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["plan", str(REPO / "configs/run/debug.yaml"), *words])
    assert done.exit_code == 0, done.output
    more = ["model.source=tiny-random", "train.max_steps=1", f"save.folder={tmp_path / 'run'}", "log.trackers=[]"]
    more += [f"data.cache={tmp_path / 'cache'}"]
    environment = {**clean_environment(), "TORCH_EXTENSIONS_DIR": str(deepspeed_ops), "PYTHONPATH": str(REPO)}
    started = subprocess.run(
        [str(tmp_path / "out" / "launch.sh"), *more],
        cwd=tmp_path,
        env=environment,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert started.returncode == 0, started.stdout + started.stderr
    assert f"first step as planned: 2 ranks of {strategy}" in started.stdout
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
