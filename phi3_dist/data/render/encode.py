"""Token ids and loss mask of a conversation, made together from ids.

The ids are those of the rendered template in one piece, which is what a server makes of the same conversation. The
mask is read off the ids: contents hold no control token (such a row is refused), so each turn runs from one
end-of-turn token to the next, an assistant's begins with the ids of the generation prompt, and everything between
that and its end-of-turn token, that included, is learned. String offsets play no part: Phi-3's role tokens swallow
the newline after them, and offsets then point elsewhere.

A document of raw text goes past the template: its text as it is, then the end-of-document token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from phi3_dist.data.read.row_formats import BadRow, Chat
from phi3_dist.data.read.sources import problems_of
from phi3_dist.data.read.turns import TEXT, Message
from phi3_dist.data.render.fast_template import Renderer
from phi3_dist.data.render.template_probe import ChatFormat, unfit
from phi3_dist.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "Encoded",
    "EncodedBlock",
    "control_tokens",
    "encode_blocks",
    "encode_chats",
    "document_end",
    "encode_rows",
    "encode_stream",
]

_END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Encoded:
    """One row: its token ids, and for each whether it is learned."""

    ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True, eq=False)
class EncodedBlock:
    """Many rows in three arrays: row i is ids[offsets[i]:offsets[i+1]], its mask the same slice of `supervised`."""

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    reasons: list[str]
    """For each row, why it can't be used; "" for a good one. The ids and mask of a bad row mean nothing."""


def encode_chats(
    tokenizer: PreTrainedTokenizerFast, chats: Sequence[Chat], supervise: Literal["all", "last"]
) -> list[Encoded]:
    """Ids and mask of each conversation, in order.

    The ids equal `tokenizer(apply_chat_template(messages, tokenize=False), add_special_tokens=False)`. Learned are the
    contents of assistant turns (all, or the last) with weight > 0, their end-of-turn token, and the template's final
    end token after a learned last turn. Raises DataError naming each row that holds a control token, that supervises
    nothing, or that the template turns into another form than it promised.
    """
    rows = encode_rows(ChatFormat.of(tokenizer), tokenizer, chats, supervise)
    bad = [row for row in rows if isinstance(row, BadRow)]
    if bad:
        raise DataError(*problems_of(bad))
    return [row for row in rows if isinstance(row, Encoded)]


def encode_rows(
    fmt: ChatFormat, tokenizer: PreTrainedTokenizerFast, chats: Sequence[Chat], supervise: Literal["all", "last"]
) -> list[Encoded | BadRow]:
    """As `encode_chats`, with a BadRow in the place of each row that can't be used."""
    rows: list[Encoded | BadRow] = []
    for chunk, block in encode_blocks(fmt, tokenizer, chats, supervise, max(len(chats), 1)):
        spans = pairwise(block.offsets.tolist())
        for chat, reason, (start, end) in zip(chunk, block.reasons, spans, strict=True):
            good = Encoded(block.ids[start:end].tolist(), block.supervised[start:end].tolist())
            rows.append(BadRow(chat.place, reason) if reason else good)
    return rows


def encode_blocks(
    fmt: ChatFormat,
    tokenizer: PreTrainedTokenizerFast,
    chats: Sequence[Chat],
    supervise: Literal["all", "last"],
    rows_at_a_time: int,
) -> Iterator[tuple[Sequence[Chat], EncodedBlock]]:
    """As `encode_rows`, in blocks and arrays."""
    blocks = (chats[start : start + rows_at_a_time] for start in range(0, len(chats), rows_at_a_time))
    yield from encode_stream(fmt, tokenizer, blocks, supervise)


