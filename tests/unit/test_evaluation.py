"""A run judged: its own held-out loss again, scored answers, an interval, and every mistake in one message."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from phi3_dist.cli.app import app
from phi3_dist.data import scores
from phi3_dist.data.scores import metric_of, scored
from phi3_dist.errors import ConfigError, DataError, MachineError, Phi3DistError, RunFolderError
from phi3_dist.evaluation.bootstrap import paired
from phi3_dist.evaluation.evaluate import Evaluation, EvaluationRequest, evaluate
from phi3_dist.evaluation.harness import numbers_of
from phi3_dist.inference.answers_file import How
from phi3_dist.report.page import write_page
from tests.ranks.test_strategies import rows, tiny_base
from tests.unit.test_inference import made

SHORT = How(max_new_tokens=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tiny_base(tmp_path_factory.mktemp("base"))
    return made(base, tmp_path_factory.mktemp("run") / "mine", "data.validation_share=0.4", "data.max_rows=40")


@pytest.fixture(scope="module")
def beside_base(run: Path) -> Evaluation:
    return evaluate(run, EvaluationRequest(base=True, generate=5, metrics=("exact_match", "chrf")), how=SHORT)


def test_the_held_out_loss_is_the_runs_own(run: Path, beside_base: Evaluation) -> None:
    before, *_, last = rows(run, "eval")
    adapter, base = (side.numbers for side in beside_base.sides)
    assert adapter["heldout_loss"] == pytest.approx(last["heldout_loss"], abs=1e-5)
    assert adapter["perplexity"] == pytest.approx(last["heldout_perplexity"], rel=1e-5)
    assert adapter["supervised_tokens"] == last["supervised_tokens"]
    assert base["heldout_loss"] == pytest.approx(before["heldout_loss"], abs=1e-5)  # LoRA starts as the base
    assert adapter["heldout_loss"] < base["heldout_loss"] - 0.01


def test_a_difference_has_a_width(beside_base: Evaluation) -> None:
    of = beside_base.differences["heldout_loss"]
    adapter, base = (side.numbers["heldout_loss"] for side in beside_base.sides)
    assert of.value == pytest.approx(adapter - base)
    assert of.low < of.value < of.high < 0
    assert of.sure
    assert set(beside_base.differences) == {"heldout_loss", "exact_match", "chrf"}


def test_an_interval_is_that_of_the_mean() -> None:
    """Against the normal distribution's, and narrower for pairs that go together than for the same numbers shuffled."""
    random = np.random.default_rng(0)
    theirs = random.normal(0, 5, 400)
    ours = theirs + random.normal(0.2, 1, 400)
    found = paired(ours, theirs)
    wide = 1.96 * float((ours - theirs).std()) / math.sqrt(400)
    assert (found.low, found.high) == pytest.approx((found.value - wide, found.value + wide), abs=0.02)
    shuffled = paired(ours, random.permutation(theirs))
    assert shuffled.high - shuffled.low > 4 * (found.high - found.low)
    assert not paired(ours, ours).sure
    weighted = paired(np.array([2.0, 0.0]), np.array([0.0, 0.0]), np.array([1.0, 3.0]))
    assert weighted.value == 0.5


def test_an_evaluation_replaces_evaluations_alone_and_says_so_before(beside_base: Evaluation, tmp_path: Path) -> None:
    beside_base.write(tmp_path / "out")
    beside_base.write(tmp_path / "out")
    for name, text in (("evaluation.json", '{"mine": 1}'), ("evaluation_rows.jsonl", '{"row": 1}\n')):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(RunFolderError, match=f"{name}: is there already"):
            beside_base.write(folder)
        assert {path.name: path.read_text() for path in folder.iterdir()} == {name: text}
    (tmp_path / "file").write_text("mine")
    for folder, said in (
        (tmp_path / "file", "file: is not a folder"),
        (tmp_path / "file" / "below", "file: is not a folder"),
        (tmp_path / "a\nb", "has the control character"),
        (tmp_path / "evaluation", "nothing is replaced"),
    ):
        ran = CliRunner().invoke(app, ["eval", "absent", "--output", str(folder)])  # no model is looked for
        assert said in str(ran.exception)


