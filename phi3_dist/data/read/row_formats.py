"""From one raw row to a checked conversation, in the forms that people's data comes in.

| format | keys of a row |
|---|---|
| `messages` | `messages`: a list of turns, see `turns` |
| `sharegpt` | `conversations`: a list of turns |
| `alpaca` | `instruction`, `output`, and perhaps `input`, which stands under the instruction after an empty line |
| `prompt_completion` | `prompt`, `completion`: two texts, or two lists of messages, of which the second is learned |
| `text` | `text`: a document, every token of which is learned but the first |

Sharegpt, alpaca and prompt_completion may have a `system` text. A conversation is at most one system message, which
comes first, then user and assistant in turn, beginning with the user; what tools gave back (`tool`) may stand between
two answers. A document of raw text is a conversation of one message whose role is `TEXT`: no template goes around it.
Columns that no format reads are counted; those of pictures, films and sounds are refused where they hold something.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from phi3_dist.data.read.printable import clipped
from phi3_dist.data.read.turns import (
    MEDIA,
    TEXT,
    Message,
    Rules,
    Seen,
    UnusableError,
    empty,
    kind_name,
    missing,
    read_turn,
    refuse_placeholders,
    text_of,
)

__all__ = ["BadRow", "Chat", "Format", "RowReader", "meant_columns", "unfit_columns"]

Format = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"]
_REQUIRED: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The keys that a row of each format has, in the order in which `auto` looks for them."""
_OPTIONAL: dict[Format, tuple[str, ...]] = {
    "sharegpt": ("system",),
    "alpaca": ("input", "system"),
    "prompt_completion": ("system",),
}
_NOT_SUPPORTED = ("tools", "history")
KEYS = (*(key for keys in _REQUIRED.values() for key in keys), "input", "system", *_NOT_SUPPORTED)
"""Every key that means something in some format."""
_ALSO_MESSAGES = ("conversation", "dialogue", "dialog", "turns", "chat")
"""Columns that are read as `messages` where they hold a list of turns, and no format fits otherwise."""
_QUESTIONS = ("question", "query", "problem", "instruction", "prompt", "input")
_ANSWERS = ("answer", "response", "completion", "output", "solution")
_KEYS_SHOWN = 12


@dataclass(frozen=True)
class Chat:
    """One conversation and where it stands: `chats.jsonl:12`, `part-0.parquet row 7`."""

    messages: tuple[Message, ...]
    place: str


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    place: str
    reason: str


