"""The verb of the cache: what is there, and taking out what nobody uses; nothing else is touched."""

from __future__ import annotations

import gc
import json
import os
import time
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from phi3_dist.cli import app
from phi3_dist.config.schema import DataConfig
from phi3_dist.data.cache.prune import by_data_set, cached, computed_lora_inits, days_of, prune
from phi3_dist.data.prepare import prepare
from phi3_dist.errors import ConfigError
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
    listed = cache_verb("--runs", str(tmp_path / "runs"))
    assert f"{cache}: " in listed
    assert entry.name in listed
    assert "rows.jsonl" in listed
    assert "3 rows" in listed
    assert "start.safetensors" in listed
    assert "of hashes, measurements and locks" in listed
    assert "removed 0 entries" in cache_verb("--prune")
    would = cache_verb("--prune", "--older-than", "0", "--dry-run")
    assert "would remove 1 entry" in would
    assert "rows.jsonl" in would
    assert entry.exists()
    assert "removed 1 entry" in cache_verb("--prune", "--older-than", "0")
    assert not entry.exists()
    (tmp_path / "other").mkdir()
    assert f"{tmp_path / 'other'}: 0.0 MiB in 0 entries" in cache_verb("--folder", str(tmp_path / "other"))


def cache_verb(*words: str) -> str:
    done = CliRunner().invoke(app, ["cache", *words])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_verbs_mistakes(cache: Path) -> None:
    for words, says in (
        (("--dry-run",), "cache --prune --dry-run"),
        (("--prune", "--older-than", "soon"), "'soon' is not an age"),
        (("--folder", str(cache / "nowhere")), "is not a folder"),
    ):
        done = CliRunner().invoke(app, ["cache", *words])
        assert isinstance(done.exception, ConfigError)
        assert says in str(done.exception)


@pytest.mark.parametrize(("text", "days"), [("30d", 30), ("2w", 14), ("12h", 0.5), ("1d12h", 1.5), ("0", 0), ("7", 7)])
def test_ages(text: str, days: float) -> None:
    assert days_of(text) == days


@pytest.mark.parametrize("text", ["", "soon", "-1d", "d", "30m", "1 month"])
def test_what_is_no_age(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an age"):
        days_of(text)


def test_an_entry_stays_while_its_rows_are_mapped(cache: Path) -> None:
    """The lock is the system's, so that another process sees it too."""
    entry = made(cache, "mapped")
    cfg = DataConfig(train=str(cache.parent / "mapped.jsonl"), validation_share=0, pack_length=64)
    data = prepare(cfg, TOKENIZER, cache)
    packs = data.train
    del data
    assert [one.in_use for one in cached(cache)] == [True]
    assert [held.path for held in prune(cache, None, 0)[1]] == [entry]
    said = cache_verb("--prune", "--older-than", "0")
    assert "removed 0 entries" in said
    assert f"kept {entry}: in use" in said
    assert "in use" in cache_verb()
    assert len(packs.rows) == 3
    del packs
    gc.collect()
    assert [one.in_use for one in cached(cache)] == [False]
    assert [gone.path for gone in prune(cache, None, 0)[0]] == [entry]


def test_entries_of_one_data_set_stand_together(cache: Path) -> None:
    source = cache.parent / "a.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": f"a {i}", "completion": "a" * 200}) for i in range(3)))
    for share in (0.0, 0.4):
        prepare(DataConfig(train=str(source), validation_share=share, pack_length=512), TOKENIZER, cache)
    made(cache, "b")
    found = by_data_set(cached(cache))
    assert sorted((one.name, len(one.entries)) for one in found) == [("a.jsonl", 2), ("b.jsonl", 1)]
    assert [one.bytes for one in found] == sorted((one.bytes for one in found), reverse=True)
    assert found[0].used == max(entry.used for entry in found[0].entries)
