"""A signal to one rank amid an evaluation stops all before the next forward pass; the next start makes it up."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import warm
from tests.ranks.test_resume import same_bits
from tests.ranks.test_strategies import REPO, RUN, SAME, clean_environment, rows

pytestmark = pytest.mark.ranks

# rank 1 gets the signal as its second forward pass of the evaluation after step 2 is about to begin
KILLED = """
import os, signal, sys
from phi3_dist.cli import main
from phi3_dist.training import held_out_loss as evaluate, step_loop

made, evaluated, passes = evaluate.to_device, step_loop._evaluate, []
evaluate.JOINED = 1

def to_device(*args):
    passes.append(1)
    if len(passes) == 2 and os.environ["RANK"] == "1" and "--resume" not in sys.argv:
        os.kill(os.getpid(), signal.SIGUSR1)
    return made(*args)

def _evaluate(stage, step):
    evaluate.to_device = to_device if step == 2 else made
    result = evaluated(stage, step)
    if step == 2:
        print(f"rank {os.environ['RANK']} made {len(passes)} passes", flush=True)
    return result

step_loop._evaluate = _evaluate
main()
"""
OPTIONS = (
    *SAME, "train.max_steps=4", "train.eval_every=2", "data.validation_share=0.5", "data.pack_length=300",
    "log.trackers=[]", "save.every=0",
)  # fmt: skip


def run(script: Path, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    launcher = [warm.python(), "-m", "accelerate.commands.accelerate_cli", "launch"]
    command = [*launcher, "--config_file", "configs/accelerate/cpu_2.yaml", str(script), "train", RUN, *OPTIONS]
    return subprocess.run(
        [*command, f"save.folder={folder}", *more],
        cwd=REPO, env={**clean_environment(), "PYTHONPATH": str(REPO)}, text=True, capture_output=True, timeout=600,
        check=False,
    )  # fmt: skip


def test_a_signal_to_one_rank_breaks_the_evaluation_off_on_both(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = run(script, tmp_path / "run")
    assert "the held-out loss after step 2 was interrupted by SIGUSR1" in done.stdout, done.stdout + done.stderr
    assert "stopped by SIGUSR1 after step 2" in done.stdout
    assert {f"rank {rank} made 2 passes" for rank in (0, 1)} <= set(done.stdout.splitlines())
    assert [row["step"] for row in rows(tmp_path / "run", "eval")] == [0]
    assert run(script, tmp_path / "run", "--resume").returncode == 0
    whole = run(script, tmp_path / "whole", "--resume")
    assert whole.returncode == 0, whole.stderr
    ours, theirs = (
        [(row["step"], row["heldout_loss"]) for row in rows(tmp_path / name, "eval")] for name in ("run", "whole")
    )
    assert ours == theirs
    same_bits(tmp_path / "run", tmp_path / "whole")
