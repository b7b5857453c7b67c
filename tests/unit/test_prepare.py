"""Preparing in blocks: the same result for every number of workers, after a kill, and from the mapped cache."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from rich.console import Console

from phi3_dist.cli.progress import progress_line
from phi3_dist.config.schema import DataConfig
from phi3_dist.data import blocks as stream
from phi3_dist.data import prepare
from phi3_dist.data.blocks import Block
from phi3_dist.data.cache import array_folders as store
from phi3_dist.data.cache import block_files as parts
from phi3_dist.data.pack.packs import PackList
from phi3_dist.data.prepare import Prepared
from phi3_dist.data.render.encode import Encoded
from phi3_dist.data.render.template_probe import ChatFormat
from phi3_dist.data.token_rows import RowsWriter, TokenRows
from phi3_dist.errors import DataError
from phi3_dist.machine import file_changes as file_state
from phi3_dist.modeling.tokenizer import tiny_tokenizer
from tests import warm

TOKENIZER = tiny_tokenizer()


def write(path: Path, n: int = 60) -> Path:
    rows: list[str] = [json.dumps({"prompt": f"q{i}", "completion": "a" * (i % 50) + "."}) for i in range(n)]
    rows[0], rows[n // 2] = "oops", json.dumps({"prompt": "<|end|>", "completion": "a"})
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def config(path: Path, **more: Any) -> DataConfig:
    return DataConfig.model_validate(
        {"train": [{"path": str(path), "weight": 1.5}], "pack_length": 128, "validation_share": 0.2}
        | {"on_bad_row": "skip"}
        | more
    )


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_ROWS", 7)


def told_of(prepared: Prepared) -> tuple[object, ...]:
    assert prepared.held_out is not None
    return (
        prepared.fingerprint,
        prepared.held_out.fingerprint,
        tuple(prepared.train.rows.places),
        tuple(prepared.train.packs),
        prepared.skipped,
        prepared.dropped,
        prepared.cut,
        prepared.notices,
    )


@pytest.mark.parametrize("on_long_row", ["drop", "cut_turn"])
def test_memory_cache_and_workers_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_long_row: str) -> None:
    here: list[Path] = []
    plain = parts.save_block
    monkeypatch.setattr(parts, "save_block", lambda path, done: (plain(path, done), here.append(path))[0])
    cfg = config(write(tmp_path / "a.jsonl"), pack_length=50, on_long_row=on_long_row)
    alone = prepare.prepare(cfg, TOKENIZER, None)
    assert alone.dropped
    assert len(alone.skipped) == 2
    for cache, workers in (("one", 1), ("two", 2)):
        here.clear()
        for cached in (False, True):
            found = prepare.prepare(cfg, TOKENIZER, tmp_path / cache, workers=workers)
            assert found.cached == cached
            assert told_of(found) == told_of(alone)
            assert isinstance(found.train.rows.ids, np.memmap)
        assert len(here) == 9 if workers == 1 else 0 < len(here) < 9
    bins = [sorted((tmp_path / cache).glob("*/*/*.bin")) for cache in ("one", "two")]
    assert [path.read_bytes() for path in bins[0]] == [path.read_bytes() for path in bins[1]]
    assert not list((tmp_path / "one").glob("*/parts"))


@pytest.mark.parametrize("max_rows", [1, 7, 20, 1000])
def test_max_rows_ends_in_the_middle_of_a_block(tmp_path: Path, max_rows: int) -> None:
    first, second = write(tmp_path / "a.jsonl", 20), write(tmp_path / "b.jsonl", 20)
    cfg = DataConfig(
        train=(str(first), str(second)), max_rows=max_rows, validation_share=0, on_bad_row="skip", pack_length=128
    )
    rows = prepare.prepare(cfg, TOKENIZER, None).train.rows
    good = [f"{name}:{i}" for name in ("a.jsonl", "b.jsonl") for i in range(2, 21)]
    assert list(rows.places) == [place for place in good[:max_rows] if not place.endswith(":11")]


def test_a_failed_preparation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, cache = config(write(tmp_path / "a.jsonl")), tmp_path / "cache"
    plain = parts.save_block
    saved: list[Path] = []

    def failing(path: Path, done: Any) -> None:
        if len(saved) == 4:
            raise OSError("no space left on device")
        plain(path, done)
        saved.append(path)

    monkeypatch.setattr(parts, "save_block", failing)
    with pytest.raises(DataError, match="no space left"):
        prepare.prepare(cfg, TOKENIZER, cache)
    assert not list(cache.glob("*/facts.json"))
    saved[1].write_bytes(saved[1].read_bytes()[:-3])
    done = list(saved)
    monkeypatch.setattr(parts, "save_block", lambda path, block: (plain(path, block), saved.append(path))[0])
    found = prepare.prepare(cfg, TOKENIZER, cache)
    assert told_of(found) == told_of(prepare.prepare(cfg, TOKENIZER, None))
    again = saved[4:]
    assert done[1] in again  # torn
    assert not {done[0], done[2], done[3]} & set(again)
    assert len(again) == 9 - 3


KILLED = """
import sys, time
from pathlib import Path
from phi3_dist.config.schema import DataConfig
from phi3_dist.data.cache import block_files as parts
from phi3_dist.data import blocks as stream
from phi3_dist.data.prepare import prepare
from phi3_dist.modeling.tokenizer import tiny_tokenizer
stream.BLOCK_ROWS = 7
plain = parts.save_block
parts.save_block = lambda path, done: (plain(path, done), print("saved", flush=True), time.sleep(0.5))
cfg = DataConfig.model_validate_json(sys.argv[1])
prepare(cfg, tiny_tokenizer(), Path(sys.argv[2]))
"""


def test_a_killed_preparation_goes_on_and_its_lock_is_free(tmp_path: Path) -> None:
    cfg, cache = config(write(tmp_path / "a.jsonl")), tmp_path / "cache"
    with subprocess.Popen(
        [warm.python(), "-c", KILLED, cfg.model_dump_json(), str(cache)],
        env=warm.environment(),
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == b"saved\n"
        process.send_signal(signal.SIGKILL)
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("*/parts/*.safetensors")}
    assert len(kept) >= 3
    (unfinished,) = cache.glob("*/.train.*.tmp")
    (unfinished.parent / "parts" / ".00000009.safetensors.1.tmp").touch()
    began = time.monotonic()
    rows: list[int] = []
    found = prepare.prepare(cfg, TOKENIZER, cache, progress=lambda what, n: rows.append(n))
    assert time.monotonic() - began < 10
    assert told_of(found) == told_of(prepare.prepare(cfg, TOKENIZER, None))
    assert rows[0] == 7
    assert sorted(path.name for path in unfinished.parent.iterdir()) == [
        "facts.json",
        "packs-train-128-error",
        "packs-validation-128-error",
        "train",
        "used",
        "validation",
    ]


def test_a_block_is_written_before_the_next_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Told(RowsWriter):
        def add(self, part: TokenRows) -> None:
            super().add(part)
            events.append("written")

    plain = parts.save_block
    monkeypatch.setattr(prepare, "RowsWriter", Told)
    monkeypatch.setattr(parts, "save_block", lambda path, done: (plain(path, done), events.append("finished"))[0])
    prepare.prepare(config(write(tmp_path / "a.jsonl")), TOKENIZER, tmp_path / "cache")
    assert events == ["written"] * 2 + ["finished", "written", "written"] * 9  # first no rows at all, for each side


def test_waiting_for_another_process_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, cache = config(write(tmp_path / "a.jsonl")), tmp_path / "cache"
    key = prepare._cache_key(cfg, TOKENIZER, tmp_path)
    cache.mkdir()
    monkeypatch.setattr(prepare, "_WAIT_S", 0.05)
    other = FileLock(cache / f"{key}.lock", is_singleton=False)
    other.acquire()
    said: list[str] = []

    def tell(what: str, rows: int) -> None:
        said.append(what)
        if said.count("waiting for another process that prepares the same data") == 2:
            other.release()

    prepare.prepare(cfg, TOKENIZER, cache, progress=tell)
    assert said[:3] == ["waiting for another process that prepares the same data"] * 2 + ["tokenize"]


def test_ranks_that_wait_say_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    tell = prepare._waiting_said_once()
    for what in ("tokenize", prepare._WAITING, prepare._WAITING):
        tell(what, 0)
    assert capsys.readouterr().err == "phi3-dist: waiting for another process that prepares the same data\n"


@pytest.mark.parametrize("restored", [True, False])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_source_edited_while_it_is_read_poisons_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored: bool, fresh: bool
) -> None:
    source = write(tmp_path / "a.jsonl")
    cfg, cache, right, stat = config(source), tmp_path / "cache", source.read_bytes(), source.stat()
    expected = told_of(prepare.prepare(cfg, TOKENIZER, None))
    plain = prepare.encode_to_block_files
    if not fresh:
        monkeypatch.setattr(file_state, "_TICK_NS", -(10**12))

    def edited(*arguments: Any) -> Iterator[Any]:
        source.write_bytes(right.replace(b"aa", b"bb"))
        yield from plain(*arguments)
        if restored:
            source.write_bytes(right)
            os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    monkeypatch.setattr(prepare, "encode_to_block_files", edited)
    with pytest.raises(DataError, match=r"a\.jsonl: was changed while it was read"):
        prepare.prepare(cfg, TOKENIZER, cache)
    monkeypatch.setattr(prepare, "encode_to_block_files", plain)
    source.write_bytes(right)
    found = prepare.prepare(cfg, TOKENIZER, cache)
    assert not found.cached
    assert told_of(found) == expected
    assert prepare.prepare(cfg, TOKENIZER, cache).cached


def test_parts_of_an_edited_source_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.jsonl")
    cfg, cache, right = config(source), tmp_path / "cache", source.read_bytes()
    expected = told_of(prepare.prepare(cfg, TOKENIZER, None))
    plain = prepare.encode_to_block_files

    def killed(*arguments: Any) -> Iterator[Any]:
        source.write_bytes(right.replace(b"aa", b"bb"))
        for i, done in enumerate(plain(*arguments)):
            yield done
            if i == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "encode_to_block_files", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(cfg, TOKENIZER, cache)
    assert len(list(cache.glob("*/parts/*.safetensors"))) >= 3
    source.write_bytes(right)
    monkeypatch.setattr(prepare, "encode_to_block_files", plain)
    assert told_of(prepare.prepare(cfg, TOKENIZER, cache)) == expected


def test_a_dead_worker_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dies(parts.ProcessPoolExecutor):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            return super().submit(os._exit, 9)

    cfg, cache = config(write(tmp_path / "a.jsonl")), tmp_path / "cache"
    plain = parts.ProcessPoolExecutor
    monkeypatch.setattr(parts, "ProcessPoolExecutor", Dies)
    with pytest.raises(DataError, match="a process that tokenizes died"):
        prepare.prepare(cfg, TOKENIZER, cache, workers=2)
    monkeypatch.setattr(parts, "ProcessPoolExecutor", plain)
    assert not prepare.prepare(cfg, TOKENIZER, cache).cached


def test_no_process_is_started_for_a_few_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "ProcessPoolExecutor", None)
    prepare.prepare(config(write(tmp_path / "a.jsonl", 7 * 7)), TOKENIZER, tmp_path / "cache", workers=4)
    with pytest.raises(TypeError):
        prepare.prepare(config(write(tmp_path / "b.jsonl", 7 * 8)), TOKENIZER, tmp_path / "cache", workers=4)


def test_processes_by_default() -> None:
    assert [parts.workers_for(cores) for cores in (1, 2, 3, 64)] == [1, 1, 3, 64]


def test_a_job_larger_than_a_pipe_is_handed_over_without_waiting(tmp_path: Path) -> None:
    job = parts._Job(Path("x" * 10**6), config(write(tmp_path / "a.jsonl")), ChatFormat.of(TOKENIZER), TOKENIZER)
    with parts._Handed(multiprocessing.get_context("spawn"), job, times=3) as handed:
        for _ in range(2):
            with handed.lock:
                assert handed.reader.recv().folder == job.folder
        assert handed._thread.is_alive()  # nobody takes the third
    assert not handed._thread.is_alive()


ORPHANED = """
import multiprocessing, sys, time
from pathlib import Path
from phi3_dist.config.schema import DataConfig
from phi3_dist.data import blocks as stream
from phi3_dist.data.prepare import prepare
from phi3_dist.modeling.tokenizer import tiny_tokenizer

