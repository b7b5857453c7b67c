"""The held-out loss: measured before the first step, joined for speed, limited, shown, and broken off by a signal."""

from __future__ import annotations

import functools
import io
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from phi3_dist.config.load import load_run
from phi3_dist.config.schema import DataConfig
from phi3_dist.data.pack.packs import evenly, make_packs
from phi3_dist.data.prepare import prepare
from phi3_dist.data.token_rows import TokenRows
from phi3_dist.machine.probe import probe
from phi3_dist.modeling.tokenizer import tiny_tokenizer
from phi3_dist.planning.facts import LaunchFacts, MachineFacts
from phi3_dist.training import held_out_loss as evaluate
from phi3_dist.training import whole_run
from phi3_dist.training.held_out_loss import joined_packs
from phi3_dist.training.monitor import metrics as metrics_module
from phi3_dist.training.monitor.metrics import Metrics
from phi3_dist.training.monitor.time_left import TimeLeft
from tests.ranks.launcher import REPO
from tests.ranks.test_resume import same_bits
from tests.ranks.test_strategies import rows

STEPS = 4
OPTIONS = (
    "model.precision=fp32", f"train.max_steps={STEPS}", "train.global_batch=2", "train.micro_batch=1",
    "train.eval_every=2", "data.max_rows=24", "data.pack_length=260", "data.validation_share=0.5",
    "log.trackers=[]", "save.every=2", "save.keep=9",
)  # fmt: skip


@functools.cache
def here() -> MachineFacts:
    return probe()


def train(folder: Path, *overrides: str, resume: bool = False) -> whole_run.TrainResult:
    cfg = load_run(REPO / "configs" / "run" / "debug.yaml", [*OPTIONS, *overrides, f"save.folder={folder}"])
    return whole_run.train(cfg, here(), LaunchFacts(), resume=resume, cache=folder.parent / "cache")


def measured(folder: Path) -> list[tuple[int, float, int]]:
    found = rows(folder, "eval")
    return [(row["step"], row["heldout_loss"], row["supervised_tokens"]) for row in found]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass for each pack."""
    monkeypatch.setattr(evaluate, "JOINED", 1)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run that nobody disturbs, and the forward passes of each of its three evaluations."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "JOINED", 1)
        calls = killed_in_forward(0, patch)
        assert train(folder).exit_code == 0
    assert len(calls) % 3 == 0
    return folder, len(calls) // 3


@pytest.fixture
def undisturbed(reference: tuple[Path, int]) -> Path:
    return reference[0]


def killed_in_forward(number: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """SIGTERM when the evaluations' forward pass of this number is about to begin; what counts them."""
    calls: list[int] = []
    before = evaluate.to_device

    def counted(*arguments: Any) -> Any:
        calls.append(len(calls) + 1)
        if calls[-1] == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(*arguments)

    monkeypatch.setattr(evaluate, "to_device", counted)
    return calls


# --- a baseline, and the same numbers whatever is joined -------------------------------------------------------------


