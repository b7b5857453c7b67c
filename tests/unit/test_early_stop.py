"""What ends a run early, which state becomes its adapter, and what it answers on the way; killed or not, the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from phi3_dist.config.load import load_run
from phi3_dist.config.schema import TrainConfig
from phi3_dist.errors import ConfigError, TrainingError
from phi3_dist.inference.engine import answers
from phi3_dist.inference.opening import open_model
from phi3_dist.machine.probe import probe
from phi3_dist.modeling.generate import stop_ids
from phi3_dist.modeling.packed_answers import packed_answers
from phi3_dist.planning.facts import LaunchFacts
from phi3_dist.training import evaluate, step_loop, whole_run
from phi3_dist.training.evaluate import HeldOut
from phi3_dist.training.patience import Patience
from tests.ranks.launcher import REPO
from tests.ranks.test_strategies import rows

OPTIONS = (
    "model.precision=fp32", "train.max_steps=8", "train.global_batch=2", "train.micro_batch=1", "train.eval_every=1",
    "data.max_rows=24", "data.pack_length=260", "data.validation_share=0.5", "log.trackers=[]", "save.every=3",
    "save.keep=9", "train.patience=2",
)  # fmt: skip
LOSSES = [5.0, 4.0, 3.0, 3.5, 3.2, 3.1, 2.9, 2.8, 2.7]
"""After each step, from before the first on: two evaluations without improvement end the run after step 4."""


def train(folder: Path, *overrides: str, resume: bool = False) -> whole_run.TrainResult:
    cfg = load_run(REPO / "configs/run/debug.yaml", [*OPTIONS, *overrides, f"save.folder={folder}"])
    return whole_run.train(cfg, probe(), LaunchFacts(), resume=resume, cache=folder.parent / "cache")


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Held-out losses as given, in the order of the steps; the list may be changed."""
    given, real = list(LOSSES), step_loop._evaluate

    def measured(stage: Any, step: int) -> tuple[HeldOut | None, int]:
        monkeypatch.setattr(step_loop, "held_out_loss", lambda *_: (HeldOut(given[step], 10, 0.1), 0))
        return real(stage, step)

    monkeypatch.setattr(step_loop, "_evaluate", measured)
    return given