def tell(what, rows):
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    stream.BLOCK_ROWS = 7
    prepare(DataConfig.model_validate_json(sys.argv[1]), tiny_tokenizer(), Path(sys.argv[2]), workers=3, progress=tell)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script, cfg = tmp_path / "orphaned.py", config(write(tmp_path / "a.jsonl"))
    script.write_text(ORPHANED)
    with subprocess.Popen(
        [sys.executable, str(script), cfg.model_dump_json(), str(tmp_path / "cache")],
        stdout=subprocess.PIPE,
        process_group=0,
    ) as process:
        assert process.stdout is not None
        try:
            assert len(process.stdout.readline().split()) == 2
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=20)  # its output, which the workers share, ends when the last of them does
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


AT_ONCE = """
import json, sys, time
from pathlib import Path
from phi3_dist.config.schema import DataConfig
from phi3_dist.data.cache import block_files as parts
from phi3_dist.data import blocks as stream
from phi3_dist.data.prepare import prepare
from phi3_dist.modeling.tokenizer import tiny_tokenizer
stream.BLOCK_ROWS = 7
saved, plain = [], parts.save_block
parts.save_block = lambda path, done: (plain(path, done), saved.append(path), time.sleep(0.1))
cfg = DataConfig.model_validate_json(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
found = prepare(cfg, tiny_tokenizer(), Path(sys.argv[2]))
print(json.dumps([len(saved), found.cached, found.fingerprint]))
"""


