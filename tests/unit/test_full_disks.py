"""Disks that are full or have no inode left: one message, nothing half written, and what has finished has finished."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.numpy import save_file

from phi3_dist.adapters.files import write_adapter
from phi3_dist.adapters.loralib.files import convert_file
from phi3_dist.adapters.publishing import publish
from phi3_dist.adapters.reading import read_adapter
from phi3_dist.config.schema import DataConfig
from phi3_dist.data.prepare import Prepared, prepare
from phi3_dist.errors import AdapterError, DataError, RunFolderError
from phi3_dist.modeling.base import Base, find_base
from phi3_dist.modeling.tokenizer import tiny_tokenizer
from phi3_dist.report.finished_report import draw_report
from phi3_dist.sweep.table import Board
from phi3_dist.training import whole_run
from phi3_dist.training.checkpoints.compatibility import base_fingerprint
from phi3_dist.training.checkpoints.metrics_rows import cut_metrics
from phi3_dist.training.monitor.metrics import Metrics
from phi3_dist.training.monitor.transcript import Transcript
from phi3_dist.training.run_folder import RunFolder
from phi3_dist.training.whole_run import TrainResult
from tests.disks import Disk, small_disk, unfinished

TOKENIZER = tiny_tokenizer()
NAMES = ("lora_A", "lora_B")
TENSORS = {f"base_model.model.model.layers.0.mlp.down_proj.{n}.weight": torch.ones(2, 64) for n in NAMES}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path) as made:
        yield made


# --- the token cache --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    turns = [[{"role": "user", "content": f"Is {n} odd?"}, {"role": "assistant", "content": "Yes."}] for n in range(99)]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return DataConfig(train=str(path), pack_length=128, validation_share=0.2)


def attempt(rows: DataConfig, cache: Path) -> Prepared | None:
    try:
        return prepare(rows, TOKENIZER, cache)
    except DataError as error:
        (problem,) = error.problems
        assert problem.where == str(cache)
        assert "its file system is full" in problem.what
        assert "make room" in problem.fix
    return None


@pytest.mark.parametrize("lacks", ["pages", "inodes"])
def test_a_full_token_cache_is_one_message_and_keeps_no_more_than_is_finished(
    lacks: str, rows: DataConfig, disk: Disk
) -> None:
    """From no room for the first file to room for all: no half of a file stays, and with room it goes on."""
    there = prepare(rows, TOKENIZER, None).fingerprint
    outcomes = []
    for room in range(1, 40 if lacks == "pages" else 50):
        disk.mount(kib=4 * room) if lacks == "pages" else disk.mount(inodes=room + 1)
        cache = disk.path / "cache"
        done = attempt(rows, cache)
        outcomes.append(done is not None)
        if done is None:
            assert not unfinished(disk.path)
            disk.resize()
            done = attempt(rows, cache)
        assert done is not None
        assert done.fingerprint == there
        if outcomes[-1]:
            break
    assert outcomes[-1]
    assert outcomes.count(False) >= 8


# --- the adapter, its tokenizer included -----------------------------------------------------------------------------


def test_a_disk_that_fills_up_at_any_file_of_the_adapter_leaves_nothing(disk: Disk) -> None:
    disk.mount()
    failed = 0
    for pages in range(40):
        disk.leave(pages)
        said = ""
        try:
            config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
            write_adapter(disk.path / "adapter", TENSORS, config, card="# A card\n", tokenizer=TOKENIZER)
        except AdapterError as error:
            said = str(error)
        if not said:
            break
        failed += 1
        assert "No space left on device" in said
        assert "free some space" in said
        assert sorted(p.name for p in disk.path.iterdir()) == ["filler"]
    assert set(read_adapter(disk.path / "adapter")[0]) == set(TENSORS)
    assert failed >= 6


def test_a_full_disk_is_said_plainly_by_convert_and_publish(disk: Disk, tmp_path: Path) -> None:
    shapes = {"lora_A": (64, 512), "lora_B": (512, 64)}
    tensors = {f"base_model.model.layer.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    config = {"peft_type": "LORA", "r": 64, "lora_alpha": 4, "bias": "none", "target_modules": ["layer"]}
    write_adapter(tmp_path / "adapter", tensors, config, card="# A card\n")
    disk.mount()
    disk.leave(8)
    for name in ("lora.pt", "lora.safetensors"):
        with pytest.raises(AdapterError) as info:
            convert_file(tmp_path / "adapter", disk.path / name, "peft→loralib")
        assert info.value.problems[0].what == "cannot be written: No space left on device"
    with pytest.raises(AdapterError) as info:
        publish(tmp_path / "adapter", disk.path / "copy", "owner/name")
    assert info.value.problems[0].what == "cannot be written: No space left on device"
    assert sorted(p.name for p in disk.path.iterdir()) == ["filler"]


def test_a_full_disk_under_the_best_of_a_sweep_is_one_message(disk: Disk, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
    write_adapter(tmp_path / "run" / "adapter", TENSORS, config, card="# A card\n", tokenizer=TOKENIZER)
    disk.mount()
    disk.leave(1)
    folder = SimpleNamespace(path=tmp_path / "run")
    run = SimpleNamespace(state="finished", done=3, losses=lambda: (1.0, 1.0), folder=folder)
    with pytest.raises(RunFolderError, match="can't be copied there: No space left on device"):
        Board(SimpleNamespace(), [run], active=True).keep_best(disk.path)  # type: ignore[arg-type, list-item]
    assert sorted(p.name for p in disk.path.iterdir()) == ["filler"]


# --- metrics, on resume ----------------------------------------------------------------------------------------------


def metrics(*rows: dict[str, Any], tail: str = "") -> str:
    return "".join(json.dumps(row) + "\n" for row in rows) + tail


def test_rows_that_are_made_again_go_without_any_room(disk: Disk) -> None:
    disk.mount()
    path = disk.path / "metrics.jsonl"
    kept = [{"kind": "train", "step": step} for step in (1, 2)]
    path.write_text(metrics(*kept, {"kind": "train", "step": 3}, tail='{"kind": "tra'))
    disk.leave(0)
    cut_metrics(path, 2)
    assert path.read_text() == metrics(*kept)


def test_rows_that_must_be_written_anew_for_want_of_room_are_one_message(disk: Disk) -> None:
    disk.mount()
    path = disk.path / "metrics.jsonl"
    before = metrics({"kind": "train", "step": 1}) + "damaged\n" + metrics({"kind": "train", "step": 2})
    path.write_text(before)
    disk.leave(0)
    with pytest.raises(RunFolderError, match=r"metrics.jsonl: cannot be written(.|\n)*No space left"):
        cut_metrics(path, 2)
    assert path.read_text() == before
    assert not unfinished(disk.path)


# --- the end of a run ------------------------------------------------------------------------------------------------


def test_a_report_that_finds_no_room_is_no_failure_of_its_run(disk: Disk) -> None:
    disk.mount()
    row = {"kind": "train", "step": 1, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0}
    (disk.path / "metrics.jsonl").write_text(metrics(row))
    for pages in (0, 12, 34, 400):  # neither, neither, the page without the picture, both
        disk.leave(pages)
        text = draw_report(disk.path)
        assert not unfinished(disk.path)
        assert text.startswith("curves: ") == (pages == 400)
        if pages < 400:
            assert "No space left on device" in text
            assert f"phi3-dist report {disk.path}" in text
    assert (disk.path / "report.html").is_file()


def test_an_end_that_cannot_be_recorded_is_said_and_is_no_failure(
    disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.mount(inodes=4)
    folder = RunFolder(disk.path)
    for name in ("config.yaml", "metrics.jsonl", "plan.json"):
        (disk.path / name).write_text("")
    whole_run._record_exit(folder, TrainResult(disk.path, 3, None, None))
    assert "the run has ended, which could not be recorded" in capsys.readouterr().out
    assert not unfinished(disk.path)


# --- small ones -----------------------------------------------------------------------------------------------------


def test_a_run_folder_without_an_inode_for_its_metrics_is_one_message(disk: Disk) -> None:
    disk.mount(inodes=1)
    with pytest.raises(RunFolderError, match=r"metrics.jsonl: cannot be written: No space left"):
        Metrics(disk.path / "metrics.jsonl", 1, None, active=True)  # type: ignore[arg-type]


def test_a_hash_of_weights_that_cannot_be_remembered_is_computed_anew(disk: Disk, tmp_path: Path) -> None:
    base = find_base("tiny-random", None)
    (tmp_path / "base").mkdir()
    save_file({"w": torch.ones(3).numpy()}, tmp_path / "base" / "model.safetensors")
    base = Base(**{**vars(base), "folder": tmp_path / "base"})
    disk.mount(inodes=1)
    first = base_fingerprint(base, disk.path / "cache")
    disk.resize()
    assert base_fingerprint(base, disk.path / "cache") == first
    assert (disk.path / "cache" / "weights.json").is_file()
    disk.leave(0)
    (tmp_path / "base" / "other.safetensors").write_bytes((tmp_path / "base" / "model.safetensors").read_bytes())
    assert base_fingerprint(base, disk.path / "cache") != first
    assert not unfinished(disk.path)


def test_text_that_found_no_room_is_counted_in_the_file(disk: Disk) -> None:
    disk.mount()
    (disk.path / "run").mkdir()
    with Transcript() as transcript:
        print("before the folder")
        transcript.into(disk.path / "run", 0)
        disk.leave(0)
        for number in range(2000):
            transcript.line(f"line {number} that is long enough to need a page of its own now and then")
        disk.resize()
        print("after")
    lines = (disk.path / "run" / "logs" / "terminal" / "rank_000.log").read_text().splitlines()
    assert lines[1] == "before the folder"
    assert lines[-1] == "after"
    (said,) = [line for line in lines if "could not be kept here" in line]
    assert 1900 <= int(said.split()[1]) <= 2000
