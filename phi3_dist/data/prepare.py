"""From the `data` section to packs: once for each data set, in parallel, resumable, into a cache that is mapped.

CACHE/KEY/
    parts/          finished blocks; what a killed preparation goes on from
    train/          all rows (`TokenRows`), and validation/
    packs-…/        where they stand in packs, one for each data.pack_length and data.on_long_row
    facts.json      comes last: where it is, train/ and validation/ are whole
    used            its time says when a run last read this
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from phi3_dist.config.schema import DataConfig
from phi3_dist.data.blocks import BLOCK_BYTES, BLOCK_ROWS, Totals, blocks_of, encode_blocks_of
from phi3_dist.data.cache.array_folders import read_whole, remove_unfinished, write_whole
from phi3_dist.data.cache.block_files import encode_to_block_files, old_objects_not_searched_for_garbage
from phi3_dist.data.cache.in_use import USED, hold_while_alive
from phi3_dist.data.pack.notices import cut_notice, fewer_notice
from phi3_dist.data.pack.packs import Packed, Packs, evenly, load_packed, pack, save_packed
from phi3_dist.data.read.arrow_tables import arrow_files
from phi3_dist.data.read.raw_rows import content_hash
from phi3_dist.data.read.row_formats import BadRow
from phi3_dist.data.read.sources import HubSet, Source, located, split_notices
from phi3_dist.data.render.template_probe import ChatFormat
from phi3_dist.data.token_rows import RowsWriter, TokenRows
from phi3_dist.errors import DataError, Problem
from phi3_dist.machine.file_changes import State, changed_files, settled, states_of
from phi3_dist.machine.storage import CACHE_FIX, DENIED, NO_LOCKS, storage_fault
from phi3_dist.modeling.tokenizer import tokenizer_hash
from phi3_dist.planning.auto_fields import RowLengths, is_auto

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Prepared", "Progress", "prepare", "row_lengths"]

CACHE_FORMAT = 3
"""Part of the cache key: raise it when the same rows would become other tokens, or other files."""
_WAIT_S = 10.0
_WAITING = "waiting for another process that prepares the same data"

Progress = Callable[[str, int], None]
"""Told what is being done and how many rows that has been done to."""


@dataclass(frozen=True)
class Prepared:
    """Data ready for training, and what a user should know about it."""

    train: Packs
    held_out: Packs | None
    skipped: tuple[BadRow, ...]
    """Rows that can't be used (`on_bad_row: skip`)."""
    dropped: tuple[str, ...]
    """Places of rows longer than a pack (`on_long_row: drop`, or `cut_turn` where no answer fits)."""
    cut: tuple[str, ...]
    """Places of rows cut after an answer to fit a pack (`on_long_row: cut_turn`)."""
    notices: tuple[str, ...]
    fingerprint: str
    """The training packs' fingerprint: what the batch of a step depends on."""
    seconds: float
    cached: bool
    """Whether the tokens came from the cache."""


@dataclass(frozen=True, eq=False)
class _Tokens:
    """Everything that costs time."""

    train: TokenRows
    held_out: TokenRows
    skipped: tuple[BadRow, ...] = ()
    notices: tuple[str, ...] = ()