def test_of_processes_that_need_the_same_data_one_prepares_it(tmp_path: Path) -> None:
    cfg, cache = config(write(tmp_path / "a.jsonl")), tmp_path / "cache"
    command = [warm.python(), "-c", AT_ONCE, cfg.model_dump_json(), str(cache)]
    ranks = [
        subprocess.Popen(command, env=warm.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    try:
        for rank in ranks:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "ready\n"
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write("go\n")
            rank.stdin.flush()
        found = sorted(json.loads(rank.communicate(timeout=60)[0]) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    fingerprint = prepare.prepare(cfg, TOKENIZER, None).fingerprint
    assert found == [[0, True, fingerprint], [0, True, fingerprint], [9, False, fingerprint]]


def test_broken_packs_are_made_again(tmp_path: Path) -> None:
    cfg, cache = config(write(tmp_path / "a.jsonl")), tmp_path / "cache"
    first = told_of(prepare.prepare(cfg, TOKENIZER, cache))
    for name in ("rows.bin", "facts.json", "stamp.json"):
        (file,) = cache.glob(f"*/packs-train-128-error/{name}")
        file.write_bytes(file.read_bytes()[:-3])
        found = prepare.prepare(cfg, TOKENIZER, cache)
        assert found.cached
        assert told_of(found) == first


def test_large_folders_are_verified_when_they_were_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ALWAYS_VERIFIED_BYTES", 0)
    with store.ArraysWriter(tmp_path / "a") as writer:
        writer.append("x", np.arange(5))
        writer.append("x", np.arange(5))
        writer.finish({"fact": 1})
    arrays, facts = store.open_arrays(tmp_path / "a")
    assert arrays["x"].tolist() == [*range(5), *range(5)]
    assert facts["fact"] == 1
    read: list[Path] = []
    plain = store._sha256
    monkeypatch.setattr(store, "_sha256", lambda path: (read.append(path), plain(path))[1])
    store.open_arrays(tmp_path / "a")
    assert not read
    os.utime(tmp_path / "a" / "x.bin", ns=(1, 1))
    store.open_arrays(tmp_path / "a")
    store.open_arrays(tmp_path / "a")
    assert len(read) == 1
    raw = bytearray((tmp_path / "a" / "x.bin").read_bytes())
    raw[3] ^= 1
    (tmp_path / "a" / "x.bin").write_bytes(raw)
    with pytest.raises(DataError, match="checksum"):
        store.open_arrays(tmp_path / "a")


def test_an_unfinished_folder_is_not_there(tmp_path: Path) -> None:
    with store.ArraysWriter(tmp_path / "a") as writer:
        writer.append("x", np.arange(5))
        assert [path.name.startswith(".a.") for path in tmp_path.iterdir()] == [True]
    assert not list(tmp_path.iterdir())


def test_a_source_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.jsonl")
    hashed: list[Path] = []
    plain = prepare.content_hash
    monkeypatch.setattr(prepare, "content_hash", lambda path: (hashed.append(path), plain(path))[1])
    first = [prepare._remembered_hash(file, tmp_path) for _ in range(2)]
    assert len(hashed) == 2  # just written: it could change again within the same tick
    monkeypatch.setattr(prepare.time, "time_ns", lambda: file.stat().st_ctime_ns + 3 * 10**9)
    first += [prepare._remembered_hash(file, tmp_path) for _ in range(3)]
    assert len(hashed) == 3
    assert set(first) == {plain(file)}
    file.write_text(file.read_text() + "\n")
    assert prepare._remembered_hash(file, tmp_path) == plain(file) != first[0]


def test_no_more_than_a_few_blocks_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = finished = most = 0
    plain = parts.blocks_of

    def counted(cfg: DataConfig) -> Iterator[Block]:
        nonlocal read
        for block in plain(cfg):
            read += 1
            yield block

    def tell(what: str, rows: int) -> None:
        nonlocal finished, most
        if what == "tokenize":
            finished += 1
            most = max(most, read - finished)

    monkeypatch.setattr(parts, "blocks_of", counted)
    prepare.prepare(config(write(tmp_path / "a.jsonl", 300)), TOKENIZER, tmp_path / "cache", progress=tell)
    assert finished == 43
    assert most <= 2


def test_places_keep_their_text(tmp_path: Path) -> None:
    places = ["a.jsonl:7", "", "7", "007", "-1", "x row 0", f"b:{2**70}", "a:0", "two\nlines:3"]
    rows = TokenRows.of([Encoded([1, 2], [False, True])] * len(places), places)
    rows.save(tmp_path / "rows")
    again = TokenRows.load(tmp_path / "rows").places
    assert list(again) == places
    assert again[1:3] == ("", "7")
    assert again == places
    assert again != places[1:]


def test_pack_list_is_a_sequence() -> None:
    packs = PackList(np.array([0, 2, 1, 3]), np.array([0, 2, 3, 4]))
    assert packs == ((0, 2), (1,), (3,))
    assert (packs[1], packs[-1], packs[:2]) == ((1,), (3,), ((0, 2), (1,)))
    assert packs != ((0, 2), (1,))
    with pytest.raises(IndexError):
        packs[3]


def test_progress_in_a_log_is_a_line_now_and_then() -> None:
    out = io.StringIO()
    with progress_line(Console(file=out, width=20)) as tell:
        for rows in range(1, 5000, 100):
            tell("tokenize", rows)
        tell("write train", 5000)
    lines = out.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["tokenize: 1 rows", "write train: 5"]


def test_preparing_searches_no_old_object_for_garbage_and_leaves_the_collector_as_it_was(tmp_path: Path) -> None:
    """What a server that forks has frozen stays so: else all that it has imported is copied in each process."""
    cfg, before, searched = config(write(tmp_path / "rows.jsonl", 3000)), gc.get_threshold(), list[int]()
    gc.freeze()
    frozen = gc.get_freeze_count()

    def note(phase: str, info: dict[str, int]) -> None:
        searched.append(info["generation"])

    gc.callbacks.append(note)
    try:
        gc.set_threshold(100, 2, 2)
        prepare.prepare(cfg, TOKENIZER, tmp_path / "cache", workers=1)
        assert gc.get_threshold() == (100, 2, 2)
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*before)
    assert gc.get_freeze_count() >= frozen - 1000
    assert searched.count(1) > 10 * searched.count(2)
