"""The planned precision is the one that computes, under every strategy and on every kind of accelerator."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import warm
from tests.ranks.launcher import REPO
from tests.ranks.test_strategies import FUSED, NOT_FUSED, RUN, SAME, clean_environment, compare, launch, rows

pytestmark = pytest.mark.ranks

BF16 = ("model.precision=bf16", "train.global_batch=8", "train.max_steps=8")
TWO = ("--num_processes", "2")


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp") / "run"
    done = launch("cpu_2", folder, *BF16)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    "strategy", ["zero3", *(pytest.param(s, marks=pytest.mark.full) for s in ("zero1", "zero2", "zero3_offload"))]
)
def test_zero_in_bf16_gives_ddps_numbers_and_a_float32_adapter(
    strategy: str, ddp: Path, tmp_path: Path, deepspeed_ops: Path
) -> None:
    """Four micro batches a step are added up in float32, and the adapter is what the optimizer holds, not rounded."""
    done = launch(strategy, tmp_path / "run", *BF16, options=TWO)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(rows(tmp_path / "run"), rows(ddp), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-3), ours["step"]
    saved, expected = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (tmp_path / "run", ddp))
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert any(not torch.equal(t, t.bfloat16().float()) for t in saved.values())
    moved = torch.cat([(saved[n] - expected[n]).flatten() for n in expected]).norm()
    assert moved / torch.cat([t.flatten() for t in expected.values()]).norm() < 5e-3


def test_zero3_computes_in_fp32_where_the_accelerator_has_no_fp16(tmp_path: Path, deepspeed_ops: Path) -> None:
    """As on a CPU without fp16 kernels: deepspeed 0.19.8 then takes bf16 for a dtype that it is told."""
    launcher = [warm.python(), "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    launcher += ["configs/accelerate/zero3.yaml", *TWO, "-m", "tests.ranks.no_fp16"]
    done = subprocess.run(
        [*launcher, "train", RUN, *SAME, f"save.folder={tmp_path / 'three'}"],
        cwd=REPO,
        env={**clean_environment(), "PYTHONPATH": str(REPO)},
        text=True,
        capture_output=True,
        timeout=220,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert FUSED in done.stdout
    assert NOT_FUSED not in done.stdout
    one = launch(None, tmp_path / "one")
    assert one.returncode == 0, one.stderr
    compare(tmp_path / "three", tmp_path / "one")