def encode_stream(
    fmt: ChatFormat,
    tokenizer: PreTrainedTokenizerFast,
    blocks: Iterable[Sequence[Chat]],
    supervise: Literal["all", "last"],
) -> Iterator[tuple[Sequence[Chat], EncodedBlock]]:
    """As `encode_rows`, in blocks and arrays: the way for many rows.

    While one block is tokenized, on all cores and outside the interpreter's lock, the next one is read and rendered.
    """
    control, ending, renderer = control_tokens(tokenizer), document_end(tokenizer), Renderer(tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # lengths are judged against data.pack_length, not against the tokenizer's own idea
    backend.no_padding()

    def tokenized(texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        found = [row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=False)]
        offsets = np.zeros(len(found) + 1, np.int64)
        np.cumsum([len(ids) for ids in found], out=offsets[1:])
        return np.fromiter(chain.from_iterable(found), np.int32, int(offsets[-1])), offsets

    with ThreadPoolExecutor(1) as pool:
        waiting: tuple[Sequence[Chat], list[str], Future[tuple[NDArray[np.int32], NDArray[np.int64]]]] | None = None
        for chunk in blocks:
            reasons = [_refused(chat, fmt, control) for chat in chunk]
            texts = _render_all(renderer, chunk, reasons, ending, fmt.reasoning)
            following = (chunk, reasons, pool.submit(tokenized, texts))
            if waiting:
                yield waiting[0], _masked(fmt, waiting[0], waiting[1], *waiting[2].result(), supervise=supervise)
            waiting = following
        if waiting:
            yield waiting[0], _masked(fmt, waiting[0], waiting[1], *waiting[2].result(), supervise=supervise)


def document_end(tokenizer: PreTrainedTokenizerFast) -> str:
    """The token that ends a document of raw text; "" for a tokenizer without one.

    `<|endoftext|>` where the tokenizer knows it as a control token: the whole Phi family ends its pretraining documents
    with that, also where `eos_token` is the end of a turn (Phi-4's `<|im_end|>`). Else `eos_token`.
    """
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return _END_OF_TEXT if _END_OF_TEXT in known else str(tokenizer.eos_token or "")


def _render_all(
    renderer: Renderer, chats: Sequence[Chat], reasons: list[str], ending: str, reasoning: str
) -> list[str]:
    """The text of each row; an empty one for a row that is refused already."""
    good = [
        [_turn(m, reasoning) for m in chat.messages]
        for chat, reason in zip(chats, reasons, strict=True)
        if not reason and not _is_text(chat)
    ]
    try:
        texts = iter(renderer.texts(good))
    except TemplateError as error:
        raise unfit(f"it stops with {error}") from error
    return [
        "" if reason else chat.messages[0].content + ending if _is_text(chat) else next(texts)
        for chat, reason in zip(chats, reasons, strict=True)
    ]


def _turn(message: Message, reasoning: str) -> dict[str, str]:
    turn = {"role": message.role, "content": message.content}
    return {**turn, reasoning: message.reasoning} if reasoning and message.reasoning else turn


def _is_text(chat: Chat) -> bool:
    return chat.messages[0].role == TEXT


def _masked(
    fmt: ChatFormat,
    chats: Sequence[Chat],
    refused: list[str],
    ids_T: NDArray[np.int32],
    offsets: NDArray[np.int64],
    *,
    supervise: Literal["all", "last"],
) -> EncodedBlock:
    """The mask of every row at once, and why a row's ids don't have the form that the template promised."""
    reasons = list(refused)
    ends = np.flatnonzero(ids_T == fmt.end_of_turn)
    ends_before = np.searchsorted(ends, offsets)
    answers, answered = _answers(fmt, chats, reasons, ends_before.tolist(), supervise=supervise)
    row_A, number_A, end_A, weight_A = np.array(answers, dtype=np.int64).reshape(-1, 4).T
    start_A = ends[end_A - 1] + 1
    headed_A = np.ones(len(end_A), dtype=np.bool_)
    for i, token in enumerate(fmt.generation_prompt):
        headed_A &= ids_T[np.minimum(start_A + i, len(ids_T) - 1)] == token
    for a in np.flatnonzero(~headed_A)[::-1]:  # backwards: the first one of a row is named
        reasons[row_A[a]] = _headless(chats[row_A[a]], int(number_A[a]))
    learned_A = headed_A & (weight_A > 0)
    supervised_T = np.zeros(len(ids_T), dtype=np.bool_)
    first_A = start_A[learned_A] + len(fmt.generation_prompt)
    for first, end in zip(first_A.tolist(), ends[end_A[learned_A]].tolist(), strict=True):
        supervised_T[first : end + 1] = True
    if fmt.final_end is not None:
        last = offsets[1:][answered] - 1
        ended = ends[ends_before[1:][answered] - 1]
        final = ids_T[last] == fmt.final_end
        supervised_T[last[final]] = supervised_T[ended[final]]
    for row in (i for i, chat in enumerate(chats) if not reasons[i] and _is_text(chat)):
        supervised_T[offsets[row] + 1 : offsets[row + 1]] = True
    learned_before = np.searchsorted(np.flatnonzero(supervised_T), offsets)
    for row in np.flatnonzero(np.diff(learned_before) == 0).tolist():
        reasons[row] = reasons[row] or f"supervises nothing (data.supervise: {supervise}, weight: 0)"
    return EncodedBlock(ids_T, supervised_T, offsets, reasons)


def _headless(chat: Chat, number: int) -> str:
    """Why the ids of an answer don't begin with the generation prompt."""
    at = [i for i, m in enumerate(chat.messages) if m.role == "assistant"][number - 1]
    if not chat.messages[at].content[:1].isspace():
        before = chat.messages[at - 1].role if at else "nothing"
        return f"assistant turn {number} follows {before}, and the chat template begins it only after a user's turn"
    return f"assistant turn {number} begins with white space that merges with the template's own: remove it"


def _answers(
    fmt: ChatFormat,
    chats: Sequence[Chat],
    reasons: list[str],
    ends_before: list[int],
    *,
    supervise: Literal["all", "last"],
) -> tuple[list[tuple[int, int, int, int]], list[int]]:
    """(row, number among its answers, index of its end-of-turn token, weight) of each answer asked for, and the rows
    whose last turn is an answer. Row i has the end-of-turn tokens ends_before[i] … ends_before[i+1] - 1.

    Notes in `reasons` the rows that have another number of turns than the template promised.
    """
    answers: list[tuple[int, int, int, int]] = []
    answered: list[int] = []
    for row, chat in enumerate(chats):
        if reasons[row] or _is_text(chat):
            continue
        has_system = chat.messages[0].role == "system"
        turns = chat.messages[1:] if has_system else chat.messages
        n_ends = ends_before[row + 1] - ends_before[row]
        due = len(turns) + (fmt.added_turns_with_system if has_system else fmt.added_turns)
        if n_ends != due:
            why = ""
            if blank := next((m.role for m in chat.messages if not m.content.strip()), ""):
                why = f": it leaves out the empty {blank} message"
            reasons[row] = f"the chat template makes {n_ends} turns of it where {due} are due{why}"
            continue
        first = ends_before[row + 1] - len(turns)  # counted from the end: the template may have put turns in front
        mine = [(first + i, m.weight) for i, m in enumerate(turns) if m.role == "assistant"]
        numbered = [(row, number, end, weight) for number, (end, weight) in enumerate(mine, 1)]
        answers += numbered if supervise == "all" else numbered[-1:]
        if turns[-1].role == "assistant":
            answered.append(row)
    return answers, answered


def _refused(chat: Chat, fmt: ChatFormat, control: re.Pattern[str]) -> str:
    if fmt.system == "refused" and chat.messages[0].role == "system":
        return "has a system message, which the chat template refuses"
    for i, message in enumerate(chat.messages):
        if message.role == "tool" and fmt.tools:
            return f"messages[{i}]: role tool, which {fmt.tools}"
        thought = message.reasoning if fmt.reasoning else ""
        hit = control.search(message.content) or (control.search(thought) if thought else None)
        if hit:
            where = "text" if message.role == TEXT else f"messages[{i}]: content"
            return f"{where} holds {hit[0]!r}, which the tokenizer would read as a control token"
    return ""


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """All tokens that stand outside the vocabulary of text, but for those that are being taught (model.new_tokens).

    Longest first, so that the message names the whole one.
    """
    taught = set(tokenizer.init_kwargs.get("taught_tokens", ()))
    found = {token.content for token in tokenizer.added_tokens_decoder.values()} - taught
    contents = sorted(found, key=lambda content: (-len(content), content))
    return re.compile("|".join(re.escape(c) for c in contents if c) or r"(?!)")
