"""From rows to the batch of a step.

Three things are laid out once and never change during a run: the rows as one long array of tokens (`TokenRows`), the
packs they stand in (`Packs`), and the endless stream of packs that steps are cut from (`Order`). With them the batch
of step n is a pure function of (data fingerprint, seed, global batch, n): no rank, world size or history goes in.
Shapes: T tokens of a joined batch, S predicted supervised positions in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from phi3_dist.config.schema import DataConfig
from phi3_dist.data.chat import ChatFormat, encode_blocks
from phi3_dist.data.packing import best_fit
from phi3_dist.data.readers import content_hash
from phi3_dist.data.rows import TokenRows, rename
from phi3_dist.data.sources import BadRow, Chat, HubSet, locate, names_of, problems_of, read_chats
from phi3_dist.errors import DataError, Problem
from phi3_dist.modeling.tokenizer import tokenizer_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Order", "PackedBatch", "Packs", "Prepared", "TokenRows", "assemble", "make_packs", "prepare"]

CACHE_FORMAT = 1
"""Part of the cache key: raise it when the same rows would become other tokens."""
_ROWS_AT_A_TIME = 4096
_SHOWN_AT_MOST = 20


@dataclass(frozen=True, eq=False)
class Packs:
    """Rows laid out in packs of whole documents; pack k holds the rows packs[k]."""

    rows: TokenRows
    packs: tuple[tuple[int, ...], ...]
    targets: NDArray[np.int64]
    """For each pack, its predicted supervised positions: supervised tokens that don't begin their document."""
    pack_length: int = 0
    """Tokens that a pack may hold; 0 where that is not known."""

    def __len__(self) -> int:
        return len(self.packs)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the rows' fingerprint and the layout."""
        digest = hashlib.sha256(self.rows.fingerprint.encode("ascii"))
        digest.update(json.dumps(self.packs).encode("ascii"))
        return digest.hexdigest()


