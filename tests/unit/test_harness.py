"""Tasks of lm-eval: with itself where it is installed, and with a stand-in of its interface."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from phi3_dist.errors import ConfigError
from phi3_dist.evaluation.evaluate import EvaluationRequest, evaluate
from phi3_dist.evaluation.harness import _task, run_tasks
from phi3_dist.inference.answers_file import How
from phi3_dist.inference.open_model import open_model
from tests.ranks.launcher import REPO

INSTALLED = find_spec("lm_eval") is not None
ROWS = [{"q": "ab", "choices": ["cd", "xy"], "answer": 0}, {"q": "xy", "choices": ["ab", "cd"], "answer": 1}]

# the parts of lm-eval 0.4 that are called, in its own words: `test_it_is_called_as_it_says` holds them against it
STAND_IN = {
    "__init__.py": """
import torch

def simple_evaluate(model, tasks=None, task_manager=None, limit=None, log_samples=True):
    results = {}
    for task in tasks:
        ids = model.tokenizer("Hi", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model._model(input_ids=ids).logits
        name = task if isinstance(task, str) else task["task"]
        results[name] = {"alias": name, "acc,none": float(limit or 0), "acc_stderr,none": 0.5, "sample_len": 7,
                         "exact_match,strict": float(torch.isfinite(logits).all()), "batch,none": model.batch_size}
    return {"results": results}
""",
    "models/__init__.py": "",
    "models/huggingface.py": """
class HFLM:
    def __init__(self, pretrained, tokenizer=None, batch_size=1):
        self._model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size
""",
    "tasks/__init__.py": """
class TaskManager:
    def __init__(self, include_defaults=True):
        self.all_tasks = ["gsm8k"] if include_defaults else []
""",
}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, text in STAND_IN.items():
        path = tmp_path / "packages" / "lm_eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "lm_eval"}
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        del sys.modules[name]
    sys.modules.update(before)


def task_file(folder: Path) -> Path:
    """A task of two questions with two answers each, and its rows beside it."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    said = {
        "task": "pairs", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{q}}", "doc_to_choice": "choices",
        "doc_to_target": "answer", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    path = folder / "pairs.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


def test_names_and_files_of_tasks_are_run_and_their_numbers_stand_beside_ours(stand_in: None, tmp_path: Path) -> None:
    rows = str(REPO / "configs/run/debug_chats.jsonl")
    request = EvaluationRequest(rows, generate=0, tasks=("gsm8k", str(task_file(tmp_path))), limit=2)
    found = evaluate("tiny-random", request, how=How(4, 3)).numbers
    assert {key: found[key] for key in found if key.split()[0] in {"gsm8k", "pairs"}} == {
        f"{name} {key}": value
        for name in ("gsm8k", "pairs")
        for key, value in (("acc", 2.0), ("exact_match (strict)", 1.0), ("batch", 3.0))
    }
    assert found["heldout_loss"] > 0


def test_a_task_that_is_none_is_one_message(stand_in: None, tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text("task: !function a.b\n")
    (tmp_path / "empty.yaml").write_text("a: 1\n")
    opened = open_model("tiny-random")
    for task, said in (
        ("gsm9k", "lm-eval knows no task 'gsm9k'"),
        ("absent.yaml", "cannot be read"),
        (str(tmp_path / "odd.yaml"), "is not YAML without lm-eval's own tags"),
        (str(tmp_path / "empty.yaml"), "names no task"),
    ):
        with pytest.raises(ConfigError, match=said):
            run_tasks(opened, [task], limit=None, batch_size=1)


@pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed: pip install lm-eval")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(900)
def test_it_is_called_as_it_says_and_runs_a_task_from_a_file(tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    called = {"model", "tasks", "task_manager", "limit", "log_samples"}
    assert called <= set(inspect.signature(simple_evaluate).parameters)
    assert {"pretrained", "tokenizer", "batch_size"} <= set(inspect.signature(HFLM.__init__).parameters)
    manager = TaskManager()
    assert _task("gsm8k", manager) == "gsm8k"
    with pytest.raises(ConfigError, match="knows no task"):
        _task("no_such_task", manager)
    opened = open_model("tiny-random")
    found = run_tasks(opened, [str(task_file(tmp_path))], limit=None, batch_size=2)
    assert found["pairs acc"] == by_hand(opened)


def by_hand(opened: Any) -> float:
    """The share of questions whose right answer has the greater log probability after the question."""
    import torch

    right = 0
    for row in ROWS:
        scores = []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            before = opened.tokenizer(row["q"], add_special_tokens=False)["input_ids"]
            ids = before + opened.tokenizer(" " + choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logprobs = opened.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
            scores.append(sum(float(logprobs[i - 1, ids[i]]) for i in range(len(before), len(ids))))
        right += scores.index(max(scores)) == row["answer"]
    return right / len(ROWS)
