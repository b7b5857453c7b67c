"""Rows and lengths as a person wants to see them, before anything trains on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from phi3_dist.config.schema import DataConfig
from phi3_dist.data.blocks import Totals, blocks_of, encode_blocks_of
from phi3_dist.data.pack.bin_packing import pack_rows
from phi3_dist.data.pack.packs import SHOWN_AT_MOST, none_fits
from phi3_dist.data.read.sources import split_notices
from phi3_dist.data.render.template_probe import ChatFormat
from phi3_dist.data.token_rows import TokenRows
from phi3_dist.errors import plain
from phi3_dist.planning.auto_fields import is_auto, shortest_pack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["SHOWN_BETWEEN", "length_table", "render_rows", "show"]

SUPERVISED_STYLE = "bold green"
SHOWN_BETWEEN = ("⟦", "⟧")
"""What stands around supervised tokens where there is no colour."""


@dataclass(frozen=True)
class _Row:
    """One row. How it marks supervised tokens is decided when it is printed: colour, or brackets without colour."""

    header: str
    spans: tuple[tuple[bool, str], ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        colour = console.color_system is not None and not console.no_color
        before, after = ("", "") if colour else SHOWN_BETWEEN
        text = Text()
        text.append(f"{self.header}\n", "bold cyan")
        for supervised, span in self.spans:
            text.append(f"{before}{span}{after}" if supervised else span, SUPERVISED_STYLE if supervised else "dim")
        text.append("\n")
        yield text


def show(cfg: DataConfig, tokenizer: PreTrainedTokenizerFast, n: int) -> Group:
    """The first n training rows, the lengths of all of them, and whatever the user should know about the data.

    All rows are read, in memory for a block of them, 16 bytes a row, and the packing. Raises DataError as `prepare`
    does, but rows that are too long for a pack are only counted here.
    """
    auto = is_auto(cfg.pack_length)
    cfg = cfg.model_copy(update={"pack_length": 2**31 - 1}) if auto else cfg
    fmt, totals = ChatFormat.of(tokenizer), Totals(cfg)
    first = TokenRows.of([], [])
    lengths, supervised = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    long: list[str] = []
    cut = 0
    for _, done in encode_blocks_of(blocks_of(cfg), cfg, fmt, tokenizer):
        totals.add(done.tallies)
        rows = done.train
        if len(first) < n:
            first = TokenRows.join([first, rows.select(np.arange(min(n - len(first), len(rows))))])
        lengths.append(rows.lengths)
        supervised.append(np.diff(np.searchsorted(np.flatnonzero(rows.supervised), rows.offsets)))
        too_long = rows.select(np.flatnonzero(rows.lengths > cfg.pack_length))
        long += too_long.places
        cut += len(too_long.cut(cfg.pack_length)[1])
    totals.check()
    lengths_N, supervised_N = np.concatenate(lengths), np.concatenate(supervised)
    if auto and len(lengths_N):  # as far as it is known without a device
        cfg = cfg.model_copy(update={"pack_length": shortest_pack(int(lengths_N.max()))})
    fits_N = lengths_N <= cfg.pack_length
    if not fits_N.any() and not (cut and cfg.on_long_row == "cut_turn"):
        raise none_fits(len(lengths_N), cfg.pack_length)
    notes = [f"note: {notice}" for notice in (*split_notices(cfg), *totals.notices(fmt))]
    notes.append(f"held out: {totals.held:,} rows")
    notes += [f"skipped: {row.place}: {row.reason}" for row in totals.skipped[:SHOWN_AT_MOST]]
    if len(totals.skipped) > SHOWN_AT_MOST:
        notes.append(f"skipped: and {len(totals.skipped) - SHOWN_AT_MOST:,} more")
    if long:
        notes.append(_of_long_rows(cfg, long[0], len(long), cut, int(lengths_N.max())))
    parts = [length_table(lengths_N[fits_N], supervised_N[fits_N], cfg.pack_length)] if fits_N.any() else []
    return Group(render_rows(tokenizer, first, len(lengths_N)), *parts, Text(plain("\n".join(notes))))


def _of_long_rows(cfg: DataConfig, example: str, long: int, cut: int, longest: int) -> str:
    """What becomes of rows that are longer than a pack, and what the other choices would do."""
    would = {
        "error": "a run stops at them",
        "drop": "all are dropped",
        "cut_turn": f"{cut:,} are cut after an answer, {long - cut:,} dropped",
    }
    others = "; ".join(f"{choice}: {what}" for choice, what in would.items() if choice != cfg.on_long_row)
    return (
        f"longer than a pack, not counted in the table: {long:,} rows, such as {example}; {would[cfg.on_long_row]} "
        f"(data.on_long_row: {cfg.on_long_row}; {others}); data.pack_length: {longest} holds all"
    )


def render_rows(tokenizer: PreTrainedTokenizerFast, rows: TokenRows, of: int) -> Group:
    """Rows as the model sees them, decoded from their ids, supervised tokens marked; `of`: how many rows there are."""
    shown: list[_Row] = []
    for i, (start, end) in enumerate(pairwise(rows.offsets.tolist())):
        ids, supervised = rows.ids[start:end].tolist(), rows.supervised[start:end].tolist()
        header = f"{rows.places[i]}: {len(ids)} tokens, {sum(supervised)} supervised"
        shown.append(_Row(header, tuple(_spans(tokenizer, ids, supervised))))
    before, after = SHOWN_BETWEEN
    legend = f"{len(shown)} of {of} rows; green, or between {before} and {after}: supervised"
    return Group(*shown, Text(legend, style="italic"))


def _spans(tokenizer: PreTrainedTokenizerFast, ids: list[int], supervised: list[bool]) -> Iterator[tuple[bool, str]]:
    """Runs of equal supervision. They end at control tokens, so no character is cut in two by decoding them alone."""
    for learned, run in groupby(zip(supervised, ids, strict=True), key=lambda pair: pair[0]):
        span = [token for _, token in run]
        text = str(tokenizer.decode(span, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        yield learned, plain(text)


def length_table(lengths_N: NDArray[np.int64], supervised_N: NDArray[np.int64], pack_length: int) -> Table:
    """Lengths of rows, the share that is supervised, and how full their packs are."""
    _, starts = pack_rows(lengths_N, pack_length)
    packs = len(starts) - 1
    total = int(lengths_N.sum())
    table = Table(show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("rows", f"{len(lengths_N):,}")
    table.add_row("tokens", f"{total:,}")
    table.add_row("tokens a row, mean", f"{lengths_N.mean():.1f}")
    table.add_row("tokens a row, p50", f"{np.percentile(lengths_N, 50):.0f}")
    table.add_row("tokens a row, p95", f"{np.percentile(lengths_N, 95):.0f}")
    table.add_row("tokens a row, max", f"{lengths_N.max():,}")
    table.add_row("supervised", f"{100 * int(supervised_N.sum()) / total:.1f} %")
    table.add_row("packs", f"{packs:,}")
    table.add_row("pack length", f"{pack_length:,}")
    table.add_row("pack fill", f"{100 * total / (packs * pack_length):.1f} %")
    return table
