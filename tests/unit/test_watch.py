"""Weight files that somebody writes to: between the hash and the loading, and while a run reads them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Phi3ForCausalLM

from phi3_dist.adapters import durable_files as disk
from phi3_dist.config.load import load_run
from phi3_dist.errors import ModelError
from phi3_dist.machine.launcher import _ended
from phi3_dist.machine.probe import probe
from phi3_dist.modeling.base import find_base, load_full, tiny_config
from phi3_dist.modeling.tokenizer import tiny_tokenizer
from phi3_dist.modeling.weights_watch import WeightsWatch
from phi3_dist.planning.facts import LaunchFacts
from phi3_dist.training import step_loop, whole_run
from phi3_dist.training import train_step as step
from phi3_dist.training.checkpoints import compatibility
from phi3_dist.training.checkpoints.compatibility import base_fingerprint
from tests.ranks.launcher import REPO

CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    Phi3ForCausalLM(tiny_config()).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def rewrite(path: Path) -> None:
    """Other bytes of the same number in the same file, and its old time."""
    raw, stat = bytearray(path.read_bytes()), path.stat()
    raw[-1] ^= 1
    with path.open("rb+") as file:
        file.write(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_hash_is_not_remembered_for_other_bytes_of_the_same_size_and_time(saved: Path, tmp_path: Path) -> None:
    base, cache = find_base(str(saved)), tmp_path / "cache"
    before = base_fingerprint(base, cache)
    assert base_fingerprint(base, cache) == before
    rewrite(saved / "model.safetensors")
    assert base_fingerprint(base, cache) != before


def test_weights_that_change_while_they_are_hashed(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = disk.file_sha256

    def meanwhile(path: Path) -> str:
        digest = plain(path)
        rewrite(path)
        return digest

    monkeypatch.setattr(compatibility, "file_sha256", meanwhile)
    with pytest.raises(ModelError, match="was changed while it was hashed"):
        base_fingerprint(find_base(str(saved)), tmp_path / "cache")
    monkeypatch.undo()
    assert base_fingerprint(find_base(str(saved)), tmp_path / "cache")


@pytest.mark.parametrize("change", ["rewritten", "replaced", "removed"])
def test_weights_that_change_before_they_are_loaded(saved: Path, change: str) -> None:
    base, weights = find_base(str(saved)), saved / "model.safetensors"
    watch = WeightsWatch(base.folder)
    model = load_full(base, torch.float32, CPU)
    watch.loaded(model)
    if change == "rewritten":
        rewrite(weights)
    elif change == "replaced":
        (saved / "new").write_bytes(weights.read_bytes())
        (saved / "new").replace(weights)
    else:
        weights.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: was changed between hashing and loading"):
        watch.loaded(model)


def test_a_mapped_file_may_be_replaced_but_not_written_to(saved: Path) -> None:
    base, weights = find_base(str(saved)), saved / "model.safetensors"
    watch = WeightsWatch(base.folder)
    watch.check()
    watch.loaded(load_full(base, torch.float32, CPU))
    watch.check()
    raw = weights.read_bytes()
    with weights.open("rb+") as file:
        file.truncate(len(raw) - 4096)
    with pytest.raises(ModelError, match="was written to while the run reads it"):
        watch.check()
    (saved / "new").write_bytes(raw)
    (saved / "new").replace(weights)
    watch.check()
    copied = WeightsWatch(base.folder)
    copied.loaded(load_full(base, torch.bfloat16, CPU))
    weights.write_bytes(raw[:-1])
    copied.check()
    WeightsWatch(None).loaded(torch.nn.Linear(2, 2))


def test_a_run_whose_base_is_cut_short_ends_before_it_saves(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = step.train_step

    def then_cut_short(*arguments: Any, **more: Any) -> Any:
        result = plain(*arguments, **more)
        with (saved / "model.safetensors").open("rb+") as weights:
            weights.truncate((saved / "model.safetensors").stat().st_size - 1)
        return result

    monkeypatch.setattr(step_loop, "train_step", then_cut_short)
    settings = [f"model.source={saved}", f"save.folder={tmp_path / 'run'}", "model.precision=fp32", "save.every=1"]
    settings += ["train.max_steps=2", "log.trackers=[]", "train.global_batch=1", "train.micro_batch=1"]
    cfg = load_run(REPO / "configs" / "run" / "debug.yaml", settings)
    with pytest.raises(ModelError, match=r"model\.safetensors: was written to while the run reads it"):
        whole_run.train(cfg, probe(), LaunchFacts(), cache=tmp_path / "cache")
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_a_bus_error_is_explained() -> None:
    assert "a mapped file was cut short" in _ended(1, -signal.SIGBUS).why
    assert "mapped" not in _ended(1, -signal.SIGKILL).why
