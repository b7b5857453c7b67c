"""The verbs from Python: from rows to a scored answer, errors of the tree, nothing that ends a process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import phi3_dist
from phi3_dist import (
    adapter_of_checkpoint,
    check,
    evaluate,
    export,
    generate,
    load_run,
    plan,
    push,
    report_page,
    train,
)
from phi3_dist.errors import AdapterError, ConfigError, DataError, PlanError, RunFolderError, TrainingError
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


@pytest.fixture
def no_accelerator() -> None:
    """What an earlier test of this process may have left."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def test_from_rows_to_an_answer(no_accelerator: None, tmp_path: Path) -> None:
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
    hand_on(folder, tmp_path)
    # a second run of this process, in another precision
    second = train(DEBUG, {**SHORT, "model.precision": "bf16", "save.folder": str(tmp_path / "second")})
    assert (second.state, second.steps) == ("finished", 3)
    assert json.loads((tmp_path / "second" / "plan.json").read_text())["precision"] == "bf16"
    assert report_page([folder, tmp_path / "second"], tmp_path / "both.html") == tmp_path / "both.html"


def hand_on(folder: Path, tmp_path: Path) -> None:
    """What there is to do with a run's adapter."""
    taken = adapter_of_checkpoint(folder, tmp_path / "taken", step=3)
    assert (taken.folder, taken.step) == (tmp_path / "taken", 3)
    done = export(folder, tmp_path / "one", "one-rank")
    assert done.folder == tmp_path / "one"
    assert done.drift.error < 1e-4
    of_one, of_run = check(tmp_path / "one", "vllm"), check(folder, "vllm")
    assert [of_one.right, of_run.right, of_run.verdict.command] == [False, False, ""]  # no server finds its base
    assert "made in memory" in of_run.verdict.findings[0].what
    pushed = push(folder, "somebody/adapter", base="microsoft/Phi-3-mini-4k-instruct")
    assert not pushed.url
    assert pushed.private
    assert report_page(folder) == folder / "report.html"
    with pytest.raises(AdapterError, match="exists"):
        export(folder, tmp_path / "one", "one-rank")


def test_a_run_beside_an_accelerator_of_another_precision_is_refused(no_accelerator: None, tmp_path: Path) -> None:
    """And that Accelerator stays."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState, is_initialized

    Accelerator(cpu=True)
    try:
        with pytest.raises(PlanError, match="has made an Accelerator already"):
            train(DEBUG, {**SHORT, "model.precision": "bf16", "save.folder": str(tmp_path / "run")})
        assert is_initialized()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not PartialState._shared_state


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
        (lambda: train(DEBUG, overwrite=True, resume=True), "cannot be combined"),
        (lambda: generate("tiny-random", "Hi."), "a list of prompts"),
        (lambda: generate("tiny-random", ["Hi."], top_p=0), "top_p"),
        (lambda: generate("tiny-random", ["Hi."], batch_size=0), "below 1"),
        (lambda: export("run", "out", "onnx"), "one of merged, split"),  # type: ignore[arg-type]
        (lambda: export("run", "out", "onnx", into="int4", stored="q8"), "(?s)--as: .*--into: .*--dtype: "),  # type: ignore[arg-type]
        (lambda: export("run", "out", "merged", stored="f16"), "--dtype: has no effect with --as merged"),
        (lambda: export("run", "out", "gguf", weights=[1.0], into="nf4"), "--into: has no effect with --as gguf"),
        (lambda: check("run", "tgi"), "is not a known server"),  # type: ignore[arg-type]
        (lambda: adapter_of_checkpoint("run", "out", step=1, best=True), "cannot be combined"),
        (lambda: report_page("run", "page.html"), "is for the page of several runs"),
        (lambda: report_page([]), "is empty"),
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


VERBS = {
    "adapter_of_checkpoint", "check", "evaluate", "export", "generate", "load_run", "plan", "push", "report_page",
    "train",
}  # fmt: skip


def test_the_functions_are_there_without_torch_and_stay_functions() -> None:
    """No package of the same name takes a function's place, and bitsandbytes' notice about a kernel is not shown."""
    code = (
        f"import sys; from phi3_dist import {', '.join(sorted(VERBS))}\n"
        "import logging, pkgutil, phi3_dist\n"
        f"assert not {VERBS} & {{module.name for module in pkgutil.iter_modules(phi3_dist.__path__)}}\n"
        "assert 'torch' not in sys.modules\n"
        "ops = logging.getLogger('bitsandbytes.backends.cpu.ops')\n"
        "ops.warning('Failed to load CPU gemm_4bit_forward from kernels-community: %s.', 'x')\n"
        "ops.warning('something else')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO, capture_output=True, text=True)
    assert done.stderr == "something else\n"
    assert set(phi3_dist.__all__) >= VERBS
    assert all(getattr(phi3_dist, name).__doc__ for name in VERBS)