def test_there_is_a_baseline_and_joined_packs_give_its_numbers(
    reference: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = reference[0]
    calls = killed_in_forward(0, monkeypatch)
    assert train(tmp_path / "run").exit_code == 0
    ours, theirs = measured(tmp_path / "run"), measured(undisturbed)
    assert [step for step, _, _ in ours] == [0, 2, 4] == [step for step, _, _ in theirs]
    for (_, our, tokens), (_, their, same_tokens) in zip(ours, theirs, strict=True):
        assert our == pytest.approx(their, rel=1e-6)
        assert tokens == same_tokens > 0
    assert ours[-1][1] < ours[0][1], "it has learned"
    assert len(calls) <= 3 * (reference[1] / 2), "half as many forward passes at least"
    same_bits(tmp_path / "run", undisturbed)


def some_packs(lengths: list[int], pack_length: int) -> Any:
    ids = np.arange(sum(lengths), dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    supervised = np.ones(len(ids), np.bool_)
    return make_packs(TokenRows(ids, supervised, offsets, [f"r:{n}" for n in range(len(lengths))]), pack_length, "drop")


def test_neighbours_are_joined_up_to_so_many_tokens() -> None:
    packs, _ = some_packs([60, 60, 60, 30, 30, 60], 64)
    assert joined_packs(packs, 128) == [[0, 1], [2, 3], [4]]
    assert joined_packs(packs, 60) == joined_packs(packs, 0) == [[0], [1], [2], [3], [4]]
    assert joined_packs(packs, 10_000) == [[0, 1, 2, 3, 4]]


# --- a limit ---------------------------------------------------------------------------------------------------------


def test_a_limit_takes_rows_evenly_and_says_so(tmp_path: Path) -> None:
    packs, _ = some_packs([20] * 10, 64)
    fewer = evenly(packs, 4)
    assert list(fewer.rows.places) == ["r:0", "r:2", "r:5", "r:7"]
    assert evenly(packs, 10) is evenly(packs, None) is packs
    source = REPO / "configs" / "run" / "debug_chats.jsonl"
    limits = (None, 3)
    all_of_them, few = (
        prepare(
            DataConfig(train=str(source), validation_share=0.3, max_validation_rows=limit), tiny_tokenizer(), tmp_path
        )
        for limit in limits
    )
    assert all_of_them.held_out is not None
    assert few.held_out is not None
    assert len(all_of_them.held_out.rows) > len(few.held_out.rows) == 3
    assert few.cached, "the limit is not part of what is tokenized"
    assert few.fingerprint == all_of_them.fingerprint
    (said,) = [notice for notice in few.notices if "max_validation_rows" in notice]
    assert said.startswith("held-out loss over 3 of ")
    assert not any("max_validation_rows" in notice for notice in all_of_them.notices)


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("evaluation", "stopped_at"), [(0, 0), (1, 2), (2, 4)])
def test_a_signal_breaks_an_evaluation_off_and_nothing_is_lost(
    evaluation: int, stopped_at: int, reference: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step, between two, and after the last; the next start measures what was broken off."""
    folder, (undisturbed, groups) = tmp_path / "run", reference
    with monkeypatch.context() as patch:
        calls = killed_in_forward(evaluation * groups + 3, patch)
        result = train(folder)
    assert (result.exit_code, result.stopped_by, result.steps) == (75, signal.SIGTERM, stopped_at)
    assert len(calls) == evaluation * groups + 3, "it stops before the next pack"
    assert [step for step, _, _ in measured(folder)] == [0, 2, 4][:evaluation]
    assert (folder / "checkpoints").exists() == (stopped_at > 0)
    assert train(folder, resume=True).exit_code == 0
    assert measured(folder) == measured(undisturbed)
    same_bits(folder, undisturbed)


# --- what is shown ---------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass when told."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_an_evaluation_shows_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = Clock(), io.StringIO()
    monkeypatch.setattr(metrics_module, "time", clock)
    with Metrics(tmp_path / "metrics.jsonl", 9, None, active=True) as metrics:  # type: ignore[arg-type]
        metrics.console = Console(file=out, width=200)
        for second in range(1, 61):
            clock.now = float(second)
            metrics.evaluating(second / 60, 60.0 - second)
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("held-out loss: 25% measured  left 45 s")


def test_where_a_bar_is_shown_the_lines_of_steps_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics_module, "Console", functools.partial(Console, force_terminal=True, width=80))
    kept: list[str] = []
    row = {"loss": 1.5, "lr": 1e-4, "grad_norm": 0.5, "supervised_tokens_per_s": 1234.0}
    with Metrics(tmp_path / "metrics.jsonl", 9000, None, active=True, keep=kept.append) as metrics:  # type: ignore[arg-type]
        monkeypatch.setattr(metrics, "_write", lambda row: None)
        metrics.train({"step": 8999, **row}, 4000.0)
        monkeypatch.setattr(metrics, "_evaluation_told", -1e9)
        metrics.evaluating(0.25, 59.6)
    assert kept == ["step 8999/9000  loss 1.5000  lr 1.00e-04  |g| 0.500  1,234 supervised tok/s  left 4000 s"]
    shown = capsys.readouterr().out
    assert "1,234 supervised tok/s  left 1:06:40" in shown
    assert "held-out loss: 25% measured  left 1:00" in shown


def test_the_time_left_counts_evaluations_and_checkpoints() -> None:
    cfg = load_run(REPO / "configs" / "run" / "debug.yaml", ["train.eval_every=10", "save.every=50"])
    time_left = TimeLeft(cfg, 100, evaluation_steps=30.0)
    time_left.step(2.0)
    assert time_left.left_s(100) == 2.0 * 30 / 3, "the last step is made, and an evaluation follows"
    time_left.evaluation_s, time_left.save_s = 153.0, 4.0
    assert time_left.left_s(100) == 153 + 4
    assert time_left.left_s(95) == 5 * 2 + 153 + 4
    assert time_left.left_s(90) == 10 * 2 + 2 * 153 + 4, "that of step 90 is still to come"
    assert time_left.left_s(0) == 100 * 2 + 10 * 153 + 2 * 4
    without = TimeLeft(load_run(REPO / "configs" / "run" / "debug.yaml", ["save.every=0"]), 100, evaluation_steps=0.0)
    without.step(2.0)
    assert without.left_s(100) == 0
