"""On a GPU the host never waits inside a step: what it needs of the numbers it reads while the next step runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ranks.launcher import REPO
from tests.ranks.test_strategies import RUN, SAME, clean_environment, rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# torch's own alarm: any call that makes the host wait for the device raises while it is set
ALARMED = """
import torch
from phi3_dist.cli import main
from phi3_dist.training import step_loop

stepped, added = step_loop.train_step, step_loop.StepReadout.add

def alarmed(function, step):
    torch.cuda.set_sync_debug_mode("error" if step > 3 else "default")
    try:
        return function()
    finally:
        torch.cuda.set_sync_debug_mode("default")

def train_step(engine, runtime, packs, order, step, **rest):
    return alarmed(lambda: stepped(engine, runtime, packs, order, step, **rest), step)

def add(self, done, result, begun):
    self._behind = 99  # what is read is read outside
    alarmed(lambda: added(self, done, result, begun), done - 1)
    self.read(1)

step_loop.train_step, step_loop.StepReadout.add = train_step, add
main()
"""


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_no_call_of_a_step_waits_for_the_device(precision: str, attention: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ALARMED, "train", RUN, *SAME, f"model.precision={precision}", "train.max_steps=12"]
    command += [f"model.attention={attention}", "log.trackers=[]", f"save.folder={tmp_path / 'run'}"]
    env = {**clean_environment(), "CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(command, cwd=REPO, env=env, text=True, capture_output=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 13))
