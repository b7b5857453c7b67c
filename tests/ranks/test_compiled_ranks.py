"""Compiled passes under each strategy, against one process that compiles nothing: no hook or shard is traced."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks.test_strategies import compare, launch

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("by_hand") / "run"
    done = launch(None, folder)
    assert done.returncode == 0, done.stderr
    assert "compile: no (gains about 0.0 s" in done.stdout
    return folder


@pytest.mark.full  # tests/unit/test_compiled.py holds one process to the numbers by hand
@pytest.mark.parametrize("config", ["fsdp2", "cpu_2", "zero2", "zero3"])
def test_two_processes_give_the_numbers_of_one_that_compiles_nothing(
    config: str, by_hand: Path, tmp_path: Path, deepspeed_ops: Path
) -> None:
    done = launch(config, tmp_path / "run", "model.compile=true", options=("--num_processes", "2"))
    assert done.returncode == 0, done.stderr
    assert "norm, rotary, MLP: fused, compiled (9 modules)" in done.stdout
    compare(tmp_path / "run", by_hand)


@pytest.mark.full
def test_recomputed_layers_are_compiled_too(by_hand: Path, tmp_path: Path) -> None:
    done = launch(None, tmp_path / "run", "model.compile=true", "model.activation_checkpointing=true")
    assert done.returncode == 0, done.stderr
    compare(tmp_path / "run", by_hand)
