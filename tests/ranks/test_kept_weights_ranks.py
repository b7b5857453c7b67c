"""NF4 weights that stay dequantised until backward, where ranks hold shards of them: one process's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks.test_strategies import FUSED, NOT_FUSED, compare, launch, tiny_base

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process that dequantises twice; the base lies beside its run."""
    folder = tmp_path_factory.mktemp("again")
    source = f"model.source={tiny_base(folder / 'base')}"
    done = launch(None, folder / "run", source, "model.quantization=nf4", "model.dequantized_layers=0")
    assert done.returncode == 0, done.stderr
    assert "weights for backward: 0 of 2 layers keep theirs" in done.stdout
    return folder


@pytest.mark.parametrize(
    ("config", "how"),
    [
        pytest.param("fsdp2", "model.dequantized_layers=2", marks=pytest.mark.full),
        ("zero3", "model.dequantized_layers=2"),
        pytest.param("fsdp2", "model.activation_checkpointing=true", marks=pytest.mark.full),
        pytest.param("zero3", "model.activation_checkpointing=true", marks=pytest.mark.full),
        pytest.param("cpu_2", "model.dequantized_layers=1", marks=pytest.mark.full),
    ],
)
def test_kept_weights_give_the_numbers_of_dequantising_twice(
    config: str, how: str, again: Path, tmp_path: Path, deepspeed_ops: Path
) -> None:
    overrides = (f"model.source={again / 'base'}", "model.quantization=nf4", how)
    done = launch(config, tmp_path / "run", *overrides, options=("--num_processes", "2"))
    assert done.returncode == 0, done.stderr
    kept = 1 if how.endswith("=1") else 2
    assert f"weights for backward: {kept} of 2 layers keep theirs" in done.stdout
    assert FUSED in done.stdout
    assert NOT_FUSED not in done.stdout
    compare(tmp_path / "run", again / "run")