class RowReader:
    """Reads the rows of one source, all in one format: the asked one or, with `auto`, that of the first good row."""

    def __init__(
        self, format: Literal["auto"] | Format, columns: Mapping[str, str], rules: Rules | None = None
    ) -> None:
        self.format: Format | None = None if format == "auto" else format
        """The format, once it is known."""
        self.columns = {key: columns.get(key, key) for key in KEYS}
        """For each key of a format, the column it is read from."""
        self.rules = rules or Rules()
        self.seen = Seen()
        """What the good rows held that a user should hear of."""
        self._meant = {
            format: {self.columns[key] for key in (*_REQUIRED[format], *_OPTIONAL.get(format, ()), *_NOT_SUPPORTED)}
            for format in _REQUIRED
        }

    def read(self, row: Any, place: str) -> Chat | BadRow:
        """The conversation of a raw row, or why there is none."""
        seen = Seen()
        try:
            if not isinstance(row, dict):
                raise UnusableError(f"not an object but {kind_name(row)}")
            format, columns = self._format_of(row)
            for key in row.keys() & MEDIA:
                if not empty(row[key]) and key not in self.rules.ignore:
                    raise UnusableError(f"has {key}, and only text can be trained on (data.ignore: [{key}] drops it)")
            values = {key: _present(row.get(column)) for key, column in columns.items()}
            for key in _NOT_SUPPORTED:
                if not empty(values[key]) and columns[key] not in self.rules.ignore:
                    raise UnusableError(f"has {columns[key]}, which {_is_are(key)} not supported")
            messages = _READERS[format](values, columns, seen, self.rules)
            if format != "text":
                _check_turns(messages, columns[_REQUIRED[format][0]], seen["empty system", ""])
            if columns is not self.columns:
                seen["turns in", columns["messages"]] += 1
            self._count_unread(row, format, columns, seen)
        except UnusableError as reason:
            return BadRow(place, clipped(str(reason)))
        self.format = format
        self.seen.update(seen)
        return Chat(messages, place)

    def _count_unread(self, row: dict[Any, Any], format: Format, columns: Mapping[str, str], seen: Seen) -> None:
        for key in row.keys() - self._meant[format]:
            if key != columns["messages"] and key not in self.rules.ignore and not _nothing(row[key]):
                seen["column", str(key)] += 1

    def _format_of(self, row: dict[Any, Any]) -> tuple[Format, Mapping[str, str]]:
        """The format, and this row's columns. Raises UnusableError for a row of none, or of another than before."""
        if self.format and self._fits(self.format, row):
            return self.format, self.columns
        found = next((format for format in _REQUIRED if self._fits(format, row)), None)
        if self.format is None and found:
            return found, self.columns
        if found:
            raise UnusableError(f"is {found} where the source is {self.format}: one source has one format")
        if self.format in (None, "messages") and self.columns["messages"] == "messages":
            also = next((key for key in _ALSO_MESSAGES if _are_turns(row.get(key))), None)
            if also:
                return "messages", {**self.columns, "messages": also}
        raise UnusableError(self._why_none(row))

    def _fits(self, format: Format, row: Mapping[Any, Any]) -> bool:
        return all(not missing(row.get(self.columns[key])) for key in _REQUIRED[format])

    def _why_none(self, row: dict[Any, Any]) -> str:
        formats: list[Format] = [self.format] if self.format else list(_REQUIRED)
        format = max(formats, key=lambda known: self._present_of(known, row))
        columns = [self.columns[key] for key in _REQUIRED[format]]
        lacks = " and no ".join(column for column in columns if missing(row.get(column)))
        has = " and ".join(column for column in columns if not missing(row.get(column)))
        keys = [str(key) for key in row]
        listed = ", ".join(keys[:_KEYS_SHOWN]) + (
            f" and {len(keys) - _KEYS_SHOWN} more" if len(keys) > _KEYS_SHOWN else ""
        )
        reason = f"no {lacks}" + (f" beside {has}" if has else "")
        return reason + (f"; its keys are {listed}" if row else "") + _way_of(keys, row)

    def _present_of(self, format: Format, row: Mapping[Any, Any]) -> int:
        return sum(not missing(row.get(self.columns[key])) for key in _REQUIRED[format])


def unfit_columns(columns: Sequence[str], reader: RowReader) -> str:
    """Why a table with these columns has no rows that `reader` can use; "" if it may have some."""
    formats = [reader.format] if reader.format else list(_REQUIRED)
    if any(all(reader.columns[key] in columns for key in _REQUIRED[format]) for format in formats):
        return ""
    if "messages" in formats and reader.columns["messages"] == "messages" and set(_ALSO_MESSAGES) & set(columns):
        return ""
    wanted = [" and ".join(f"`{reader.columns[key]}`" for key in _REQUIRED[format]) for format in formats]
    what = f"has no column {', or '.join(wanted)}; its columns are {', '.join(columns)}"
    return clipped(what) + clipped(_way_of(columns, {}))


def meant_columns(columns: Sequence[str], reader: RowReader) -> list[str]:
    """Those of a table's columns that `reader` looks at."""
    meant = {*reader.columns.values(), *_ALSO_MESSAGES, *MEDIA}
    return [column for column in columns if column in meant]


def _way_of(keys: Sequence[str], row: Mapping[Any, Any]) -> str:
    """How `data.columns` would read a row of these keys, where that can be guessed."""
    turns = next((key for key in keys if _are_turns(row.get(key))), None)
    if turns:
        return f"; data.columns: {{messages: {turns}}} reads its turns"
    names = {key.lower(): key for key in reversed(keys)}
    question = next((names[name] for name in _QUESTIONS if name in names), None)
    answer = next((names[name] for name in _ANSWERS if name in names and names[name] != question), None)
    if question is None or answer is None:
        return ""
    if "context" in names or (question.lower() == "instruction" and "input" in names):
        more = f", input: {names['context']}" if "context" in names else ""
        return f"; data.columns: {{instruction: {question}{more}, output: {answer}}} reads it as alpaca"
    return f"; data.columns: {{prompt: {question}, completion: {answer}}} reads it as prompt_completion"