def trainer(folder: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"checkpoints/step_{step:06d}/trainer.json").read_text())
    return found


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return set(ours) == set(theirs) and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_run_that_learns_no_more_ends(
    tmp_path: Path, losses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(tmp_path / "run")
    assert (result.steps, result.exit_code, result.state) == (4, 0, "finished")
    assert len(rows(tmp_path / "run")) == 4
    assert [row["step"] for row in rows(tmp_path / "run", "early_stop")] == [4]
    assert "2 evaluations in a row have not improved on the held-out loss 3.0000" in capsys.readouterr().out
    assert (tmp_path / "run/checkpoints/step_000004").is_dir()  # out of turn: what the adapter is
    assert train(tmp_path / "run", resume=True).steps == 0  # it has finished

    # killed after the checkpoint of step 3, with one of the two evaluations behind it: it ends at the same step
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    for gone in ("adapter", "checkpoints/step_000004"):
        shutil.rmtree(tmp_path / "killed" / gone)
    (tmp_path / "killed/exit.json").unlink()
    assert train(tmp_path / "killed", resume=True).steps == 4
    assert same(adapter_of(tmp_path / "killed"), adapter_of(tmp_path / "run"))

    # killed between the last checkpoint and the adapter: nothing is trained any more
    shutil.rmtree(tmp_path / "killed/adapter")
    (tmp_path / "killed/exit.json").unlink()
    result = train(tmp_path / "killed", resume=True)
    assert result.steps == 4
    assert same(adapter_of(tmp_path / "killed"), adapter_of(tmp_path / "run"))


def test_the_best_state_becomes_the_adapter(tmp_path: Path, losses: list[float]) -> None:
    result = train(tmp_path / "run", "save.final=best", "save.keep=1")
    assert result.steps == 4
    assert result.held_out is not None
    assert result.held_out.loss == 3.0
    best = open_model(tmp_path / "run/checkpoints/step_000002")  # between two saves: kept since it was the best
    ended = open_model(tmp_path / "run")
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        assert torch.allclose(ended.model(input_ids=ids).logits, best.model(input_ids=ids).logits, atol=1e-6)
    last = open_model(tmp_path / "run/checkpoints/step_000004")
    with torch.no_grad():
        assert not torch.allclose(ended.model(input_ids=ids).logits, last.model(input_ids=ids).logits, atol=1e-5)
    assert "3.0" in (tmp_path / "run/adapter/README.md").read_text()


def test_a_best_checkpoint_that_is_damaged_is_no_adapter(
    tmp_path: Path, losses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = whole_run.Saver.settle_on_final

    def damaged(self: Any, *facts: Any) -> Any:
        (tmp_path / "run/checkpoints/step_000002/state.safetensors").write_bytes(b"torn")
        return settle(self, *facts)

    monkeypatch.setattr(whole_run.Saver, "settle_on_final", damaged)
    with pytest.raises(TrainingError, match=r"step_000002: was the best.*\n.*save\.final=last"):
        train(tmp_path / "run", "save.final=best")
    monkeypatch.undo()
    assert train(tmp_path / "run", "save.final=last", "train.eval_every=0", "train.patience=0", resume=True).steps == 8


def test_a_checkpoint_tells_the_loss_of_its_own_step_alone(tmp_path: Path, losses: list[float]) -> None:
    """Measured every 2 steps, saved every 3: step 3 was not measured, and is not the best by step 2's loss."""
    losses[:] = [9.0, 9.0, 2.0, 9.0, 9.0, 9.0, 4.0, 9.0, 9.0]
    train(tmp_path / "run", "train.eval_every=2", "train.patience=0")
    assert trainer(tmp_path / "run", 3)["heldout_loss"] is None
    assert trainer(tmp_path / "run", 3)["best"] is None
    assert trainer(tmp_path / "run", 6)["heldout_loss"] == 4.0
    assert trainer(tmp_path / "run", 8)["best"] == [4.0, 6]


def test_a_loss_that_is_no_number_is_null(tmp_path: Path, losses: list[float]) -> None:
    losses[1:] = [float("nan")] * 8
    train(tmp_path / "run", "save.every=1")
    texts = [
        (tmp_path / "run/metrics.jsonl").read_text(),
        (tmp_path / "run/checkpoints/step_000001/trainer.json").read_text(),
    ]

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    for text in (*texts[0].splitlines(), texts[1]):
        json.loads(text, parse_constant=refuse)
    assert [row["heldout_loss"] for row in rows(tmp_path / "run", "eval")] == [5.0, None, None]  # NaN is no improvement


def test_patience_counts_what_is_too_little() -> None:
    patience = Patience(TrainConfig(patience=2, min_improvement=0.1, eval_every=1))
    for step, loss in enumerate([3.0, 2.5, 2.45]):
        patience.saw(step, loss)
    assert not patience.exhausted()
    again = Patience(
        TrainConfig(patience=2, min_improvement=0.1, eval_every=1), json.loads(json.dumps(patience.state()))
    )
    again.saw(2, 2.45)  # measured again after a start: counted once
    assert not again.exhausted()
    again.saw(3, 2.41)
    assert again.exhausted()
    unhurried = Patience(TrainConfig(patience=0), again.state())
    assert not unhurried.exhausted()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("train.patience=2", "train.eval_every=0"), "train.patience"),
        (("train.min_improvement=0.1",), "train.min_improvement"),
        (("save.final=best", "train.eval_every=0"), "save.final"),
        (("save.final=best", "save.every=0", "train.eval_every=2"), "there are no checkpoints"),
        (("eval.generate=3", "data.validation_share=0"), "eval.generate"),
    ],
)
def test_what_cannot_be_is_refused(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_run(REPO / "configs/run/debug.yaml", overrides)


def test_answers_on_the_way_are_those_of_the_finished_adapter(tmp_path: Path) -> None:
    """Through the packed forward pass of training, without a cache: the same tokens as the batches of `generate`."""
    options = (
        "eval.generate=3",
        "eval.max_new_tokens=6",
        "train.max_steps=3",
        "train.patience=0",
        "train.eval_every=3",
    )
    train(tmp_path / "run", *options)
    found = rows(tmp_path / "run", "eval")
    assert [row["answers"] for row in found] == [3, 3]
    assert all(0 <= row[f"answers_{name}"] <= 1 for row in found for name in ("exact_match", "rouge_l", "chrf"))
    from phi3_dist.modeling.attention.backend import use_backend
    from phi3_dist.modeling.loss import PackedLoss

    opened = open_model(tmp_path / "run")
    prompts = [opened.tokenizer(text)["input_ids"] for text in ("Hi.", "Two lattes, please", "x")]
    stops = stop_ids(opened.model, opened.tokenizer)
    wanted = dict(answers(opened.model, prompts, stops, max_new_tokens=9))
    use_backend(opened.causal_lm, "sdpa")
    new, stop = packed_answers(
        PackedLoss(opened.model),
        prompts,
        stops,
        max_new_tokens=9,
        device=torch.device("cpu"),
        agree=lambda busy: (busy, 0),
    )
    assert new == [wanted[i].ids for i in range(3)]
    assert stop == 0
    broken_off = packed_answers(
        PackedLoss(opened.model),
        prompts,
        stops,
        max_new_tokens=9,
        device=torch.device("cpu"),
        agree=lambda busy: (True, 15),
    )
    assert broken_off == (None, 15)
    assert evaluate.HeldOut.of_checkpoint(0.0).perplexity == 1.0
