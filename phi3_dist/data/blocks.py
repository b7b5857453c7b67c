"""Rows of any number, block by block: read, divided, tokenized and masked, in memory that one block needs.

A block is a run of rows of one source. What becomes of it depends on its rows and settings alone, so blocks can be done
in any order, by any process and at any time; laid end to end they are the data set.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phi3_dist.config.schema import DataConfig
from phi3_dist.data.read.file_types import form_of
from phi3_dist.data.read.notices import held_out_notice, read_notices
from phi3_dist.data.read.raw_rows import line_blocks, rows_of_lines
from phi3_dist.data.read.row_formats import BadRow, Chat, Format, RowReader
from phi3_dist.data.read.sources import (
    Source,
    format_notices,
    located,
    problems_of,
    prompt_share,
    refuse_empty,
    refuse_nothing_left,
    source_rows,
    times,
)
from phi3_dist.data.read.turns import Rules, Seen
from phi3_dist.data.render.encode import EncodedBlock, encode_stream
from phi3_dist.data.render.template_probe import ChatFormat
from phi3_dist.data.token_rows import TokenRows
from phi3_dist.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "BLOCK_BYTES",
    "BLOCK_ROWS",
    "Block",
    "Chats",
    "TokenBlock",
    "Totals",
    "blocks_of",
    "encode_blocks_of",
    "read_chats",
]

BLOCK_ROWS = 2048
BLOCK_BYTES = 8 * 2**20
"""A block of JSON lines ends at so many bytes, too."""


@dataclass(frozen=True, eq=False)
class RawRows:
    """Rows as they were read: lines of JSON, or (place, row)."""

    lines: list[bytes] | None = None
    first_line: int = 1
    rows: list[tuple[str, Any]] | None = None
    unread: tuple[str, ...] = ()
    """Columns of a table that were not read."""
    notice: str = ""
    """With the first rows of a file that is not what its name says."""

    def parsed(self, label: str) -> Iterable[tuple[str, Any]]:
        """Each row with its place, `label` and a number; a `BadRow` for a line that is not JSON."""
        return rows_of_lines(self.lines, label, self.first_line) if self.lines is not None else self.rows or []


@dataclass(frozen=True, eq=False)
class Block:
    """Raw rows of one source, and what decides what becomes of them."""

    number: int
    label: str
    weight: float
    held_out: bool
    """Whether they are of `data.validation`."""
    format: Format | None
    """That of the source's first good row, if it stands in an earlier block."""
    raw: RawRows


@dataclass(frozen=True, eq=False)
class _Divided:
    """The rows of a block, checked, on the side where each belongs."""

    train: list[Chat]
    times: list[int]
    """How often each of them counts."""
    held_out: list[Chat]
    tallies: dict[str, Any]
    """What `Totals` counts, but for what the tokens will say."""


@dataclass(frozen=True, eq=False)
class TokenBlock:
    """What became of a block."""

    train: TokenRows
    """With weights, a row stands here as often as it counts."""
    held_out: TokenRows
    tallies: dict[str, Any]
    """What `Totals` counts, ready for JSON."""


@dataclass(frozen=True)
class Chats:
    """What was read: rows to train on, rows held out, and rows left out."""

    train: list[Chat]
    """With weights, a row stands here as often as it counts."""
    held_out: list[Chat]
    skipped: list[BadRow]
    notices: tuple[str, ...] = ()
    """What a user should know about formats and weights."""


def reader_of(cfg: DataConfig, format: Format | None = None) -> RowReader:
    """The reader of one source's rows."""
    rules = Rules(frozenset(cfg.ignore), cfg.reasoning)
    return RowReader(format or cfg.format, cfg.columns.model_dump(), rules)


def blocks_of(cfg: DataConfig) -> Iterator[Block]:
    """All rows of the `data` section: those of `train` up to `max_rows` good ones, then those of `validation`.

    Raises DataError for sources that are missing or can't be read.
    """
    sources = located(cfg)
    number = 0
    left = cfg.max_rows
    sides = ((sources.train, False), (sources.held_out, True))
    for source, weight, held_out in ((s, w, is_held) for side, is_held in sides for s, w in side):
        if left == 0 and not held_out:
            continue
        label = sources.labels[source]
        reader = reader_of(cfg)
        known = None if cfg.format == "auto" else cfg.format
        for raw in _raw(source, label, reader, None if held_out else left):
            yield Block(number, label, weight, held_out, known, raw)
            number += 1
            if left is not None and not held_out:
                left -= _good(raw, label, reader)
            elif known is None:
                _good(raw, label, reader, only_first=True)
            known = reader.format