def make_packs(rows: TokenRows, pack_length: int, on_long_row: str) -> tuple[Packs, list[str]]:
    """Pack whole rows, best fit; also the places of the rows that are too long, which are then not in `Packs.rows`.

    With `on_long_row: cut_turn`, `rows` should have gone through `TokenRows.cut`: what is too long here is dropped.
    Raises DataError naming each long row with its length (`on_long_row: error`), or where no row is left.
    """
    long = np.flatnonzero(rows.lengths > pack_length)
    if len(long) and on_long_row == "error":
        named = [Problem(rows.places[i], f"{rows.lengths[i]:,} tokens") for i in long[:_SHOWN_AT_MOST]]
        rest = f"and {len(long) - len(named):,} more; " if len(long) > len(named) else ""
        what = f"{rest}{len(long):,} of {len(rows):,} rows are longer than data.pack_length: {pack_length:,} tokens"
        fix = (
            f"data.pack_length: {int(rows.lengths.max())} holds them all; data.on_long_row: drop leaves them out, "
            "cut_turn cuts them after an answer"
        )
        raise DataError(*named, Problem("data", what, fix))
    dropped = [rows.places[i] for i in long]
    if len(long) == len(rows):
        what = f"no row is left: all {len(rows):,} are longer than data.pack_length: {pack_length:,} tokens"
        raise DataError(Problem("data", what, "raise data.pack_length"))
    if dropped:
        rows = rows.select(np.flatnonzero(rows.lengths <= pack_length))
    packs = tuple(tuple(pack) for pack in best_fit(rows.lengths.tolist(), pack_length))
    predicted = rows.supervised.astype(np.int64)
    predicted[rows.offsets[:-1]] = 0
    per_row = np.add.reduceat(predicted, rows.offsets[:-1])
    targets = np.array([per_row[list(pack)].sum() for pack in packs], dtype=np.int64)
    return Packs(rows, packs, targets, pack_length), dropped


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of n packs in one epoch.

    Drawn from PCG64's raw 64-bit stream, which numpy promises to keep, and not by `Generator.permutation`, which it
    does not (NEP 19): a run resumed under another numpy sees the same order.
    """
    stream = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    order = np.argsort(stream.random_raw(n), kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


@dataclass(frozen=True)
class Order:
    """Which packs each step, rank and accumulation slot gets.

    Epochs laid end to end make one endless stream of packs; step n (from 0) is its positions
    n*global_batch … (n+1)*global_batch - 1. Invariants:
    - every pack appears exactly once in each epoch, whatever the global batch; a step may span two epochs;
    - the packs of a step depend on (n_packs, seed, shuffle, global_batch, step) alone;
    - the slots of all ranks hold each position of the step exactly once, and slot a of rank r of w is the positions
      [(a*w + r)*micro_batch, + micro_batch): as many slots, of the same size, for every rank.
    """

    n_packs: int
    global_batch: int
    seed: int
    shuffle: bool

    def __post_init__(self) -> None:
        if self.n_packs < 1 or self.global_batch < 1 or self.seed < 0:
            raise ValueError(f"not an order of packs: {self}")

    def packs_of_step(self, step: int) -> NDArray[np.int64]:
        """The packs of a step, in stream order; shape (global_batch,)."""
        if step < 0:
            raise ValueError(f"steps count from 0, not {step}")
        positions = np.arange(step * self.global_batch, (step + 1) * self.global_batch, dtype=np.int64)
        epochs, within = np.divmod(positions, self.n_packs)
        if not self.shuffle:
            return within
        found = np.empty_like(within)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            found[here] = _permutation(self.n_packs, self.seed, epoch)[within[here]]
        return found

    def slots(self, step: int, rank: int, world: int, micro_batch: int) -> list[list[int]]:
        """What one rank does in a step: for each accumulation slot, the packs of its forward pass.

        Raises ValueError where global_batch is no multiple of world * micro_batch.
        """
        if not 0 <= rank < world or micro_batch < 1:
            raise ValueError(f"no such rank or micro batch: rank {rank} of {world}, micro batch {micro_batch}")
        if self.global_batch % (world * micro_batch):
            raise ValueError(
                f"global batch {self.global_batch} is no multiple of {world} ranks × micro batch {micro_batch}"
            )
        packs = self.packs_of_step(step).reshape(-1, world, micro_batch)
        return [[int(pack) for pack in slot] for slot in packs[:, rank]]

    def steps(self, epochs: float) -> int:
        """Steps that `epochs` passes take, the last one filled up from the next epoch."""
        # the written decimal is meant: 1.1 epochs of 10 packs are 11, not ceil(11.000000000000002)
        return math.ceil(Fraction(str(epochs)) * self.n_packs / self.global_batch)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Packs joined into one ragged row without padding. The loss of position predict_S[i] has target target_S[i]."""

    ids_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    """Position in the own document: restarts at 0 with each."""
    cu_seqlens: NDArray[np.int32]
    """Document boundaries, shape (documents + 1,); document d is [cu_seqlens[d], cu_seqlens[d+1])."""
    max_length: int
    """Tokens of the longest document."""
    predict_S: NDArray[np.int64]
    """The positions whose next token is supervised and in the same document, ascending."""
    target_S: NDArray[np.int64]
    """That next token's id."""
    places: tuple[str, ...]
    """Where each document was read."""


