"""Two runs one after the other in the same ranks: nothing of the first is left to the second."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests import warm
from tests.ranks.test_strategies import REPO, RUN, clean_environment, rows

pytestmark = [pytest.mark.ranks, pytest.mark.full, pytest.mark.timeout(900)]

TWICE = """
import os, sys
from phi3_dist import train

if os.environ.get("RANK") == "1":
    sys.stdout = open(os.devnull, "w")
for precision in ("fp32", "bf16"):
    done = train(
        sys.argv[1],
        {
            "train.max_steps": 2, "train.global_batch": 2, "train.micro_batch": 1, "log.trackers": [],
            "model.precision": precision, "save.folder": os.path.join(sys.argv[2], precision),
        },
    )
    assert done.state == "finished"
"""


@pytest.mark.parametrize("config", ["cpu_2", "zero3", "fsdp2"])
def test_ranks_train_again_in_another_precision(config: str, deepspeed_ops: Path, tmp_path: Path) -> None:
    script = tmp_path / "twice.py"
    script.write_text(TWICE)
    launcher = [warm.python(), "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
    options = ["--config_file", f"configs/accelerate/{config}.yaml", "--main_process_port", "0"]
    done = subprocess.run(
        [*launcher, *options, str(script), RUN, str(tmp_path)],
        cwd=REPO, env={**clean_environment(), "PYTHONPATH": str(REPO)}, text=True, capture_output=True, timeout=800,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    plans = [json.loads((tmp_path / kind / "plan.json").read_text()) for kind in ("fp32", "bf16")]
    assert [plan["precision"] for plan in plans] == ["fp32", "bf16"]
    assert plans[0]["strategy"] == plans[1]["strategy"] != "single"
    first, second = (rows(tmp_path / kind)[-1]["loss"] for kind in ("fp32", "bf16"))
    assert second == pytest.approx(first, rel=2e-2)
    assert second != first