def _are_turns(value: Any) -> bool:
    """Whether it is a list of objects that name a role."""
    return (
        bool(value)
        and isinstance(value, list)
        and all(isinstance(v, dict) and v.keys() & {"role", "from"} for v in value)
    )


def _present(value: Any) -> Any:
    return None if missing(value) else value


def _nothing(value: Any) -> bool:
    return missing(value) or (isinstance(value, str | list | dict) and not value)


Values = Mapping[str, Any]
Names = Mapping[str, str]


def _from_messages(values: Values, names: Names, seen: Seen, rules: Rules) -> tuple[Message, ...]:
    return _turns(values["messages"], names["messages"], seen, rules)


def _from_sharegpt(values: Values, names: Names, seen: Seen, rules: Rules) -> tuple[Message, ...]:
    return (*_system(values, names), *_turns(values["conversations"], names["conversations"], seen, rules))


def _from_alpaca(values: Values, names: Names, seen: Seen, rules: Rules) -> tuple[Message, ...]:
    more = values["input"]
    if more is not None and not isinstance(more, str):
        raise UnusableError(f"{names['input']} is {kind_name(more)}, not text")
    question = text_of(values["instruction"], names["instruction"])
    if more and more.strip():
        question = f"{question}\n\n{text_of(more, names['input'])}"
    answer = text_of(values["output"], names["output"])
    return _question_and_answer(values, names, question, answer, rules)


def _from_prompt_completion(values: Values, names: Names, seen: Seen, rules: Rules) -> tuple[Message, ...]:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _turns(prompt, names["prompt"], seen, rules)
        after = _turns(completion, names["completion"], seen, rules)
        return (*_system(values, names), *(replace(m, weight=int(m.role != "assistant")) for m in before), *after)
    question, answer = text_of(prompt, names["prompt"]), text_of(completion, names["completion"])
    return _question_and_answer(values, names, question, answer, rules)


def _question_and_answer(values: Values, names: Names, question: str, answer: str, rules: Rules) -> tuple[Message, ...]:
    for text in (question, answer):
        refuse_placeholders(text, rules)
    return (*_system(values, names), Message("user", question), Message("assistant", answer))


def _from_text(values: Values, names: Names, seen: Seen, rules: Rules) -> tuple[Message, ...]:
    return (Message(TEXT, text_of(values["text"], names["text"])),)


_READERS: dict[Format, Callable[[Values, Names, Seen, Rules], tuple[Message, ...]]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "text": _from_text,
}


def _system(values: Values, names: Names) -> tuple[Message, ...]:
    value = values["system"]
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    return (Message("system", text_of(value, names["system"])),)


def _turns(values: Any, name: str, seen: Seen, rules: Rules) -> tuple[Message, ...]:
    if not isinstance(values, list):
        raise UnusableError(f"{name} is {kind_name(values)}, not a list")
    if not values:
        raise UnusableError(f"{name} is empty")
    messages: list[Message] = []
    for i, value in enumerate(values):
        try:
            message = read_turn(value, seen, rules)
        except UnusableError as reason:
            raise UnusableError(f"{name}[{i}]: {reason}") from None
        if message:
            messages.append(message)
    return tuple(messages)


def _check_turns(messages: tuple[Message, ...], name: str, left_out: int) -> None:
    """Raises UnusableError for turns out of order, or none to learn; `left_out` stood before those that are here."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    first = len(messages) - len(turns) + left_out
    expected = "user"
    for i, message in enumerate(turns):
        of_tool = message.role == "tool" and i > 0 and turns[i - 1].role in ("assistant", "tool")
        if message.role != expected and not of_tool:
            rule = "system may only come first" if message.role == "system" else "user and assistant take turns"
            rule = "tool follows an assistant turn or another tool" if message.role == "tool" else rule
            raise UnusableError(f"{name}[{first + i}] is {message.role} where {expected} is due ({rule})")
        expected = "user" if message.role == "assistant" else "assistant"
    answers = [m for m in turns if m.role == "assistant"]
    if not answers:
        raise UnusableError("no assistant turn")
    if not any(m.weight for m in answers):
        raise UnusableError("supervises nothing: every assistant turn is kept out of the loss (weight 0)")


def _is_are(key: str) -> str:
    return "are" if key.endswith("s") else "is"
