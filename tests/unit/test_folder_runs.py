"""Whole runs and their folder: what they leave, what they replace, what becomes of them when it is moved."""

from __future__ import annotations

import importlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from phi3_dist.config.load import load_run
from phi3_dist.errors import ModelError
from phi3_dist.machine.probe import probe
from phi3_dist.planning.facts import LaunchFacts
from phi3_dist.report.curves_png import draw_curves
from phi3_dist.report.page import write_page
from phi3_dist.training import whole_run
from phi3_dist.training.checkpoints.compatibility import base_fingerprint
from phi3_dist.training.preflight.trackers_and_inputs import TRACKERS
from phi3_dist.training.run_folder_contents import foreign_entries
from phi3_dist.training.signals import Stopped
from tests.ranks.launcher import REPO
from tests.unit.test_folder import claimed, contents
from tests.unit.test_page import read as read_page

SMALL = (
    f"data.train={REPO / 'configs/run/debug_chats.jsonl'}",
    "model.precision=fp32",
    "data.max_rows=12",
    "train.max_steps=4",
    "train.global_batch=2",
    "save.every=1",
)


def train(folder: Path, *overrides: str, **options: Any) -> whole_run.TrainResult:
    cfg = load_run(REPO / "configs/run/debug.yaml", (*SMALL, f"save.folder={folder}", *overrides))
    launch = LaunchFacts(world_size=1, nodes=1, strategy="single", use_cpu=True)
    return whole_run.train(cfg, probe(use_cpu=True), launch, cache=folder.parent / "cache", **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that a run leaves, its report drawn."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(folder, "lora.init=pissa", "train.profile=1", "train.eval_every=2")
    draw_curves(folder)
    write_page(folder)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs" / "run"))


def test_a_runs_page_has_a_chart_of_each_measure_and_its_lengths(trained: Path) -> None:
    reader = read_page(trained / "report.html")
    charts = [chart["id"] for chart in json.loads(reader.data)["charts"]]
    assert charts == ["loss", "lr", "grad_norm", "speed", "parts", "memory"]  # of a CPU no limit is measured
    assert [row[0] for row in reader.tables["Time"]][-4:] == ["forward", "backward", "update", "the rest"]
    for part in ("Memory, as planned for each rank", "Lengths, in tokens", "How to load and serve it", "Adapter"):
        assert part in reader.text
    assert reader.facts["processes"] == "1 process"
    assert reader.facts["measured, most"].endswith("the whole process, libraries too")


def test_a_run_knows_all_that_it_leaves(trained: Path) -> None:
    assert (trained / "start.safetensors").is_file()
    assert (trained / "profile" / "table.txt").is_file()
    assert any((trained / "logs").rglob("events.out.*"))
    assert foreign_entries(trained) == []


def test_a_replaced_run_goes_with_the_first_step_of_the_new_one(run: Path) -> None:
    train(run, overwrite=True)
    assert not (run / "start.safetensors").exists()
    assert not any(p.name in {".replaced", ".leaving"} for p in run.iterdir())
    assert foreign_entries(run) == []


@pytest.mark.parametrize("error", [ModelError("no"), Stopped(15), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_a_replaced_run_comes_back_where_the_new_one_makes_no_step(
    error: BaseException, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(run)

    def build_model(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(whole_run, "build_model", build_model)
    with pytest.raises(type(error)) as raised:
        train(run, overwrite=True)
    assert contents(run) == before
    assert "is back" in str(raised.value.__notes__)
    assert "is back" in str(getattr(raised.value, "problems", "is back"))


def test_a_whole_run_follows_its_folder_and_leaves_the_next_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Moved between two steps, and another run begun under the name: neither gets a byte of the other."""
    steps: Any = importlib.import_module("phi3_dist.training.step_loop")
    original, second = steps.train_step, tmp_path / "run"

    def train_step(*args: Any, **options: Any) -> Any:
        if args[4] == 2:
            second.rename(tmp_path / "moved")
            claimed(second).write("config.yaml", "second")
        return original(*args, **options)

    monkeypatch.setattr(steps, "train_step", train_step)
    result = train(second)
    assert result.folder == tmp_path / "moved"
    assert json.loads((tmp_path / "moved" / "exit.json").read_text())["state"] == "finished"
    assert sorted(p.name for p in (tmp_path / "moved" / "checkpoints").iterdir()) == ["step_000003", "step_000004"]
    assert (tmp_path / "moved" / "adapter" / "adapter_model.safetensors").is_file()
    assert sorted(contents(second)) == [".phi3_dist_run", "config.yaml"]
    assert "was moved to" in capsys.readouterr().out


def test_first_starts_beside_each_other_share_no_file(tmp_path: Path) -> None:
    """Runs that hash the same weights for the first time, into one cache."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    base = SimpleNamespace(folder=tmp_path / "base", source="base")
    starts = 400

    def start(number: int) -> str:
        return base_fingerprint(base, tmp_path / "cache")  # type: ignore[arg-type]

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(start, range(starts)))
    assert len(found) == 1
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["weights.json"]


def test_the_trackers_are_accelerates() -> None:
    assert sorted(TRACKERS) == sorted(LOGGER_TYPE_TO_CLASS)
    here = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    assert {name for name, packages in TRACKERS.items() if any(map(find_spec, packages))} == here