def test_a_runs_own_folder_is_looked_at_before_anything_is_measured(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi3_dist.api.evaluate", lambda *_, **__: pytest.fail("it was measured"))
    here = tmp_path / "run"
    shutil.copytree(run, here)
    (here / "evaluation.json").write_text('{"mine": 1}')
    ran = CliRunner().invoke(app, ["eval", str(here)])
    assert "nothing is replaced" in str(ran.exception)


def test_what_is_written_is_read_by_the_page(run: Path, beside_base: Evaluation, tmp_path: Path) -> None:
    written = beside_base.write(run)
    found = json.loads(written.read_text())
    assert found["adapter"]["heldout_loss"] == beside_base.numbers["heldout_loss"]
    assert {"adapter", "base", "difference", "from (95 %)", "to (95 %)", "data", "samples"} <= set(found)
    kept = [json.loads(line) for line in (run / "evaluation_rows.jsonl").read_text().splitlines()]
    assert len(kept) == 5
    assert {"prompt", "wanted", "adapter", "base", "exact_match", "chrf", "place"} == set(kept[0])
    worst = [row["chrf"] + row["exact_match"] for row in kept]
    assert worst == sorted(worst)
    page = write_page(run).read_text()
    assert "from (95 %)" in page
    assert "heldout_loss" in page
    from phi3_dist.training.run_folder import RunFolder

    RunFolder(run).check(overwrite=True)  # both files are a run's: replacing it takes them along


def test_other_rows_and_another_run(run: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"Question {i}?", "completion": f"Answer {i}."} for i in range(4)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    against = run / "checkpoints" / "step_000002"
    request = EvaluationRequest(str(data), against=str(against), generate=2, metrics=("regex:(\\d+)",))
    found = evaluate(run / "adapter", request, how=SHORT)
    assert [side.name for side in found.sides] == ["adapter", "against"]
    assert len(found.sides[0].losses.tokens_R) == 4
    assert sorted(row["wanted"] for row in found.asked) == ["Answer 0.", "Answer 2."]
    assert found.sides[0].numbers["heldout_loss"] != found.sides[1].numbers["heldout_loss"]


def refused(kind: type[Phi3DistError], run: Path | str, request: EvaluationRequest) -> str:
    with pytest.raises(kind) as error:
        evaluate(run, request, how=SHORT)
    assert all(problem.where for problem in error.value.problems)
    assert any(problem.fix for problem in error.value.problems)
    return str(error.value)


def test_mistakes_are_told_with_place_and_fix(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def bad(answer, wanted):\n    raise KeyError('x')\nNONE = None\ndef nan(a, w):\n    return float('nan')\n"
    )
    (tmp_path / "asks.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    (tmp_path / "text.jsonl").write_text('{"text": "Once upon a time."}\n')
    assert "asks.jsonl:1" in refused(DataError, run, EvaluationRequest("asks.jsonl"))
    assert "text.jsonl:1" in refused(DataError, run, EvaluationRequest("text.jsonl"))
    assert "raised KeyError" in refused(DataError, run, EvaluationRequest(generate=1, metrics=("mine:bad",)))
    assert "NaN" in refused(DataError, run, EvaluationRequest(generate=1, metrics=("mine:nan",)))
    assert "not a function" in refused(ConfigError, run, EvaluationRequest(metrics=("mine:NONE",)))
    assert "has no absent" in refused(ConfigError, run, EvaluationRequest(metrics=("mine:absent",)))
    assert "no module" in refused(ConfigError, run, EvaluationRequest(metrics=("not_there:f",)))
    assert "is not a metric" in refused(ConfigError, run, EvaluationRequest(metrics=("bleu",)))
    assert "regular expression" in refused(ConfigError, run, EvaluationRequest(metrics=("regex:(",)))
    assert "finds nothing" in refused(DataError, run, EvaluationRequest(generate=1, metrics=("regex:QQQ(.)",)))
    assert "cannot be combined" in refused(ConfigError, run, EvaluationRequest(base=True, against="x"))
    assert "not inside a run" in refused(DataError, "tiny-random", EvaluationRequest())
    assert "a base itself" in refused(ConfigError, "tiny-random", EvaluationRequest("asks.jsonl", base=True))
    assert "no such folder" in refused(RunFolderError, run / "absent", EvaluationRequest())


def test_packages_that_are_missing_are_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"sacrebleu.*\n.*phi3-dist\[eval\]"):
        metric_of("chrf")
    assert scores.available()[0] == ["exact_match"]
    assert "rouge-score" in scores.available()[1][0]
    assert "lm-eval" in refused(MachineError, run, EvaluationRequest(tasks=("gsm8k",)))


@pytest.mark.parametrize(
    ("name", "answer", "wanted", "score"),
    [
        ("exact_match", " a b\n", "a b", 1.0),
        ("exact_match", "a b.", "a b", 0.0),
        ("rouge_l", "the cat sat", "the cat sat down", 6 / 7),
        ("chrf", "a latte", "a latte", 1.0),
        ("regex:####\\s*(-?[\\d.,]+)", "So 3 + 4.\n#### 1,007.", "#### 1007", 1.0),
        ("regex:####\\s*(-?[\\d.,]+)", "it is 1007", "#### 1007", 0.0),
        ("operator:eq", "a", "a", 1.0),
    ],
)
def test_scores(name: str, answer: str, wanted: str, score: float) -> None:
    assert scored(metric_of(name), [answer], [wanted], ["row 1"]) == pytest.approx([score])


def test_the_harness_numbers_are_flat() -> None:
    found = numbers_of(
        {"gsm8k": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.1, "alias": "g"}}
    )
    assert found == {"gsm8k exact_match (strict-match)": 0.5}


def test_the_verb_prints_a_table_and_writes_into_the_run(run: Path) -> None:
    words = ["eval", str(run), "--base", "--generate", "2", "--metric", "exact_match", "--max-new-tokens", "4"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "95 %" in done.output
    assert "heldout_loss" in done.output
    assert f"written: {run}/evaluation.json" in done.output
    assert json.loads((run / "evaluation.json").read_text())["answers"] == 2
