"""Token ids and loss mask of a conversation, made together from ids.

The ids are those of the rendered template in one piece, which is what a server makes of the same conversation. The
mask is read off the ids: contents hold no control token (such a row is refused), so each turn runs from one
end-of-turn token to the next, an assistant's begins with the ids of the generation prompt, and everything between
that and its end-of-turn token, that included, is learned. String offsets play no part: Phi-3's role tokens swallow
the newline after them, and offsets then point elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jinja2 import TemplateError

from phi3_dist.data.sources import BadRow, Chat, problems_of
from phi3_dist.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["ChatFormat", "Encoded", "encode_chats", "encode_rows"]

Turn = dict[str, str]
_SYSTEM: Turn = {"role": "system", "content": "zebra system probe"}
_USER: Turn = {"role": "user", "content": "zebra user probe"}
_ANSWER: Turn = {"role": "assistant", "content": "zebra answer probe"}
_OTHER_ANSWER: Turn = {"role": "assistant", "content": "Quite another reply"}


@dataclass(frozen=True)
class Encoded:
    """One row: its token ids, and for each whether it is learned."""

    ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True)
class ChatFormat:
    """What a tokenizer's chat template does, found by probing it (Phi-3's and ChatML's shapes)."""

    end_of_turn: int
    """Id that ends every turn: `<|end|>` for Phi-3, `<|im_end|>` for ChatML."""
    final_end: int | None
    """Id the template puts at the very end when no answer is asked for (Phi-3's `<|endoftext|>`), if any."""
    generation_prompt: tuple[int, ...]
    """Ids between a user's end-of-turn token and the first token of the answer."""
    tail: tuple[int, ...]
    """Ids after the last answer's end-of-turn token."""
    added_turns: int
    """Turns the template puts before a conversation without a system message (a default system message: 1)."""
    added_turns_with_system: int
    """The same for a conversation with a system message, that message included."""
    system: Literal["kept", "dropped", "refused"]
    """What becomes of system messages."""
    notices: tuple[str, ...]
    """Facts about the template that a user should see at start."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> ChatFormat:
        """Probe the tokenizer's template. Raises DataError where its form is not one that can be masked safely."""
        prompt = _ids(tokenizer, [_USER], generation_prompt=True)
        full = _ids(tokenizer, [_USER, _ANSWER])
        added = set(tokenizer.added_tokens_decoder)
        if full[: len(prompt)] != prompt:
            raise _unfit("the ids of a prompt are not the beginning of the ids of the whole conversation")
        end = next((token for token in full[len(prompt) :] if token in added), None)
        if end is None:
            raise _unfit("no control token ends an assistant's turn")
        content_end = full.index(end, len(prompt))
        tail = tuple(full[content_end + 1 :])
        if end in tail or end not in prompt:
            raise _unfit("not every turn ends with the same control token, exactly once")
        last_end = len(prompt) - 1 - prompt[::-1].index(end)
        generation_prompt = tuple(prompt[last_end + 1 :])
        if not added.intersection(generation_prompt):
            raise _unfit("no control token begins an assistant's turn")
        system, added_turns_with_system, notices = _system(tokenizer, end)
        added_turns = full.count(end) - 2
        if added_turns > 0:
            notices.append("the chat template puts a default system message before conversations that have none")
        final_end = tail[-1] if tail and tail[-1] in added else None
        fmt = cls(end, final_end, generation_prompt, tail, added_turns, added_turns_with_system, system, tuple(notices))
        _prove(fmt, tokenizer)
        return fmt

    def mask(self, ids: Sequence[int], chat: Chat, supervise: Literal["all", "last"]) -> list[bool] | str:
        """For each id, whether it is learned; or why the ids don't have the form that the template promised."""
        ends = [i for i, token in enumerate(ids) if token == self.end_of_turn]
        has_system = chat.messages[0].role == "system"
        turns = chat.messages[1:] if has_system else chat.messages
        if len(ends) != len(turns) + (self.added_turns_with_system if has_system else self.added_turns):
            return f"{len(ends)} turns after the template instead of {len(turns)}"
        supervised = [False] * len(ids)
        answers = [i for i, message in enumerate(turns) if message.role == "assistant"]
        header = list(self.generation_prompt)
        for i in answers if supervise == "all" else answers[-1:]:
            k = i - len(turns) + len(ends)  # counted from the end: the template may have added turns in front
            start = ends[k - 1] + 1
            content = start + len(header)
            if list(ids[start:content]) != header:
                return (
                    f"assistant turn {answers.index(i) + 1} begins with white space that merges with the template's "
                    "own: remove it"
                )
            if turns[i].weight:
                supervised[content : ends[k] + 1] = [True] * (ends[k] + 1 - content)
        if self.final_end is not None and turns[-1].role == "assistant" and ids[-1] == self.final_end:
            supervised[-1] = supervised[ends[-1]]
        return supervised


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
    if not chats:
        return []
    control = _control_tokens(tokenizer)
    reasons = [_refused(chat, fmt, control) for chat in chats]
    good = [chat for chat, reason in zip(chats, reasons, strict=True) if not reason]
    texts = [_render(tokenizer, [{"role": m.role, "content": m.content} for m in chat.messages]) for chat in good]
    all_ids = iter(_batch_ids(tokenizer, texts))
    rows: list[Encoded | BadRow] = []
    for chat, reason in zip(chats, reasons, strict=True):
        if reason:
            rows.append(BadRow(chat.place, reason))
            continue
        ids = next(all_ids)
        mask = fmt.mask(ids, chat, supervise)
        if isinstance(mask, str):
            rows.append(BadRow(chat.place, mask))
        elif not any(mask):
            rows.append(BadRow(chat.place, f"supervises nothing (data.supervise: {supervise}, weight: 0)"))
        else:
            rows.append(Encoded(ids, mask))
    return rows


