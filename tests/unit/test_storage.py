"""What a file system refuses is told apart; a finished cache is read by who may not write; no home is not a crash."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from phi3_dist.config.load import load_run
from phi3_dist.config.schema import DataConfig
from phi3_dist.data import prepare as preparing
from phi3_dist.data.prepare import prepare
from phi3_dist.errors import DataError, MachineError, RunFolderError
from phi3_dist.machine import doctor
from phi3_dist.machine.launch_request import read_command_line
from phi3_dist.machine.storage import cache_folder, shared_memory_bytes, shared_memory_problem, storage_fault
from phi3_dist.modeling.tokenizer import tiny_tokenizer
from phi3_dist.training.checkpoints.compatibility import FREE
from phi3_dist.training.run_folder import RunFolder

ERRORS = {
    errno.EACCES: "may not be written by this user",
    errno.EROFS: "read-only",
    errno.ENOSPC: "full",
    errno.EDQUOT: "your quota",
    errno.ENOLCK: "gives out no locks (ENOLCK)",
    errno.EOPNOTSUPP: "has no locks (EOPNOTSUPP)",
    errno.ESTALE: "no longer knows it (ESTALE)",
}


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    os.utime(rows, (1, 1))
    return DataConfig(train=str(rows), validation_share=0.0, pack_length=64)


def lock_that_fails(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def acquire(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(preparing.FileLock, "acquire", acquire)


@pytest.mark.parametrize("number", ERRORS)
def test_what_the_caches_file_system_refuses_is_told_apart(
    number: int, data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_that_fails(monkeypatch, number)
    with pytest.raises(DataError) as caught:
        prepare(data, tiny_tokenizer(), tmp_path / "cache")
    (problem,) = caught.value.problems
    assert ERRORS[number] in problem.what
    assert "XDG_CACHE_HOME, or data.cache in the run file" in problem.fix
    assert len({storage_fault(OSError(one, "x"))[0] for one in ERRORS}) == len(ERRORS)


def files(folder: Path) -> dict[Path, int]:
    """Without the stamps, which are written where that works."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != "stamp.json")
    return {path: path.stat().st_mtime_ns for path in found}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_finished_cache_is_read_without_a_lock_or_a_write(
    number: int, data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = prepare(data, tiny_tokenizer(), cache)
    before = files(cache)
    lock_that_fails(monkeypatch, number)
    again = prepare(data, tiny_tokenizer(), cache)
    assert (again.fingerprint, again.cached) == (first.fingerprint, True)
    shorter = prepare(data.model_copy(update={"pack_length": 48}), tiny_tokenizer(), cache)
    assert shorter.train.packs, "packs that are not kept are made in memory"
    assert files(cache) == before
    with pytest.raises(DataError):  # of other rows nothing is there
        prepare(data.model_copy(update={"max_rows": 1}), tiny_tokenizer(), cache)


def test_the_hash_of_a_source_need_not_be_remembered(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "denied")

    with monkeypatch.context() as patched:
        patched.setattr(preparing, "write_whole", denied)
        key = preparing._cache_key(data, tiny_tokenizer(), tmp_path)
    assert key == preparing._cache_key(data, tiny_tokenizer(), tmp_path)


def test_where_the_cache_lies_changes_no_key_and_no_run(data: DataConfig, tmp_path: Path) -> None:
    elsewhere = data.model_copy(update={"cache": "/elsewhere"})
    assert preparing._cache_key(data, tiny_tokenizer(), tmp_path) == preparing._cache_key(
        elsewhere, tiny_tokenizer(), tmp_path
    )
    assert "data.cache".startswith(FREE)


def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose uid has no passwd entry."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))


def test_a_user_without_a_home_is_told_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_home(monkeypatch)
    with pytest.raises(MachineError) as caught:
        cache_folder()
    (problem,) = caught.value.problems
    assert "has no home folder here" in problem.what
    assert "XDG_CACHE_HOME" in problem.fix
    assert "data.cache" in problem.fix
    assert cache_folder("/named") == Path("/named")
    run = tmp_path / "run.yaml"
    run.write_text("model: {source: tiny-random}\ndata: {train: x, cache: /named}\n")
    assert load_run(run).data.cache == "/named"
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert cache_folder() == Path("/there/phi3_dist")


def test_nothing_else_needs_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    no_home(monkeypatch)
    assert read_command_line(["accelerate", "launch", "train.py"], Path.cwd(), {}) is None
    assert doctor.extensions_root({}) == Path("~/.cache/torch_extensions")
    (finding,) = doctor._cache()
    assert (finding.level, "XDG_CACHE_HOME" in finding.fix) == ("bad", True)


def test_the_doctor_sees_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert [finding.level for finding in doctor._cache()] == ["ok"]
    monkeypatch.setattr("os.access", lambda *_: False)
    (finding,) = doctor._cache()
    assert finding.level == "bad"
    assert "data.cache" in finding.fix


@pytest.mark.parametrize(("number", "goes_on"), [(errno.ENOLCK, True), (errno.EOPNOTSUPP, True), (errno.ESTALE, False)])
def test_a_run_folder_without_locks_says_so_and_a_lost_one_ends_it(
    number: int, goes_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = RunFolder(tmp_path / "run")
    if goes_on:
        folder.claim(overwrite=False)
        assert ERRORS[number] in capsys.readouterr().err
    else:
        with pytest.raises(RunFolderError, match="ESTALE"):
            folder.claim(overwrite=False)


def test_a_small_shared_memory_is_named_before_deepspeed_dies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    docker = 64 * 2**20
    problem = shared_memory_problem(2, docker)
    assert problem is not None
    assert "has 64 MiB, and DeepSpeed's 2 ranks on this node share 132 MiB" in problem.what
    assert "--shm-size=1g" in problem.fix
    assert shared_memory_problem(2, None) is shared_memory_problem(2, 2**30) is None
    assert shared_memory_bytes("/nowhere") is None
    monkeypatch.setattr(doctor, "shared_memory_bytes", lambda: docker)
    (finding,) = doctor._shared_memory(doctor.probe(use_cpu=True))
    assert (finding.level, "64 MiB" in finding.what) == ("warn", True)


def test_an_endpoints_password_is_not_shown() -> None:
    found = " ".join(finding.what for finding in doctor._hub({"HF_ENDPOINT": "https://me:secret@mirror.example/hf"}))
    assert "mirror.example/hf" in found
    assert "secret" not in found