def _raw(source: Source, label: str, reader: RowReader, at_most: int | None) -> Iterator[RawRows]:
    """The rows of a source in blocks; with `at_most`, no further than so many good ones."""
    form = form_of(source, label) if isinstance(source, Path) and source.is_file() else None
    notice = f"{label}: {form.mismatch}" if form and form.mismatch else ""
    if at_most is None and form and form.shape == "lines":
        assert isinstance(source, Path)
        for first, lines in line_blocks(source, form, label, BLOCK_ROWS, BLOCK_BYTES):
            yield RawRows(lines=lines, first_line=first, notice=notice)
            notice = ""
        return
    rows, unread = source_rows(source, label, reader, form)
    if at_most is not None:
        rows = _until(rows, RowReader(reader.format or "auto", reader.columns, reader.rules), at_most)
    while block := list(islice(rows, BLOCK_ROWS)):
        yield RawRows(rows=block, unread=tuple(unread), notice=notice)
        notice = ""


def _until(rows: Iterator[tuple[str, Any]], reader: RowReader, good: int) -> Iterator[tuple[str, Any]]:
    for place, row in rows:
        yield place, row
        good -= not isinstance(row, BadRow) and isinstance(reader.read(row, place), Chat)
        if good == 0:
            return


def _good(raw: RawRows, label: str, reader: RowReader, *, only_first: bool = False) -> int:
    """How many rows of a block are good; `reader` learns the format from them."""
    good = 0
    for place, row in raw.parsed(label):
        good += not isinstance(row, BadRow) and isinstance(reader.read(row, place), Chat)
        if only_first and good:
            break
    return good


def read_chats(cfg: DataConfig) -> Chats:
    """All rows of the `data` section in memory, checked and divided, but not tokenized: for few rows.

    Raises DataError for sources that are missing or empty and, with `on_bad_row: stop`, for bad rows, all of them in
    one error. With `skip` they are in `skipped`. Without `validation`, the prompt decides the side (`prompt_share`).
    Weights of sources are applied last, to training rows alone.
    """
    totals = Totals(cfg)
    train: list[Chat] = []
    held_out: list[Chat] = []
    for block in blocks_of(cfg):
        found = _divided(block, cfg)
        train += [chat for chat, times in zip(found.train, found.times, strict=True) for _ in range(times)]
        held_out += found.held_out
        totals.add({**found.tallies, "unfit": [], "unfit_held": []})
    totals.check()
    return Chats(train, held_out, totals.skipped, tuple(totals.notices()))


def encode_blocks_of(
    blocks: Iterable[Block], cfg: DataConfig, fmt: ChatFormat, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[int, TokenBlock]]:
    """The number of each block and what became of it, in order. While one is tokenized, the next one is read."""
    waiting: deque[tuple[int, _Divided]] = deque()

    def chats() -> Iterator[list[Chat]]:
        for block in blocks:
            found = _divided(block, cfg)
            waiting.append((block.number, found))
            yield [*found.train, *found.held_out]

    for _, encoded in encode_stream(fmt, tokenizer, chats(), cfg.supervise):
        number, found = waiting.popleft()
        yield number, _token_block(encoded, found)


def _divided(block: Block, cfg: DataConfig) -> _Divided:
    reader = reader_of(cfg, block.format)
    train: list[Chat] = []
    held: list[Chat] = []
    counts: list[int] = []
    bad: list[BadRow] = []
    kept = 0
    shares = [1.0, 0.0]
    share = 0.0 if cfg.validation or block.held_out else cfg.validation_share
    for place, row in block.raw.parsed(block.label):
        chat = row if isinstance(row, BadRow) else reader.read(row, place)
        if isinstance(chat, BadRow):
            bad.append(chat)
        elif block.held_out or (share > 0 and _below(chat, share, shares)):
            held.append(chat)
        else:
            kept += 1
            count = times(chat, block.weight)
            if count:
                train.append(chat)
                counts.append(count)
    with_system = sum(n for chat, n in zip(train, counts, strict=True) if chat.messages[0].role == "system")
    tallies = {
        "label": block.label,
        "of_validation": block.held_out,
        "format": reader.format if kept or held else None,
        "bad": [[row.place, row.reason] for row in bad],
        "kept": kept,
        "held": len(held),
        "weighted": sum(counts),
        "with_system": with_system + sum(chat.messages[0].role == "system" for chat in held),
        "shares": shares,
        "seen": [[*key, count] for key, count in _seen(reader, block).items()],
    }
    return _Divided(train, counts, held, tallies)


def _below(chat: Chat, share: float, shares: list[float]) -> bool:
    """Whether a prompt's hash falls below the share; the smallest and largest hash are kept in `shares`."""
    found = prompt_share(chat)
    shares[:] = min(shares[0], found), max(shares[1], found)
    return found < share


def _seen(reader: RowReader, block: Block) -> Seen:
    seen = reader.seen.copy()
    rows = len(block.raw.rows or ())
    seen.update({("column", name): rows for name in block.raw.unread if name not in reader.rules.ignore})
    if block.raw.notice:
        seen["said", block.raw.notice] = 1
    return seen