def _refused(chat: Chat, fmt: ChatFormat, control: re.Pattern[str]) -> str:
    if fmt.system == "refused" and chat.messages[0].role == "system":
        return "has a system message, which the chat template refuses"
    for i, message in enumerate(chat.messages):
        hit = control.search(message.content)
        if hit:
            return f"messages[{i}]: content holds {hit[0]!r}, which the tokenizer would read as a control token"
    return ""


def _control_tokens(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """All tokens that stand outside the vocabulary of text. Longest first, so that the message names the whole one."""
    contents = sorted((t.content for t in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    return re.compile("|".join(re.escape(c) for c in contents if c) or r"(?!)")


def _system(
    tokenizer: PreTrainedTokenizerFast, end: int
) -> tuple[Literal["kept", "dropped", "refused"], int, list[str]]:
    """What becomes of system messages, how many turns they add, and what the user should know about it."""
    turns = [_SYSTEM, _USER, _ANSWER]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except TemplateError:
        return "refused", 0, ["the chat template refuses system messages: rows that have one can't be used"]
    extra = _batch_ids(tokenizer, [text])[0].count(end) - 2
    if _SYSTEM["content"] in text:
        return "kept", extra, []
    return "dropped", extra, ["the chat template drops system messages: the model never sees them"]


def _prove(fmt: ChatFormat, tokenizer: PreTrainedTokenizerFast) -> None:
    """Two answers in one conversation: each found whole, and each prompt the beginning of what follows it."""
    turns = [_USER, _ANSWER, _USER, _OTHER_ANSWER]
    full = _ids(tokenizer, turns)
    if full[: len(_ids(tokenizer, turns[:3], generation_prompt=True))] != _ids(
        tokenizer, turns[:3], generation_prompt=True
    ):
        raise _unfit("an earlier turn is rendered otherwise once more turns follow")
    ends = [i for i, token in enumerate(full) if token == fmt.end_of_turn]
    if len(ends) != 4 + fmt.added_turns or tuple(full[ends[-1] + 1 :]) != fmt.tail:
        raise _unfit("the turns of a longer conversation don't end as those of a short one")
    header = list(fmt.generation_prompt)
    if any(full[ends[k - 1] + 1 :][: len(header)] != header for k in (-1, -3)):
        raise _unfit("assistant turns don't begin with the generation prompt")


def _unfit(what: str) -> DataError:
    return DataError(
        Problem(
            "chat template",
            f"can't be used for training: {what}",
            "use a tokenizer with Phi-3's template or ChatML (model.tokenizer)",
        )
    )


def _render(tokenizer: PreTrainedTokenizerFast, turns: list[Turn], generation_prompt: bool = False) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt))
    except TemplateError as error:
        raise _unfit(f"it stops with {error}") from error


def _batch_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: lengths are judged against data.pack_length, not against the tokenizer's own idea
    found = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in found["input_ids"]]


def _ids(tokenizer: PreTrainedTokenizerFast, turns: list[Turn], generation_prompt: bool = False) -> list[int]:
    return _batch_ids(tokenizer, [_render(tokenizer, turns, generation_prompt)])[0]