def prepare(
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: Path | None,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> Prepared:
    """Read, check, encode and pack the `data` section.

    With `cache_dir` tokens and packs are kept there under a key of source bytes, settings and tokenizer, and mapped;
    of several processes that call at once, the first does the work and the others wait for it, saying so to
    `progress` (without it, once on standard error); if it dies, the next goes on with what it had finished. A broken
    entry is made anew. The result is the same for any number of `workers`: processes that tokenize, this one (with a
    thread for each core) among them. The others are spawned, so a script that asks for several needs its `__main__`
    guard.
    Raises DataError for sources, rows and lengths that can't be used.
    """
    began = time.perf_counter()
    report_progress = progress or _waiting_said_once()
    if cache_dir is None:
        tokens, cached = _in_memory(cfg, tokenizer), False
        train, held = (_packed(None, name, tokens, cfg) for name in ("train", "validation"))
    else:
        tokens, cached, train, held = _through_cache(cfg, tokenizer, cache_dir, workers, report_progress)
    assert train is not None
    cut, dropped = dict(train.cut), list(train.dropped)
    if held:
        cut |= held.cut
        dropped += held.dropped
    measured = evenly(held.packs, cfg.max_validation_rows) if held else None
    return Prepared(
        train=train.packs,
        held_out=measured,
        skipped=tokens.skipped,
        dropped=tuple(dropped),
        cut=tuple(cut),
        notices=(
            *split_notices(cfg),
            *tokens.notices,
            *cut_notice(cut),
            *fewer_notice(held.packs if held else None, measured),
        ),
        fingerprint=train.packs.fingerprint,
        seconds=time.perf_counter() - began,
        cached=cached,
    )


def row_lengths(
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: Path | None,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> RowLengths:
    """What `data.pack_length: auto` of `cfg` has to hold: `prepare` without packs. Raises DataError as that does."""
    report_progress = progress or _waiting_said_once()
    if cache_dir is None:
        tokens = _in_memory(cfg, tokenizer)
    else:
        tokens = _through_cache(cfg, tokenizer, cache_dir, workers, report_progress)[0]
    longest = max(int(rows.lengths.max()) for rows in (tokens.train, tokens.held_out) if len(rows))
    return RowLengths(longest, int(tokens.train.lengths.sum()), len(tokens.train))


def _waiting_said_once() -> Progress:
    """For ranks of a run, whose log must say why nothing happens, once."""
    said: set[str] = set()

    def report_progress(what: str, rows: int) -> None:
        if what == _WAITING and what not in said:
            said.add(what)
            sys.stderr.write(f"phi3-dist: {what}\n")
            sys.stderr.flush()

    return report_progress


def _in_memory(cfg: DataConfig, tokenizer: PreTrainedTokenizerFast) -> _Tokens:
    fmt, totals = ChatFormat.of(tokenizer), Totals(cfg)
    parts = [done for _, done in encode_blocks_of(blocks_of(cfg), cfg, fmt, tokenizer)]
    for part in parts:
        totals.add(part.tallies)
    totals.check()
    train, held = TokenRows.join([part.train for part in parts]), TokenRows.join([part.held_out for part in parts])
    return _Tokens(train, held, tuple(totals.skipped), tuple(totals.notices(fmt)))


def _through_cache(
    cfg: DataConfig, tokenizer: PreTrainedTokenizerFast, cache_dir: Path, workers: int, report_progress: Progress
) -> tuple[_Tokens, bool, Packed | None, Packed | None]:
    key = ""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        before = states_of(_files_of(cfg))  # before they are hashed: what is read later must be what was hashed
        key = _cache_key(cfg, tokenizer, cache_dir)
        folder = cache_dir / key
        with _locked(cache_dir / f"{key}.lock", report_progress):
            folder.mkdir(exist_ok=True)
            tokens, cached = _tokens_in(folder, cfg, tokenizer, workers, report_progress, before=before)
            with contextlib.suppress(OSError):  # a help for `phi3-dist cache` alone
                (folder / USED).touch()
            packed = [_packed(folder, name, tokens, cfg) for name in ("train", "validation")]
            hold_while_alive(folder, packed[0].packs.rows if packed[0] else tokens.train)
    except OSError as error:
        # another user's cache, a read-only disk, a file server without locks: what is finished there is read
        found = _only_read(cache_dir / key, cfg) if key and error.errno in DENIED | NO_LOCKS else None
        if found is None:
            what, fix = storage_fault(error, CACHE_FIX)
            raise DataError(Problem(str(cache_dir), f"the token cache can't be written: {what}", fix)) from error
        return found[0], True, found[1], found[2]
    return tokens, cached, packed[0], packed[1]


def _only_read(folder: Path, cfg: DataConfig) -> tuple[_Tokens, Packed | None, Packed | None] | None:
    """Tokens and packs out of a finished cache, without a lock and without a write; None where it isn't finished."""
    try:
        tokens = _load(folder)
        train, held = (_packed_or_made(folder, name, tokens, cfg) for name in ("train", "validation"))
        hold_while_alive(folder, train.packs.rows if train else tokens.train)
    except DataError:
        return None
    return tokens, train, held


def _packed_or_made(folder: Path, name: str, tokens: _Tokens, cfg: DataConfig) -> Packed | None:
    try:
        rows = tokens.train if name == "train" else tokens.held_out
        wanted = len(rows) and not is_auto(cfg.pack_length)
        return load_packed(_packs_folder(folder, name, cfg), rows, cfg.pack_length) if wanted else None
    except DataError:
        return _packed(None, name, tokens, cfg)


class _locked:  # noqa: N801  reads as what it does
    """Holds a lock that the system takes back from a process that dies; says every 10 s that it waits."""

    def __init__(self, path: Path, report_progress: Progress) -> None:
        self._lock, self._report_progress = FileLock(path), report_progress

    def __enter__(self) -> None:
        while True:
            try:
                self._lock.acquire(timeout=_WAIT_S)
                return
            except Timeout:
                self._report_progress(_WAITING, 0)

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def _tokens_in(
    folder: Path,
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    workers: int,
    report_progress: Progress,
    *,
    before: dict[str, State],
) -> tuple[_Tokens, bool]:
    broken = ""
    if (folder / "facts.json").exists():
        try:
            return _load(folder), True
        except DataError as error:
            broken = f"the token cache was broken and was rebuilt ({error.problems[0].what})"
            shutil.rmtree(folder)
            folder.mkdir()
    _encode(folder, cfg, tokenizer, workers, report_progress, before=before)
    tokens = _load(folder, just_written=True)
    return (replace(tokens, notices=(*tokens.notices, broken)) if broken else tokens), False


def _encode(
    folder: Path,
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    workers: int,
    report_progress: Progress,
    *,
    before: dict[str, State],
) -> None:
    """Tokens into train/ and validation/, written while the next blocks are tokenized."""
    fmt, totals = ChatFormat.of(tokenizer), Totals(cfg)
    for unfinished in (folder, folder / "parts"):
        remove_unfinished(unfinished)
    _begin_blocks(folder / "parts", before)
    fresh = None if settled(before) else _contents(before)
    with RowsWriter(folder / "train") as train, RowsWriter(folder / "validation") as validation:
        with old_objects_not_searched_for_garbage():
            for done in encode_to_block_files(folder / "parts", cfg, fmt, tokenizer, workers):
                train.add(done.train)
                validation.add(done.held_out)
                totals.add(done.tallies)
                report_progress("tokenize", totals.rows)
        _refuse_changed(folder, before, fresh)
        totals.check()
        for name, writer in (("train", train), ("validation", validation)):
            report_progress(f"write {name}", totals.rows)
            writer.finish()
    about = {"sources": list(totals.labels), "rows": totals.rows}
    metadata = {"skipped": [asdict(row) for row in totals.skipped], "notices": totals.notices(fmt), "about": about}
    write_whole(folder / "facts.json", metadata)
    shutil.rmtree(folder / "parts", ignore_errors=True)


def _begin_blocks(blocks_folder: Path, before: dict[str, State]) -> None:
    """Parts of an earlier call go on only where no source was touched since that began."""
    note = blocks_folder / "sources.json"
    if blocks_folder.exists():
        try:
            same = read_whole(note)["states"] == before
        except (DataError, KeyError):
            same = False
        if not same:
            shutil.rmtree(blocks_folder)
    if not blocks_folder.exists():
        blocks_folder.mkdir()
        write_whole(note, {"states": before})


def _contents(states: dict[str, State]) -> dict[str, str]:
    return {path: content_hash(Path(path)) for path in states}


def _refuse_changed(folder: Path, before: dict[str, State], fresh: dict[str, str] | None) -> None:
    """Raises DataError where a source was touched since it was hashed: what was read may be rows of two files."""
    changed = changed_files(before)
    if fresh is not None and not changed:
        changed = [path for path, digest in fresh.items() if content_hash(Path(path)) != digest]
    if changed:
        shutil.rmtree(folder / "parts", ignore_errors=True)
        what = "was changed while it was read: what was read is discarded"
        raise DataError(*(Problem(path, what, "run it again when nothing writes to it any more") for path in changed))


def _files_of(cfg: DataConfig) -> list[Path]:
    """Every local file that rows are read from."""
    sources = located(cfg)
    local = [source for source, _ in (*sources.train, *sources.held_out) if isinstance(source, Path)]
    return [part for s in local for part in (arrow_files(s, sources.labels[s]) if s.is_dir() else [s])]


def _load(folder: Path, *, just_written: bool = False) -> _Tokens:
    metadata = read_whole(folder / "facts.json")
    train, validation = (TokenRows.load(folder / name, just_written=just_written) for name in ("train", "validation"))
    return _Tokens(train, validation, tuple(BadRow(**row) for row in metadata["skipped"]), tuple(metadata["notices"]))


def _packed(folder: Path | None, name: str, tokens: _Tokens, cfg: DataConfig) -> Packed | None:
    """The packs of one side, from the cache or made; None without a length, and where no rows are held out."""
    rows = tokens.train if name == "train" else tokens.held_out
    if is_auto(cfg.pack_length) or (name == "validation" and not len(rows)):
        return None
    if folder is None:
        return pack(rows, cfg.pack_length, cfg.on_long_row)
    entry = _packs_folder(folder, name, cfg)
    if entry.exists():
        try:
            return load_packed(entry, rows, cfg.pack_length)
        except DataError:
            shutil.rmtree(entry)  # cheap to make anew, and the same again
    save_packed(entry, rows, cfg.pack_length, cfg.on_long_row)
    return load_packed(entry, rows, cfg.pack_length, just_written=True)


def _packs_folder(folder: Path, name: str, cfg: DataConfig) -> Path:
    return folder / f"packs-{name}-{cfg.pack_length}-{cfg.on_long_row}"


def _cache_key(cfg: DataConfig, tokenizer: PreTrainedTokenizerFast, cache_dir: Path) -> str:
    """sha256 over what decides the tokens. Packing is not part of it: packs are kept beside them."""
    settings = cfg.model_dump(mode="json", exclude={"pack_length", "on_long_row", "cache", "max_validation_rows"})
    parts: list[Any] = [CACHE_FORMAT, BLOCK_ROWS, BLOCK_BYTES, settings, tokenizer_hash(tokenizer)]
    sources = located(cfg)
    parts += [_source_hash(source, cache_dir) for source, _ in (*sources.train, *sources.held_out)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()[:32]


def _source_hash(source: Source, cache_dir: Path) -> list[str]:
    if isinstance(source, HubSet):
        # `datasets` names its own cache by this; there is no public way to ask for it
        return [source.name, str(source.load()._fingerprint)]
    if source.is_dir():
        return [source.name, content_hash(source)]
    return [source.name, _remembered_hash(source, cache_dir)]


def _remembered_hash(path: Path, cache_dir: Path) -> str:
    """The content hash, read from the file once: a large source must not be read at every start.

    Not remembered where the file was changed within the last 2 s: it could change again in the same tick of its time.
    """
    states = states_of([path])
    name = hashlib.sha256(json.dumps(list(states.items())).encode("utf-8")).hexdigest()[:32]
    note = cache_dir / "source-hashes" / f"{name}.json"
    if note.exists():
        try:
            return str(read_whole(note)["sha256"])
        except (DataError, KeyError):
            with contextlib.suppress(OSError):
                note.unlink(missing_ok=True)
    digest = content_hash(path)
    if settled(states) and not changed_files(states):
        with contextlib.suppress(OSError):  # a help for the next start alone
            note.parent.mkdir(exist_ok=True)
            write_whole(note, {"sha256": digest})
    return digest
