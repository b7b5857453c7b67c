"""Finished blocks as files: what processes hand to each other, and what a killed preparation goes on from."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import threading
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from multiprocessing.reduction import ForkingPickler
from multiprocessing.synchronize import Lock
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from phi3_dist.config.schema import DataConfig
from phi3_dist.data.blocks import Block, TokenBlock, blocks_of, encode_blocks_of
from phi3_dist.data.render.template_probe import ChatFormat
from phi3_dist.data.token_rows import TokenRows
from phi3_dist.errors import DataError, Problem
from phi3_dist.machine.storage import as_os_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["encode_to_block_files", "load_block", "old_objects_not_searched_for_garbage", "save_block", "workers_for"]

_AHEAD = 2
"""Blocks that each worker has: the one that it works on, and the next."""
_CORES_OF_ONE = 2
_FEW_BLOCKS = 8
"""Fewer are done before a worker is up: that takes 0.7 s, about as long as eight blocks in this process alone."""
_NEVER = 2**31 - 1


def workers_for(cores: int) -> int:
    """How many processes tokenize where nobody says.

    On two cores one process with the tokenizer's own threads: it needs a tenth less CPU time than two processes, and
    their start is not part of it. A fifth of its work, with Phi-3's tokenizer, holds the interpreter's lock, so more
    cores than a few have a process each.
    """
    return 1 if cores <= _CORES_OF_ONE else cores


@dataclass(frozen=True)
class _Job:
    """What all blocks of a data set share."""

    folder: Path
    cfg: DataConfig
    fmt: ChatFormat
    tokenizer: PreTrainedTokenizerFast

    def path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.safetensors"

    def has(self, number: int) -> bool:
        """Whether the file of a block is there and whole."""
        if not self.path(number).exists():
            return False
        try:
            load_block(self.path(number))
        except DataError:
            return False  # torn by the end of the process or the machine: made again
        return True

    def encode(self, blocks: Iterable[Block]) -> Iterator[tuple[int, TokenBlock]]:
        """Write the file of each block, in order."""
        for number, done in encode_blocks_of(blocks, self.cfg, self.fmt, self.tokenizer):
            save_block(self.path(number), done)
            yield number, done


@contextlib.contextmanager
def old_objects_not_searched_for_garbage() -> Iterator[None]:
    """Rows are many small objects, which none refers back to: what was there before is not searched for their sake.

    Not by `gc.freeze`: its end would let go of what a caller has frozen, such as a server that forks.
    """
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, _NEVER)
    try:
        yield
    finally:
        gc.set_threshold(young, middle, old)


def encode_to_block_files(
    folder: Path, cfg: DataConfig, fmt: ChatFormat, tokenizer: PreTrainedTokenizerFast, workers: int
) -> Iterator[TokenBlock]:
    """Each block of the data, in order, when its file is written. A whole file that is there already is kept.

    `workers` counts this process. Raises DataError for sources that can't be read, and where a worker dies.
    """
    folder.mkdir(exist_ok=True)
    job, every = _Job(folder, cfg, fmt, tokenizer), blocks_of(cfg)
    first = list(islice(every, _FEW_BLOCKS if workers > 1 else 0))
    blocks = chain(first, every)
    if len(first) < _FEW_BLOCKS:
        yield from _alone(job, blocks)
        return
    try:
        yield from _shared(job, blocks, workers - 1)
    except BrokenProcessPool as error:
        what = "a process that tokenizes died, perhaps for lack of memory"
        raise DataError(
            Problem("data", what, "run it again: what is finished is kept; or use fewer workers")
        ) from error


def _alone(job: _Job, blocks: Iterable[Block]) -> Iterator[TokenBlock]:
    finished: set[int] = set()

    def missing() -> Iterator[Block]:
        for block in blocks:
            if job.has(block.number):
                finished.add(block.number)
            else:
                yield block

    def kept_from(due: int) -> Iterator[TokenBlock]:
        while due in finished:
            finished.remove(due)
            yield load_block(job.path(due))
            due += 1

    due = 0
    for number, done in job.encode(missing()):
        yield from kept_from(due)
        yield done
        due = number + 1
    yield from kept_from(due)


def _shared(job: _Job, blocks: Iterable[Block], others: int) -> Iterator[TokenBlock]:
    """Whenever all the others have enough to do, a block is done here."""
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's and tokenizers' locked threads
    waiting: deque[tuple[int, Future[None] | None]] = deque()

    def finished(number: int, future: Future[None] | None) -> TokenBlock:
        if future:
            future.result()
        return load_block(job.path(number))

    with (
        _Handed(context, job, others) as handed,
        ProcessPoolExecutor(others, context, _begin, (handed.reader, handed.lock)) as pool,
    ):
        try:
            for block in blocks:
                future = None
                if not job.has(block.number):
                    if sum(not (f is None or f.done()) for _, f in waiting) < _AHEAD * others:
                        future = pool.submit(_work, block)
                    else:
                        for _ in job.encode([block]):
                            pass
                waiting.append((block.number, future))
                while waiting and (waiting[0][1] is None or waiting[0][1].done()):
                    yield finished(*waiting.popleft())
            while waiting:
                yield finished(*waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Handed:
    """A pipe from which each of the other processes takes the job.

    No argument of theirs: `Process.start` comes back when the child has read those, and a tokenizer is larger than a
    pipe's buffer. The processes would start one after the other.
    """

    def __init__(self, context: SpawnContext, job: _Job, times: int) -> None:
        self.reader, self._writer = context.Pipe(duplex=False)
        self.lock = context.Lock()
        self._thread = threading.Thread(target=self._send, args=(ForkingPickler.dumps(job), times), daemon=True)

    def _send(self, job: memoryview, times: int) -> None:
        with contextlib.suppress(BrokenPipeError):  # no process is left that takes one
            for _ in range(times):
                self._writer.send_bytes(job)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.reader.close()  # with the last reader gone, a write that waits fails
        self._thread.join()
        self._writer.close()


_jobs: list[_Job] = []
"""In a worker process, its one."""


def _begin(handed: Connection, lock: Lock) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for each worker; the library has no other switch
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with lock:
        _jobs[:] = [handed.recv()]
    gc.freeze()  # what is imported stays: not to be searched for garbage at every block


def _end_with_parent() -> None:
    """A worker waits for its next block for ever, also for one of a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(block: Block) -> None:
    for _ in _jobs[0].encode([block]):
        pass