def assemble(packs: Packs, which: Sequence[int]) -> PackedBatch:
    """Join the packs `which`, in that order."""
    rows = packs.rows
    documents = [row for pack in which for row in packs.packs[pack]]
    if not documents:
        raise ValueError("a batch needs at least one pack")
    slices = [slice(int(rows.offsets[i]), int(rows.offsets[i + 1])) for i in documents]
    lengths = rows.lengths[documents]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    ids_T = np.concatenate([rows.ids[s] for s in slices]).astype(np.int64)
    learned_T = np.concatenate([rows.supervised[s] for s in slices])
    learned_T[starts] = False  # nothing of the same document comes before it
    target_at_S = np.flatnonzero(learned_T)
    return PackedBatch(
        ids_T=ids_T,
        positions_T=np.arange(len(ids_T), dtype=np.int64) - np.repeat(starts, lengths),
        cu_seqlens=np.concatenate([np.zeros(1, np.int64), ends]).astype(np.int32),
        max_length=int(lengths.max()),
        predict_S=target_at_S - 1,
        target_S=ids_T[target_at_S],
        places=tuple(rows.places[i] for i in documents),
    )


@dataclass(frozen=True)
class Prepared:
    """Data ready for training, and what a user should know about it."""

    train: Packs
    validation: Packs | None
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
    """What the cache holds: everything that costs time."""

    train: TokenRows
    validation: TokenRows
    skipped: tuple[BadRow, ...] = ()
    notices: tuple[str, ...] = ()


def prepare(cfg: DataConfig, tokenizer: PreTrainedTokenizerFast, cache_dir: Path | None) -> Prepared:
    """Read, check, encode and pack the `data` section.

    With `cache_dir` the tokens are kept there under a key of source bytes, settings and tokenizer; of several
    processes that call at once, the first does the work and the others wait for it and read. A broken entry is made
    anew. Raises DataError for sources, rows and lengths that can't be used.
    """
    began = time.perf_counter()
    if cache_dir is None:
        tokens, cached = _encode_all(cfg, tokenizer), False
    else:
        tokens, cached = _through_cache(cfg, tokenizer, cache_dir)
    train, dropped, cut = _pack(tokens.train, cfg)
    validation = None
    if len(tokens.validation):
        validation, dropped_held, cut_held = _pack(tokens.validation, cfg)
        dropped, cut = dropped + dropped_held, cut | cut_held
    return Prepared(
        train=train,
        validation=validation,
        skipped=tokens.skipped,
        dropped=tuple(dropped),
        cut=tuple(cut),
        notices=(*tokens.notices, *_cut_notice(cut)),
        fingerprint=train.fingerprint,
        seconds=time.perf_counter() - began,
        cached=cached,
    )


def _pack(rows: TokenRows, cfg: DataConfig) -> tuple[Packs, list[str], dict[str, str]]:
    """The packs, the places of dropped rows, and for the place of each cut row what was cut."""
    cut: dict[str, str] = {}
    if cfg.on_long_row == "cut_turn":
        before = rows
        rows, which = rows.cut(cfg.pack_length)
        cut = {rows.places[i]: f"{before.lengths[i]:,} to {rows.lengths[i]:,} tokens" for i in which}
    packs, dropped = make_packs(rows, cfg.pack_length, cfg.on_long_row)
    return packs, dropped, cut


def _cut_notice(cut: dict[str, str]) -> list[str]:
    if not cut:
        return []
    named = "; ".join(f"{place}: {what}" for place, what in list(cut.items())[:_SHOWN_AT_MOST])
    rest = f"; and {len(cut) - _SHOWN_AT_MOST:,} more" if len(cut) > _SHOWN_AT_MOST else ""
    return [f"{len(cut):,} rows longer than data.pack_length end after the last answer that fits: {named}{rest}"]


def _encode_all(cfg: DataConfig, tokenizer: PreTrainedTokenizerFast) -> _Tokens:
    fmt = ChatFormat.of(tokenizer)
    chats = read_chats(cfg)
    train, bad = _encode(chats.train, fmt, tokenizer, cfg)
    validation, bad_held = _encode(chats.validation, fmt, tokenizer, cfg)
    bad += bad_held
    if bad and cfg.on_bad_row == "stop":
        raise DataError(*problems_of(bad))
    if not len(train):
        raise DataError(Problem("data", "supervises nothing: no training row can be used"), *problems_of(bad)[:-1])
    notices = [*fmt.notices, *chats.notices]
    with_system = sum(chat.messages[0].role == "system" for chat in (*chats.train, *chats.validation))
    if fmt.system == "dropped" and with_system:
        notices.append(f"{with_system:,} rows have a system message that is lost that way")
    if not len(validation) and (cfg.validation or cfg.validation_share > 0):
        notices.append("no row is held out: there will be no held-out loss (see data.validation_share)")
    return _Tokens(train, validation, (*chats.skipped, *bad), tuple(notices))


