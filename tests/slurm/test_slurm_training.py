"""Training on a real Slurm: nodes change where a run computes, not what it computes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import REPO, Desk

pytestmark = [pytest.mark.slurm, pytest.mark.full]

OVERRIDES = (
    f"data.train={REPO}/configs/run/debug_chats.jsonl", "data.max_rows=24", "data.pack_length=512",
    "model.precision=fp32", "train.max_steps=3", "train.micro_batch=1", "train.global_batch=4", "log.trackers=[]",
)  # fmt: skip


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_nodes_train_as_one_process(desk: Desk) -> None:
    run_file = str(REPO / "configs/run/debug.yaml")
    desk.job = replace(desk.job, run_file=run_file, arguments=(*OVERRIDES, "save.folder=runs/story"))
    job_id = desk.submit(nodes=2, processes_per_node=None, gpus_per_node=2)
    alone = [sys.executable, "-m", "phi3_dist", "train", run_file, *OVERRIDES, "save.folder=runs/alone"]
    done = subprocess.run(alone, cwd=desk.folder, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert desk.wait(job_id, seconds=150) == ["COMPLETED"], desk.output(job_id)

    one, four = _rows(desk.folder / "runs/alone"), _rows(desk.folder / "runs/story")
    assert json.loads((desk.folder / "runs/story/plan.json").read_text())["world_size"] == 4
    assert [row["step"] for row in four] == [row["step"] for row in one]
    for one_row, four_row in zip(one, four, strict=True):
        for key in ("loss", "grad_norm", "heldout_loss"):
            if key in one_row:
                assert four_row[key] == pytest.approx(one_row[key], rel=1e-5), (key, one_row["step"])
    assert "step 3/3" in desk.output(job_id)
    assert len(desk.rank_logs(job_id)) == 3
    assert all("step 3/3" not in text for text in desk.rank_logs(job_id).values())
    heartbeat = json.loads((desk.folder / "runs/story/heartbeat.json").read_text())
    assert heartbeat["job_id"] == job_id
