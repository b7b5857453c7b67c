"""Every strategy on the GPUs of this machine, one rank each, against one GPU; and what only runs where a GPU is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ranks.launcher import REPO
from tests.ranks.test_strategies import RUN, SAME, clean_environment, compare, rows, tiny_base

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SHARDED = ("ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp2", "fsdp2_offload")
GPUS = torch.cuda.device_count()


def train(config: str | None, folder: Path, *overrides: str, processes: int = max(GPUS, 1)) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launcher += ["--config_file", f"configs/accelerate/{config}.yaml", "--num_processes", str(processes)]
    start = [sys.executable] if config is None else launcher
    env = {k: v for k, v in clean_environment().items() if k != "CUDA_VISIBLE_DEVICES"}
    env |= {"CUDA_VISIBLE_DEVICES": "0"} if config is None else {}
    command = [*start, "-m", "phi3_dist", "train", RUN, *SAME, f"save.folder={folder}", "--overwrite", *overrides]
    done = subprocess.run(command, cwd=REPO, env=env, text=True, capture_output=True, timeout=230, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def one_gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_gpu") / "run"
    train(None, folder)
    return folder


@pytest.mark.parametrize("config", SHARDED)
def test_the_numbers_of_one_gpu_in_float32(config: str, one_gpu: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "run")
    compare(tmp_path / "run", one_gpu, tolerance=1e-3)


@pytest.mark.parametrize("config", [None, *SHARDED])
def test_bf16_learns(config: str | None, tmp_path: Path) -> None:
    """With flash attention where it is installed: the plan chooses."""
    train(config, tmp_path / "run", "model.precision=bf16")
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize(
    ("quantization", "config"),
    [
        ("nf4", None),
        ("int8", None),
        *(("nf4", name) for name in ("ddp", "zero2", "zero3", "zero3_offload", "fsdp2", "fsdp2_offload")),
    ],
)
def test_a_quantised_base_learns(quantization: str, config: str | None, tmp_path: Path) -> None:
    source = f"model.source={tiny_base(tmp_path / 'base')}"
    train(config, tmp_path / "run", source, f"model.quantization={quantization}", "model.precision=bf16")
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_the_optimizers_of_bitsandbytes(name: str, tmp_path: Path) -> None:
    train(None, tmp_path / "run", f"optim.name={name}")
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.05