def _encode(
    chats: Sequence[Chat], fmt: ChatFormat, tokenizer: PreTrainedTokenizerFast, cfg: DataConfig
) -> tuple[TokenRows, list[BadRow]]:
    parts: list[TokenRows] = []
    bad: list[BadRow] = []
    for chunk, block in encode_blocks(fmt, tokenizer, chats, cfg.supervise, _ROWS_AT_A_TIME):
        bad += [BadRow(chat.place, reason) for chat, reason in zip(chunk, block.reasons, strict=True) if reason]
        rows = TokenRows(block.ids, block.supervised, block.offsets, tuple(chat.place for chat in chunk))
        good = np.array([i for i, reason in enumerate(block.reasons) if not reason], dtype=np.int64)
        parts.append(rows if len(good) == len(chunk) else rows.select(good))
    return TokenRows.join(parts), bad


def _through_cache(cfg: DataConfig, tokenizer: PreTrainedTokenizerFast, cache_dir: Path) -> tuple[_Tokens, bool]:
    key = _cache_key(cfg, tokenizer)
    folder = cache_dir / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / f"{key}.lock"):
            broken = ""
            if (folder / "facts.json").exists():
                try:
                    return _load(folder), True
                except DataError as error:
                    broken = f"the token cache was broken and has been made anew ({error.problems[0].what})"
            tokens = _encode_all(cfg, tokenizer)
            _store(tokens, folder)
    except OSError as error:
        what = f"the token cache can't be written: {error}"
        raise DataError(Problem(str(cache_dir), what, "make the folder writable, or name another one")) from error
    return (replace(tokens, notices=(*tokens.notices, broken)) if broken else tokens), False


def _cache_key(cfg: DataConfig, tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 over what decides the tokens. Packing is no part of it: it is done anew each time."""
    settings = cfg.model_dump(mode="json", exclude={"pack_length", "on_long_row"})
    parts: list[Any] = [CACHE_FORMAT, settings, tokenizer_hash(tokenizer)]
    parts += [_source_hash(s) for s in locate(names_of(cfg.train), cfg.split, cfg.revision, "data.train")]
    if cfg.validation:
        held = locate(cfg.validation, cfg.validation_split, cfg.revision, "data.validation")
        parts += [_source_hash(s) for s in held]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()[:32]


def _source_hash(source: Path | HubSet) -> list[str]:
    if isinstance(source, HubSet):
        # `datasets` names its own cache by this; there is no public way to ask for it
        return [source.name, str(source.load()._fingerprint)]
    return [source.name, content_hash(source)]


def _store(tokens: _Tokens, folder: Path) -> None:
    """facts.json comes last: where it is, the rest is whole."""
    tokens.train.save(folder / "train.safetensors")
    tokens.validation.save(folder / "validation.safetensors")
    facts = {"skipped": [asdict(row) for row in tokens.skipped], "notices": tokens.notices}
    unfinished = folder / f".facts.json.{os.getpid()}.tmp"
    unfinished.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    rename(unfinished, folder / "facts.json")


def _load(folder: Path) -> _Tokens:
    train, validation = (TokenRows.load(folder / f"{name}.safetensors") for name in ("train", "validation"))
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        skipped = tuple(BadRow(**row) for row in facts["skipped"])
        return _Tokens(train, validation, skipped, tuple(facts["notices"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(Problem(str(folder), f"facts.json can't be read: {error}")) from error
