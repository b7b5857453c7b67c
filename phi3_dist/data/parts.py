"""Finished blocks as files: what processes hand to each other, and what a killed preparation goes on from."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import threading
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from phi3_dist.config.schema import DataConfig
from phi3_dist.data.chat_format import ChatFormat
from phi3_dist.data.rows import TokenRows
from phi3_dist.data.stream import Block, Done, blocks_of, encode_blocks_of
from phi3_dist.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["encode_to_parts", "load_part", "save_part"]

_AHEAD = 3
"""Blocks that wait for each worker: enough to keep it busy, few enough to fit in memory."""


def encode_to_parts(
    folder: Path, cfg: DataConfig, fmt: ChatFormat, tokenizer: PreTrainedTokenizerFast, workers: int
) -> Iterator[Done]:
    """Each block of the data, in order, when its file is written. A whole file that is there already is kept.

    Raises DataError for sources that can't be read, and where a worker dies.
    """
    folder.mkdir(exist_ok=True)
    if workers == 1:
        yield from _alone(folder, cfg, fmt, tokenizer)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's and tokenizers' locked threads
    waiting: deque[tuple[Path, Future[None] | None]] = deque()
    try:
        with ProcessPoolExecutor(workers, context, _begin, (folder, cfg, fmt, tokenizer)) as pool:
            try:
                for block in blocks_of(cfg):
                    path = _path(folder, block.number)
                    waiting.append((path, None if _is_whole(path) else pool.submit(_work, block)))
                    while len(waiting) > _AHEAD * workers:
                        yield _finished(*waiting.popleft())
                while waiting:
                    yield _finished(*waiting.popleft())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    except BrokenProcessPool as error:
        what = "a process that tokenizes died, perhaps for lack of memory"
        raise DataError(
            Problem("data", what, "run it again: what is finished is kept; or use fewer workers")
        ) from error


def _alone(folder: Path, cfg: DataConfig, fmt: ChatFormat, tokenizer: PreTrainedTokenizerFast) -> Iterator[Done]:
    kept: set[int] = set()

    def missing() -> Iterator[Block]:
        for block in blocks_of(cfg):
            if _is_whole(_path(folder, block.number)):
                kept.add(block.number)
            else:
                yield block

    def kept_from(due: int) -> Iterator[Done]:
        while due in kept:
            kept.remove(due)
            yield load_part(_path(folder, due))
            due += 1

    due = 0
    for number, done in encode_blocks_of(missing(), cfg, fmt, tokenizer):
        yield from kept_from(due)
        save_part(_path(folder, number), done)
        yield done
        due = number + 1
    yield from kept_from(due)


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.safetensors"


def _finished(path: Path, result: Future[None] | None) -> Done:
    if result is not None:
        result.result()
    return load_part(path)


_worker: dict[str, Any] = {}
"""In a worker process: what all its blocks share."""


def _begin(folder: Path, cfg: DataConfig, fmt: ChatFormat, tokenizer: PreTrainedTokenizerFast) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for each worker; the library has no other switch
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()  # what is imported stays: not to be searched for garbage at every block
    _worker.update(folder=folder, cfg=cfg, fmt=fmt, tokenizer=tokenizer)


def _end_with_parent() -> None:
    """A worker waits for its next block for ever, also for one of a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(block: Block) -> None:
    ((number, done),) = encode_blocks_of([block], _worker["cfg"], _worker["fmt"], _worker["tokenizer"])
    save_part(_path(_worker["folder"], number), done)


def save_part(path: Path, done: Done) -> None:
    """Write one file, under another name first."""
    arrays: dict[str, Any] = {"facts": _bytes(done.facts)}
    for name, rows in (("train", done.train), ("held", done.held)):
        arrays |= {f"{name}.ids": rows.ids, f"{name}.supervised": rows.supervised, f"{name}.offsets": rows.offsets}
        arrays[f"{name}.places"] = _bytes(list(rows.places))
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({**arrays, "crc32": _digest(arrays)}, unfinished)
    unfinished.replace(path)


def load_part(path: Path) -> Done:
    """Read it back. Raises DataError where it is missing, torn or not what was written."""
    try:
        arrays = load_file(path)
        digest = arrays.pop("crc32")
        if not np.array_equal(digest, _digest(arrays)):
            raise DataError(Problem(str(path), "holds other rows than its checksum says", "remove it"))
        train, held = (
            TokenRows(
                arrays[f"{name}.ids"],
                arrays[f"{name}.supervised"],
                arrays[f"{name}.offsets"],
                tuple(json.loads(arrays[f"{name}.places"].tobytes())),
            )
            for name in ("train", "held")
        )
        return Done(train, held, json.loads(arrays["facts"].tobytes()))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(Problem(str(path), f"not a file of token rows: {error}")) from error


def _is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        load_part(path)
    except DataError:
        return False  # torn by the end of the process or the machine: made again
    return True


def _bytes(value: object) -> Any:
    return np.frombuffer(json.dumps(value).encode("ascii"), dtype=np.uint8)


def _digest(arrays: dict[str, Any]) -> Any:
    """Enough to tell a torn file; what the cache keeps has sha256."""
    value = 0
    for name in sorted(arrays):
        value = zlib.crc32(name.encode("ascii"), value)
        value = zlib.crc32(arrays[name].view(np.uint8).data if arrays[name].size else b"", value)
    return np.array([value], dtype=np.uint32)
