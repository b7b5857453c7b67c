"""What a tokenizer's chat template does, found by probing it: the form that the mask relies on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jinja2 import TemplateError

from phi3_dist.data.read.turns import REASONING
from phi3_dist.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["ChatFormat", "unfit"]

Turn = dict[str, str]
_SYSTEM: Turn = {"role": "system", "content": "zebra system probe"}
_USER: Turn = {"role": "user", "content": "zebra user probe"}
_ANSWER: Turn = {"role": "assistant", "content": "zebra answer probe"}
_TOOL: Turn = {"role": "tool", "content": "zebra tool probe"}
_OTHER_ANSWER: Turn = {"role": "assistant", "content": "Quite another reply"}


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
    reasoning: str
    """The key of a message under which the template renders what an assistant thought before; "" where it does not."""
    tools: str
    """Why rows with a `tool` message can't be used; "" where the template renders them."""
    notices: tuple[str, ...]
    """Facts about the template that a user should see at start."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> ChatFormat:
        """Probe the tokenizer's template. Raises DataError where its form is not one that can be masked safely."""
        prompt = _ids(tokenizer, [_USER], generation_prompt=True)
        full = _ids(tokenizer, [_USER, _ANSWER])
        added = set(tokenizer.added_tokens_decoder)
        if full[: len(prompt)] != prompt:
            raise unfit("the ids of a prompt are not the beginning of the ids of the whole conversation")
        end = next((token for token in full[len(prompt) :] if token in added), None)
        if end is None:
            raise unfit("no control token ends an assistant's turn")
        content_end = full.index(end, len(prompt))
        tail = tuple(full[content_end + 1 :])
        if end in tail or end not in prompt:
            raise unfit("not every turn ends with the same control token, exactly once")
        last_end = len(prompt) - 1 - prompt[::-1].index(end)
        generation_prompt = tuple(prompt[last_end + 1 :])
        if not added.intersection(generation_prompt):
            raise unfit("no control token begins an assistant's turn")
        system, added_turns_with_system, notices = _system(tokenizer, end)
        added_turns = full.count(end) - 2
        if added_turns > 0:
            notices.append("the chat template puts a default system message before conversations that have none")
        final_end = tail[-1] if tail and tail[-1] in added else None
        fmt = cls(
            end_of_turn=end,
            final_end=final_end,
            generation_prompt=generation_prompt,
            tail=tail,
            added_turns=added_turns,
            added_turns_with_system=added_turns_with_system,
            system=system,
            reasoning=_reasoning(tokenizer, prompt, end),
            tools=_tools(tokenizer, end, generation_prompt, added_turns),
            notices=tuple(notices),
        )
        _prove(fmt, tokenizer)
        return fmt


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


def _reasoning(tokenizer: PreTrainedTokenizerFast, prompt: list[int], end: int) -> str:
    """The first key of reasoning that shows in an answer, and changes nothing of its form."""
    for key in REASONING:
        thought = {**_ANSWER, key: "zebra reasoning probe"}
        try:
            text = str(tokenizer.apply_chat_template([_USER, thought], tokenize=False))
        except TemplateError:
            continue
        ids = _batch_ids(tokenizer, [text])[0]
        same_form = ids[: len(prompt)] == prompt and ids.count(end) == prompt.count(end) + 1
        if thought[key] in text and _ANSWER["content"] in text and same_form:
            return key
    return ""


def _tools(tokenizer: PreTrainedTokenizerFast, end: int, header: tuple[int, ...], added_turns: int) -> str:
    """Why a tool's message between two answers is not rendered as a turn of its own; "" where it is (Phi-4-mini)."""
    try:
        text = str(tokenizer.apply_chat_template([_USER, _ANSWER, _TOOL, _OTHER_ANSWER], tokenize=False))
    except TemplateError as error:
        return f"the chat template refuses ({error})"
    if _TOOL["content"] not in text:
        return "the chat template drops: the model would never see it (Phi-4-mini's template renders it)"
    ids = _batch_ids(tokenizer, [text])[0]
    ends = [i for i, token in enumerate(ids) if token == end]
    if len(ends) != 4 + added_turns or tuple(ids[ends[-2] + 1 :][: len(header)]) != header:
        return "the chat template does not render as a separate turn"
    return ""


def _prove(fmt: ChatFormat, tokenizer: PreTrainedTokenizerFast) -> None:
    """Two answers in one conversation: each found whole, and each prompt the beginning of what follows it."""
    turns = [_USER, _ANSWER, _USER, _OTHER_ANSWER]
    full = _ids(tokenizer, turns)
    if full[: len(_ids(tokenizer, turns[:3], generation_prompt=True))] != _ids(
        tokenizer, turns[:3], generation_prompt=True
    ):
        raise unfit("an earlier turn is rendered differently once more turns follow")
    ends = [i for i, token in enumerate(full) if token == fmt.end_of_turn]
    if len(ends) != 4 + fmt.added_turns or tuple(full[ends[-1] + 1 :]) != fmt.tail:
        raise unfit("the turns of a longer conversation don't end as those of a short one")
    header = list(fmt.generation_prompt)
    if any(full[ends[k - 1] + 1 :][: len(header)] != header for k in (-1, -3)):
        raise unfit("assistant turns don't begin with the generation prompt")


def unfit(what: str) -> DataError:
    """The error for a template whose rows can't be masked."""
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
        raise unfit(f"it stops with {error}") from error


def _batch_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: lengths are judged against data.pack_length, not against the tokenizer's own idea
    found = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in found["input_ids"]]


def _ids(tokenizer: PreTrainedTokenizerFast, turns: list[Turn], generation_prompt: bool = False) -> list[int]:
    return _batch_ids(tokenizer, [_render(tokenizer, turns, generation_prompt)])[0]
