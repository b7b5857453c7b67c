"""Rows and lengths as a person wants to see them, before anything trains on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from phi3_dist.config.schema import DataConfig
from phi3_dist.data.batches import Packs, make_packs
from phi3_dist.data.chat import Encoded, encode_rows
from phi3_dist.data.chat_format import ChatFormat
from phi3_dist.data.rows import TokenRows
from phi3_dist.data.sources import BadRow, Chat, problems_of, read_chats
from phi3_dist.errors import DataError

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

    Raises DataError as `prepare` does, but rows that are too long for a pack are only counted here.
    """
    chats = read_chats(cfg)
    fmt = ChatFormat.of(tokenizer)
    pairs = list(zip(chats.train, encode_rows(fmt, tokenizer, chats.train, cfg.supervise), strict=True))
    bad = [row for _, row in pairs if isinstance(row, BadRow)]
    if bad and cfg.on_bad_row == "stop":
        raise DataError(*problems_of(bad))
    good = [(chat, row) for chat, row in pairs if isinstance(row, Encoded)]
    kept, encoded = [chat for chat, _ in good], [row for _, row in good]
    packs, long = make_packs(TokenRows.of(encoded, [chat.place for chat in kept]), cfg.pack_length, "drop")
    facts = [f"note: {notice}" for notice in (*fmt.notices, *chats.notices)]
    facts.append(f"held out: {len(chats.validation):,} rows")
    facts += [f"skipped: {row.place}: {row.reason}" for row in (*chats.skipped, *bad)]
    if long:
        facts.append(f"longer than a pack, not counted in the table: {len(long):,} rows, such as {long[0]}")
    return Group(render_rows(tokenizer, encoded, kept, n), length_table(packs), Text("\n".join(facts)))


def render_rows(tokenizer: PreTrainedTokenizerFast, encoded: Sequence[Encoded], chats: Sequence[Chat], n: int) -> Group:
    """The first n rows as the model sees them, decoded from their ids, with the supervised tokens marked."""
    shown = list(zip(encoded, chats, strict=True))[:n]
    rows = [_Row(_header(row, chat), tuple(_spans(tokenizer, row))) for row, chat in shown]
    before, after = SHOWN_BETWEEN
    legend = f"{len(rows)} of {len(encoded)} rows; green, or between {before} and {after}: supervised"
    return Group(*rows, Text(legend, style="italic"))


def _header(row: Encoded, chat: Chat) -> str:
    return f"{chat.place}: {len(row.ids)} tokens, {sum(row.supervised)} supervised"


def _spans(tokenizer: PreTrainedTokenizerFast, row: Encoded) -> Iterator[tuple[bool, str]]:
    """Runs of equal supervision. They end at control tokens, so no character is cut in two by decoding them alone."""
    for supervised, run in groupby(zip(row.supervised, row.ids, strict=True), key=lambda pair: pair[0]):
        ids = [token for _, token in run]
        yield supervised, str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def length_table(packs: Packs) -> Table:
    """Lengths of the packed rows, the share that is supervised, and how full the packs are."""
    which = np.array([row for pack in packs.packs for row in pack])
    lengths = packs.rows.lengths[which]
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(packs.rows.supervised)])[packs.rows.offsets]
    supervised = int(np.diff(sums)[which].sum())
    total = int(lengths.sum())
    table = Table(show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("rows", f"{len(which):,}")
    table.add_row("tokens", f"{total:,}")
    table.add_row("tokens a row, mean", f"{lengths.mean():.1f}")
    table.add_row("tokens a row, p50", f"{np.percentile(lengths, 50):.0f}")
    table.add_row("tokens a row, p95", f"{np.percentile(lengths, 95):.0f}")
    table.add_row("tokens a row, max", f"{lengths.max():,}")
    table.add_row("supervised", f"{100 * supervised / total:.1f} %")
    table.add_row("packs", f"{len(packs):,}")
    if packs.pack_length:
        table.add_row("pack length", f"{packs.pack_length:,}")
        table.add_row("pack fill", f"{100 * total / (len(packs) * packs.pack_length):.1f} %")
    return table
