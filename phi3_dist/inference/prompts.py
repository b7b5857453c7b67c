"""Prompts: read from a file of rows or made of a text, and turned into the tokens that training would have seen."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from phi3_dist.data.read.raw_rows import raw_rows
from phi3_dist.data.read.row_formats import BadRow, RowReader
from phi3_dist.data.read.turns import kind_name
from phi3_dist.data.render.encode import control_tokens
from phi3_dist.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Prompt", "prompt_ids", "read_prompts"]

_SHOWN = 20
_PLACEHOLDER = "x"
_ANSWER_OF = {"prompt": "completion", "instruction": "output"}


@dataclass(frozen=True)
class Prompt:
    """Turns of role and content, the last to be answered; the answer that the row has, if any; where it stands."""

    messages: tuple[Mapping[str, str], ...]
    wanted: str | None = None
    place: str = "prompt"

    @classmethod
    def of(cls, text: str, system: str = "", place: str = "prompt") -> Prompt:
        """A question, under a system message where one is given."""
        first = ({"role": "system", "content": system},) if system else ()
        return cls((*first, {"role": "user", "content": text}), None, place)

    @property
    def hash(self) -> str:
        """What is asked, in 16 hexadecimal digits."""
        text = json.dumps([[m["role"], m["content"]] for m in self.messages])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _with_answer(row: Any) -> tuple[Any, bool]:
    """A row that has an answer, as rows to train on have; whether it was put there."""
    if not isinstance(row, dict):
        return row, False
    for key in ("messages", "conversations", "conversation", "prompt"):
        turns = row.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict) and "completion" not in row:
            role_key, text_key = ("from", "value") if "from" in turns[-1] else ("role", "content")
            if turns[-1].get(role_key) in ("assistant", "gpt", "model", "bot", "chatgpt"):
                return ({**row, "messages": turns} if key == "prompt" else row), False
            turns = [*turns, {role_key: "assistant", text_key: _PLACEHOLDER}]
            more = {k: v for k, v in row.items() if k != key}
            return {**more, ("messages" if key == "prompt" else key): turns}, True
    for question, answer in _ANSWER_OF.items():
        if isinstance(row.get(question), str) and row.get(answer) is None:
            return {**row, answer: _PLACEHOLDER}, True
    return row, False


def _is_no_text(value: Any) -> bool:
    return value is not None and not isinstance(value, str | list)


def _prompt_of(row: Any, place: str, columns: Mapping[str, str]) -> Prompt | Problem:
    fix = '{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'
    if isinstance(row, BadRow):
        return Problem(place, row.reason, "one JSON object a line")
    if isinstance(row, dict) and (wrong := next((k for k in _ANSWER_OF if _is_no_text(row.get(k))), "")):
        return Problem(place, f"{wrong} is {kind_name(row[wrong])}, not text", f"write it as {fix}")
    filled, placed = _with_answer(row)
    read = RowReader("auto", columns).read(filled, place)
    if isinstance(read, BadRow):
        return Problem(place, read.reason, f"write it as {fix}")
    turns = tuple({"role": m.role, "content": m.content} for m in read.messages)
    if turns[-1]["role"] != "assistant":
        return Problem(place, "does not end with a question", f"write it as {fix}")
    return Prompt(turns[:-1], None if placed else turns[-1]["content"], place)


def read_prompts(path: Path, columns: Mapping[str, str] | None = None) -> list[Prompt]:
    """The prompts of a file of rows (JSONL, JSON, CSV, Parquet, packed ones); an answer that a row has is `wanted`.

    A row is anything that can be trained on, with or without its answer. Empty lines are passed over. Raises DataError
    with every row that can't be read.
    """
    fix = "give a file of rows, or a prompt with --prompt"
    if not path.is_file():  # a folder, a device, a pipe
        what = "is not a plain file" if path.exists() else f"cannot be read: {os.strerror(errno.ENOENT)}"
        raise DataError(Problem(str(path), what, fix))
    found: list[Prompt] = []
    problems: list[Problem] = []
    for place, row in raw_rows(path, path.name, lambda names: names):
        read = _prompt_of(row, place, columns or {})
        if isinstance(read, Problem):
            problems.append(read)
        else:
            found.append(read)
    if problems:
        more = [Problem("", f"and {len(problems) - _SHOWN:,} more rows")] if len(problems) > _SHOWN else []
        raise DataError(*problems[:_SHOWN], *more)
    if not found:
        raise DataError(Problem(str(path), "holds no prompt", "one JSON object a line"))
    return found


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The ids of each prompt with the template's generation prompt: what training sees before the answer.

    Raises DataError for a prompt that the template refuses, that does not end with a question, or that holds a control
    token, which would be read as the end of a turn.
    """
    control = control_tokens(tokenizer)
    texts, problems = [], []
    for prompt in prompts:
        hit = next((found for m in prompt.messages if (found := control.search(m["content"]))), None)
        if not prompt.messages or prompt.messages[-1]["role"] not in ("user", "tool"):
            problems.append(Problem(prompt.place, "does not end with a question", "end it with a user's turn"))
        elif hit:
            what = f"holds {hit[0]!r}, which the tokenizer would read as a control token"
            problems.append(Problem(prompt.place, what, "take it out"))
        else:
            try:
                texts.append(_rendered(tokenizer, prompt))
            except TemplateError as error:
                problems.append(Problem(prompt.place, f"the chat template refuses it: {error}", "change its turns"))
    if problems:
        raise DataError(*problems[:_SHOWN])
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return [list(ids) for ids in encoded]


def _rendered(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> str:
    turns = [dict(message) for message in prompt.messages]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
