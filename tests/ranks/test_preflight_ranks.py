"""Two real processes: the form that `accelerate config` writes trains, a dry run and a doctor speak once."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests import warm
from tests.ranks.launcher import REPO
from tests.ranks.test_strategies import clean_environment
from tests.unit.test_inline_zero import AS_ACCELERATE_CONFIG_WRITES

pytestmark = [pytest.mark.ranks, pytest.mark.full]
RUN = REPO / "configs" / "run" / "debug.yaml"
ROWS = REPO / "configs" / "run" / "debug_chats.jsonl"


def launched(folder: Path, config: str | Path, *words: str) -> subprocess.CompletedProcess[str]:
    """From a folder that is not the repository's."""
    return subprocess.run(
        [warm.python(), "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config), "-m",
         "phi3_dist", *words],
        cwd=folder,
        env={**clean_environment(), "PYTHONPATH": str(REPO), "XDG_CACHE_HOME": str(folder / "cache")},
        text=True,
        capture_output=True,
        timeout=220,
        check=False,
    )  # fmt: skip


def test_fields_as_accelerate_config_writes_them_train(tmp_path: Path, deepspeed_ops: Path) -> None:
    config = tmp_path / "inline.yaml"
    config.write_text(AS_ACCELERATE_CONFIG_WRITES)
    words = ["train", str(RUN), f"data.train={ROWS}", f"save.folder={tmp_path / 'run'}", "model.precision=fp32"]
    words += ["train.max_steps=2", "train.micro_batch=1"]
    dry = launched(tmp_path, config, *words, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.count("this run can start") == 1
    assert "zero3 in fp32 on cpu" in dry.stdout
    assert "2 ranks with one run file and the same versions" in dry.stdout
    assert not (tmp_path / "run").exists()
    done = launched(tmp_path, config, *words)
    assert done.returncode == 0, done.stderr
    assert "strategy: zero3" in done.stdout
    assert "Accelerate config says mixed_precision bf16; the run is fp32" in done.stdout
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_doctor_of_two_ranks_speaks_once_and_measures_the_network(tmp_path: Path) -> None:
    config = REPO / "configs" / "accelerate" / "cpu_2.yaml"
    done = launched(tmp_path, config, "doctor", "--bandwidth", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["state"] for row in found if row["check"] == "nodes"] == ["ok"]
    (kept,) = (tmp_path / "cache" / "phi3_dist" / "rates").glob("*.json")
    rates = json.loads(kept.read_text())
    assert (rates["network_ranks"], rates["network_nodes"], rates["network_backend"]) == (2, 1, "gloo")
    for name in ("matrix_bf16_tflops", "matrix_fp32_tflops", "memory_gbps", "network_gbps", "all_gather_gbps"):
        assert rates[name] > 0, name
