"""The verbs from Python: from rows to a scored answer, errors of the tree, nothing that ends a process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import phi3_dist
from phi3_dist import evaluate, generate, load_run, plan, train
from phi3_dist.errors import ConfigError, DataError, RunFolderError, TrainingError
from phi3_dist.training import whole_run
from phi3_dist.training.signals import Stopped
from tests.ranks.launcher import REPO

DEBUG = REPO / "configs/run/debug.yaml"
SHORT = {
    "train.max_steps": 3,
    "train.eval_every": 2,
    "train.global_batch": 2,
    "train.micro_batch": 1,
    "optim.lr": 1e-5,
    "log.trackers": [],
    "model.precision": "fp32",
    "data.train": str(REPO / "configs/run/debug_chats.jsonl"),
}


def test_from_rows_to_an_answer(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = train(DEBUG, {**SHORT, "save.folder": str(folder)})
    assert (result.state, result.steps, result.folder) == ("finished", 3, folder)
    assert result.adapter == folder / "adapter"
    assert [row["step"] for row in result.metrics if row["kind"] == "train"] == [1, 2, 3]
    assert result.plot().is_file()
    found = evaluate(str(folder), generate=2, base=True, max_new_tokens=4)
    assert found.numbers["heldout_loss"] == pytest.approx(result.held_out_loss, abs=1e-5)
    assert found.write(folder).is_file()
    answers = generate(folder, ["Hi.", [{"role": "user", "content": "Hi."}]], max_new_tokens=4)
    assert answers[0] == answers[1]
    assert load_run(folder).optim.lr == 1e-5  # the run's own file
    with pytest.raises(RunFolderError, match="holds a run already"):
        train(load_run(DEBUG, {**SHORT, "save.folder": str(folder)}))
    assert train(folder, resume=True).steps == 0
    with pytest.raises(DataError, match=r"prompts\[1\]"):
        generate(folder, ["a", "b <|end|>"])


def test_a_plan_says_what_would_run() -> None:
    found = plan(DEBUG, ["optim.lr=1e-4"])
    assert {choice.name for choice in found.choices} >= {"precision", "attention"}
    assert all(choice.why for choice in found.choices)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: load_run("absent.yaml"), "no such file"),
        (lambda: load_run(DEBUG, {"optim.learning": 1}), "optim.learning"),
        (lambda: load_run(DEBUG, "optim.lr=1"), "give"),
        (lambda: load_run(load_run(DEBUG), {"optim.lr": 1}), "a run file"),
        (lambda: train(DEBUG, overwrite=True, resume=True), "exclude each other"),
        (lambda: generate("tiny-random", "Hi."), "a list of prompts"),
        (lambda: generate("tiny-random", ["Hi."], top_p=0), "top_p"),
        (lambda: generate("tiny-random", ["Hi."], batch_size=0), "below 1"),
    ],
)
def test_mistakes_are_errors_of_the_tree(call: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        call()  # type: ignore[operator]


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, TrainingError)])
def test_a_signal_ends_no_process(
    number: int, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise Stopped(number)

    monkeypatch.setattr(whole_run, "train", stopped)
    with pytest.raises(kind):
        train(DEBUG, {**SHORT, "save.folder": str(tmp_path / "run")})


def test_the_functions_are_there_without_torch() -> None:
    names = "evaluate, generate, load_run, plan, train"
    code = f"import sys; from phi3_dist import {names}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)
    assert {"evaluate", "generate", "load_run", "plan", "train"} <= set(phi3_dist.__all__)
    assert all(getattr(phi3_dist, name).__doc__ for name in ("evaluate", "generate", "load_run", "plan", "train"))
