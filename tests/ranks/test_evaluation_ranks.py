"""An evaluation on two processes is one process's; answers during training are the same under every strategy."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from phi3_dist.evaluation.evaluate import EvaluationRequest, evaluate
from phi3_dist.evaluation.ranks import Ranks, joined
from phi3_dist.inference.answers_file import How
from tests import warm
from tests.ranks.launcher import REPO, run_ranks
from tests.ranks.test_strategies import clean_environment, launch, rows, tiny_base
from tests.unit.test_inference import made

pytestmark = pytest.mark.ranks

ASKING, HOW = EvaluationRequest(base=True, generate=5, metrics=("exact_match",)), How(max_new_tokens=6)


def measure(folder: str) -> dict[str, Any]:
    """On each rank: losses, tokens and answers of both sides."""
    with joined("cpu") as ranks:
        return {"world": ranks.world, **measured(folder, ranks)}


def measured(folder: str, ranks: Ranks) -> dict[str, Any]:
    found = evaluate(folder, ASKING, how=HOW, ranks=ranks)
    losses = [side.losses.loss for side in found.sides]
    return {"losses": losses, "answers": [side.answers for side in found.sides], "of": found.to_json()["difference"]}


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    folder = made(tiny_base(tmp_path / "base"), tmp_path / "run", "data.validation_share=0.5", "data.max_rows=40")
    alone = measured(str(folder), Ranks())
    for rank in run_ranks("tests.ranks.test_evaluation_ranks:measure", 2, args={"folder": str(folder)}):
        assert rank["world"] == 2
        assert rank["losses"] == pytest.approx(alone["losses"], abs=1e-9)
        assert [tuple(side) for side in rank["answers"]] == alone["answers"]
        assert rank["of"] == pytest.approx(alone["of"], abs=1e-9)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_verb_runs_under_a_launcher(tmp_path: Path) -> None:
    folder = made(tiny_base(tmp_path / "base"), tmp_path / "run", "data.validation_share=0.5", "data.max_rows=40")
    command = [warm.python(), "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", "configs/accelerate/cpu_2.yaml", "-m", "phi3_dist", "eval", str(folder)]
    done = subprocess.run(command, cwd=REPO, env=clean_environment(), text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written:") == 1
    assert (folder / "evaluation.json").is_file()


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("config", ["cpu_2", "zero3", "fsdp2"])
def test_answers_during_training_are_one_process_s(config: str, tmp_path: Path, deepspeed_ops: Path) -> None:
    more = ("eval.generate=3", "eval.max_new_tokens=5", "train.max_steps=2", "data.validation_share=0.3")
    options = ("--num_processes", "2")
    for name, chosen, words in (("one", None, ()), ("two", config, options)):
        done = launch(chosen, tmp_path / name, *more, options=words)
        assert done.returncode == 0, done.stderr
    one, two = (rows(tmp_path / name, "eval") for name in ("one", "two"))
    for ours, theirs in zip(one, two, strict=True):
        assert ours["answers"] == theirs["answers"] == 3
        assert ours["answers_chrf"] == pytest.approx(theirs["answers_chrf"], abs=1e-6)
        assert ours["heldout_loss"] == pytest.approx(theirs["heldout_loss"], abs=1e-4)