def _token_block(encoded: EncodedBlock, found: _Divided) -> TokenBlock:
    train, held, tallies = found.train, found.held_out, found.tallies
    rows = TokenRows(encoded.ids, encoded.supervised, encoded.offsets, tuple(chat.place for chat in (*train, *held)))
    good = np.array([not reason for reason in encoded.reasons], dtype=np.bool_)
    n, often = len(train), np.array(found.times, dtype=np.int64)
    if not held and good.all() and (often == 1).all():
        return TokenBlock(rows, rows.select(np.empty(0, np.int64)), {**tallies, "unfit": [], "unfit_held": []})
    which = np.repeat(np.arange(n), often)
    unfit = [[rows.places[i], encoded.reasons[i]] for i in which[~good[which]].tolist()]
    unfit_held = [[rows.places[i], encoded.reasons[i]] for i in range(n, len(good)) if not good[i]]
    return TokenBlock(
        rows.select(which[good[which]]),
        rows.select(n + np.flatnonzero(good[n:])),
        {**tallies, "unfit": unfit, "unfit_held": unfit_held},
    )


@dataclass
class Totals:
    """Counts over all blocks, in their order, and what a user must hear of them."""

    cfg: DataConfig
    rows: int = 0
    kept: int = 0
    held: int = 0
    weighted: int = 0
    with_system: int = 0
    shares: tuple[float, float] = (1.0, 0.0)
    """The smallest and the largest hash of a prompt, where a share of them was to be held out."""
    seen: Seen = field(default_factory=Seen)
    labels: dict[str, None] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    bad: list[BadRow] = field(default_factory=list)
    bad_held: list[BadRow] = field(default_factory=list)
    unfit: list[BadRow] = field(default_factory=list)
    unfit_held: list[BadRow] = field(default_factory=list)

    def add(self, tallies: dict[str, Any]) -> None:
        """Count one block."""
        bad = [BadRow(*row) for row in tallies["bad"]]
        (self.bad_held if tallies["of_validation"] else self.bad).extend(bad)
        self.unfit += [BadRow(*row) for row in tallies["unfit"]]
        self.unfit_held += [BadRow(*row) for row in tallies["unfit_held"]]
        self.kept += tallies["kept"]
        self.held += tallies["held"]
        self.weighted += tallies["weighted"]
        self.with_system += tallies["with_system"]
        self.rows += len(bad) + tallies["kept"] + tallies["held"]
        least, most = tallies["shares"]
        self.shares = min(self.shares[0], least), max(self.shares[1], most)
        self.seen.update({(kind, name): count for kind, name, count in tallies["seen"]})
        self.labels.setdefault(tallies["label"])
        if tallies["format"]:
            self.formats[tallies["label"]] = tallies["format"]

    def check(self) -> None:
        """Raises DataError where the rows can't be trained on: bad ones, too few, none supervised."""
        sources = located(self.cfg)
        stop = self.cfg.on_bad_row == "stop"
        if stop and (self.bad or self.bad_held):
            raise DataError(*problems_of([*self.bad, *self.bad_held]))
        good = self.kept if sources.held_out else self.kept + self.held
        refuse_empty(good, self.bad, [sources.labels[source] for source, _ in sources.train])
        if sources.held_out:
            refuse_empty(self.held, self.bad_held, [sources.labels[source] for source, _ in sources.held_out])
        refuse_nothing_left(self.kept, self.held, self.weighted)
        unfit = [*self.unfit, *self.unfit_held]
        if stop and unfit:
            raise DataError(*problems_of(unfit))
        if self.weighted == len(self.unfit):
            what = "supervises nothing: no training row can be used"
            raise DataError(Problem("data", what), *problems_of(unfit)[:-1])

    @property
    def skipped(self) -> list[BadRow]:
        """Rows that can't be used, those that can't be read first."""
        return [*self.bad, *self.bad_held, *self.unfit, *self.unfit_held]

    def notices(self, fmt: ChatFormat | None = None) -> list[str]:
        """What a user should know about formats, weights, held-out rows, and how `fmt` renders messages."""
        notices = [*(fmt.notices if fmt else ()), *format_notices(self.cfg, self.formats)]
        if any(weight != 1 for _, weight in located(self.cfg).train):
            notices.append(f"weights of data.train: {self.kept:,} training rows are read as {self.weighted:,}")
        if fmt and fmt.system == "dropped" and self.with_system:
            notices.append(f"{self.with_system:,} rows have a system message, which the template drops")
        notices += read_notices(self.seen, fmt)
        wanted = self.cfg.validation or self.cfg.validation_share > 0
        if wanted and self.held == len(self.unfit_held):
            notices.append(held_out_notice(self.cfg, self.kept, self.held, self.shares))
        return notices