def save_block(path: Path, done: TokenBlock) -> None:
    """Write one file, under another name first. Raises OSError, and leaves nothing half written."""
    arrays: dict[str, Any] = {"facts": _bytes(done.tallies)}
    for name, rows in (("train", done.train), ("held", done.held_out)):
        arrays |= {f"{name}.ids": rows.ids, f"{name}.supervised": rows.supervised, f"{name}.offsets": rows.offsets}
        arrays[f"{name}.places"] = _bytes(list(rows.places))
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({**arrays, "crc32": _digest(arrays)}, unfinished)
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        unfinished.unlink(missing_ok=True)
        raise error if isinstance(error, OSError) else as_os_error(error) from error


def load_block(path: Path) -> TokenBlock:
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
        return TokenBlock(train, held, json.loads(arrays["facts"].tobytes()))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(Problem(str(path), f"not a file of token rows: {error}")) from error


def _bytes(value: object) -> Any:
    return np.frombuffer(json.dumps(value).encode("ascii"), dtype=np.uint8)


def _digest(arrays: dict[str, Any]) -> Any:
    """Enough to tell a torn file; what the cache keeps has sha256."""
    value = 0
    for name in sorted(arrays):
        value = zlib.crc32(name.encode("ascii"), value)
        value = zlib.crc32(arrays[name].view(np.uint8).data if arrays[name].size else b"", value)
    return np.array([value], dtype=np.uint32)
