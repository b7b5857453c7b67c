"""The verbs of the cache: what is there, and taking out what nobody uses; nothing else is touched."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from phi3_dist.cli import app
from phi3_dist.config.schema import DataConfig
from phi3_dist.data.cache.prune import cached, computed_lora_inits, prune
from phi3_dist.data.prepare import prepare
from phi3_dist.modeling.tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
OLD_S = 40 * 86400


def made(cache: Path, name: str) -> Path:
    """An entry of the token cache, by its name the rows of `name`.jsonl."""
    source = cache.parent / f"{name}.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": f"{name} {i}", "completion": "a"}) for i in range(3)))
    before = set(cache.glob("*"))
    prepare(DataConfig(train=str(source), validation_share=0, pack_length=64), TOKENIZER, cache)
    (entry,) = (path for path in set(cache.glob("*")) - before if path.is_dir() and len(path.name) == 32)
    return entry


def aged(*folders: Path) -> None:
    then = time.time() - OLD_S
    for folder in folders:
        for path in (folder, *folder.rglob("*")):
            os.utime(path, (then, then))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "phi3_dist").mkdir()
    return tmp_path / "phi3_dist"


def test_what_is_old_goes_and_nothing_else(cache: Path) -> None:
    old, held, young, again = (made(cache, name) for name in ("old", "held", "young", "again"))
    others = [cache / "mine", cache / "weights.json", cache / ("g" * 32)]
    for other in others:
        other.mkdir()
    (cache / ("0" * 32)).symlink_to(cache.parent)
    aged(old, held, again, *others)
    made_again = DataConfig(train=str(cache.parent / "again.jsonl"), validation_share=0, pack_length=64)
    assert prepare(made_again, TOKENIZER, cache).cached  # used just now
    found = cached(cache)
    assert {entry.path for entry in found} == {old, held, young, again}
    assert {entry.what for entry in found} >= {"3 rows of old.jsonl", "3 rows of young.jsonl"}
    assert all(entry.bytes > 0 for entry in found)
    lock = FileLock(cache / f"{held.name}.lock", is_singleton=False)
    with lock:
        removed, kept = prune(cache, None, 30)
    assert [entry.path for entry in removed] == [old]
    assert [entry.path for entry in kept] == [held]
    assert not old.exists()
    assert all(path.exists() for path in (held, young, again, *others, cache.parent / "old.jsonl"))
    first = DataConfig(train=str(cache.parent / "old.jsonl"), validation_share=0, pack_length=64)
    assert not prepare(first, TOKENIZER, cache).cached  # and can be made again


def run_folder(root: Path, name: str, ended: str) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "exit.json").write_text(ended)
    (folder / "start.safetensors").write_bytes(b"x" * 100)
    aged(folder)
    return folder / "start.safetensors"


def test_computed_starts_of_finished_runs_alone(tmp_path: Path, cache: Path) -> None:
    runs = tmp_path / "runs"
    finished = run_folder(runs, "done", '{"state": "finished"}')
    others = [run_folder(runs, f"r{i}", ended) for i, ended in enumerate(('{"state": "preempted"}', "[]", "{"))]
    assert [entry.path for entry in computed_lora_inits(runs)] == [finished]
    assert prune(cache, None, 0) == ([], [])
    assert [entry.path for entry in prune(cache, runs, 30)[0]] == [finished]
    assert not finished.exists()
    assert all(path.exists() for path in others)


def test_the_verbs(cache: Path, tmp_path: Path) -> None:
    entry = made(cache, "rows")
    run_folder(tmp_path / "runs", "done", '{"state": "finished"}')
    listed = CliRunner().invoke(app, ["cache", "list", "--runs", str(tmp_path / "runs")])
    assert listed.exit_code == 0
    assert f"{cache}: " in listed.output
    assert entry.name in listed.output
    assert "3 rows of rows.jsonl" in listed.output
    assert "start.safetensors" in listed.output
    assert "removed 0 entries" in CliRunner().invoke(app, ["cache", "prune"]).output
    assert "removed 1 entries" in CliRunner().invoke(app, ["cache", "prune", "--days", "0"]).output
    assert not entry.exists()
