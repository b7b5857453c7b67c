"""From one raw row to a checked conversation, in the forms that people's data comes in.

| format | keys of a row |
|---|---|
| `messages` | `messages`: a list of `{role, content, weight?}` |
| `sharegpt` | `conversations`: a list of `{from, value, weight?}`; human and gpt are user and assistant |
| `alpaca` | `instruction`, `output`, and perhaps `input`, which stands under the instruction after an empty line |
| `prompt_completion` | `prompt`, `completion`: two texts, or two lists of messages, of which the second is learned |
| `text` | `text`: a document, every token of which is learned but the first |

Sharegpt, alpaca and prompt_completion may have a `system` text. A conversation is at most one system message, which
comes first, then user and assistant in turn, beginning with the user; what tools gave back (`tool`) may stand between
two answers. `weight: 0` on an assistant message keeps it out of the loss. A document of raw text is a conversation of
one message whose role is `TEXT`: no template goes around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

__all__ = ["TEXT", "BadRow", "Chat", "Format", "Message", "RowReader", "unfit_columns"]

TEXT = "text"
"""The role of the one message that stands for a document of raw text."""
ROLES = ("system", "user", "assistant", "tool")
_TOOL_KEYS = ("tool_calls", "function_call")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"} | {role: role for role in ROLES}

Format = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"]
_REQUIRED: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The keys that a row of each format has, in the order in which `auto` looks for them."""
_NOT_SUPPORTED = ("tools", "history")
KEYS = (*(key for keys in _REQUIRED.values() for key in keys), "input", "system", *_NOT_SUPPORTED)
"""Every key that means something in some format."""


@dataclass(frozen=True)
class Message:
    """One turn. `weight` 0 keeps an assistant turn out of the loss; on other roles it means nothing."""

    role: str
    content: str
    weight: int = 1


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


class _UnusableError(Exception):
    """Why a row can't be used."""


class RowReader:
    """Reads the rows of one source, all in one format: the asked one or, with `auto`, that of the first good row."""

    def __init__(self, format: Literal["auto"] | Format, columns: Mapping[str, str]) -> None:
        self.format: Format | None = None if format == "auto" else format
        """The format, once it is known."""
        self.columns = {key: columns.get(key, key) for key in KEYS}
        """For each key of a format, the column it is read from."""

    def read(self, row: Any, place: str) -> Chat | BadRow:
        """The conversation of a raw row, or why there is none."""
        try:
            if not isinstance(row, dict):
                raise _UnusableError(f"not an object but {_kind(row)}")
            format = self._format_of(row)
            values = {key: row.get(column) for key, column in self.columns.items()}
            for key in _NOT_SUPPORTED:
                if values[key]:
                    raise _UnusableError(f"has {self.columns[key]}, which {_is_are(key)} not supported")
            messages = _READERS[format](values, self.columns)
            if format != "text":
                _check_turns(messages, self.columns[_REQUIRED[format][0]])
        except _UnusableError as reason:
            return BadRow(place, str(reason))
        self.format = format
        return Chat(messages, place)

    def _format_of(self, row: dict[Any, Any]) -> Format:
        """Raises _UnusableError for a row of no format, or of another one than the rows before it."""
        if self.format and self._fits(self.format, row):
            return self.format
        found = next((format for format in _REQUIRED if self._fits(format, row)), None)
        if self.format is None and found:
            return found
        if found:
            raise _UnusableError(f"is {found} where the source is {self.format}: one source has one format")
        wanted = self._wanted(self.format or "messages", row)
        raise _UnusableError(f"no {wanted}" + (f"; its keys are {', '.join(map(str, row))}" if row else ""))

    def _fits(self, format: Format, row: Mapping[Any, Any]) -> bool:
        return all(row.get(self.columns[key]) is not None for key in _REQUIRED[format])

    def _wanted(self, format: Format, row: Mapping[Any, Any]) -> str:
        columns = [self.columns[key] for key in _REQUIRED[format]]
        return " and no ".join(column for column in columns if row.get(column) is None)


def unfit_columns(columns: Sequence[str], reader: RowReader) -> str:
    """Why a table with these columns has no rows that `reader` can use; "" if it may have some."""
    formats = [reader.format] if reader.format else list(_REQUIRED)
    if any(all(reader.columns[key] in columns for key in _REQUIRED[format]) for format in formats):
        return ""
    wanted = [" and ".join(f"`{reader.columns[key]}`" for key in _REQUIRED[format]) for format in formats]
    return f"has no column {', or '.join(wanted)}; its columns are {', '.join(columns)}"


def _from_messages(values: Mapping[str, Any], names: Mapping[str, str]) -> tuple[Message, ...]:
    return _turns(values["messages"], names["messages"], _message_of)


def _from_sharegpt(values: Mapping[str, Any], names: Mapping[str, str]) -> tuple[Message, ...]:
    return (*_system(values, names), *_turns(values["conversations"], names["conversations"], _sharegpt_turn))


def _from_alpaca(values: Mapping[str, Any], names: Mapping[str, str]) -> tuple[Message, ...]:
    more = values["input"]
    if more is not None and not isinstance(more, str):
        raise _UnusableError(f"{names['input']} is {_kind(more)}, not text")
    question = _text(values["instruction"], names["instruction"])
    if more and more.strip():
        question = f"{question}\n\n{_text(more, names['input'])}"
    answer = _text(values["output"], names["output"])
    return (*_system(values, names), Message("user", question), Message("assistant", answer))


def _from_prompt_completion(values: Mapping[str, Any], names: Mapping[str, str]) -> tuple[Message, ...]:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _turns(prompt, names["prompt"], _message_of)
        after = _turns(completion, names["completion"], _message_of)
        return (*_system(values, names), *(replace(m, weight=int(m.role != "assistant")) for m in before), *after)
    question, answer = _text(prompt, names["prompt"]), _text(completion, names["completion"])
    return (*_system(values, names), Message("user", question), Message("assistant", answer))


def _from_text(values: Mapping[str, Any], names: Mapping[str, str]) -> tuple[Message, ...]:
    return (Message(TEXT, _text(values["text"], names["text"])),)


_READERS: dict[Format, Callable[[Mapping[str, Any], Mapping[str, str]], tuple[Message, ...]]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "text": _from_text,
}


def _system(values: Mapping[str, Any], names: Mapping[str, str]) -> tuple[Message, ...]:
    value = values["system"]
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    return (Message("system", _text(value, names["system"])),)


def _turns(values: Any, name: str, read: Callable[[Any], Message]) -> tuple[Message, ...]:
    if not isinstance(values, list):
        raise _UnusableError(f"{name} is {_kind(values)}, not a list")
    if not values:
        raise _UnusableError(f"{name} is empty")
    messages: list[Message] = []
    for i, value in enumerate(values):
        try:
            messages.append(read(value))
        except _UnusableError as reason:
            raise _UnusableError(f"{name}[{i}]: {reason}") from None
    return tuple(messages)


def _sharegpt_turn(value: Any) -> Message:
    if not isinstance(value, dict):
        raise _UnusableError(f"not an object but {_kind(value)}")
    name = value.get("from")
    if not isinstance(name, str) or name not in _SHAREGPT_ROLES:
        raise _UnusableError(f"unknown from {name!r}; known are {', '.join(_SHAREGPT_ROLES)}")
    return _message_of({**value, "role": _SHAREGPT_ROLES[name], "content": value.get("value")})


def _message_of(value: Any) -> Message:
    if not isinstance(value, dict):
        raise _UnusableError(f"not an object but {_kind(value)}")
    role, content, weight = value.get("role"), value.get("content"), value.get("weight")
    if role not in ROLES:
        raise _UnusableError(f"unknown role {role!r}; known are {', '.join(ROLES)}")
    for key in _TOOL_KEYS:
        if value.get(key):
            raise _UnusableError(f"has {key}, which is not supported")
    if content is None or (isinstance(content, str) and not content.strip()):
        raise _UnusableError(f"empty content ({role})")
    if weight is not None and (type(weight) is not int or weight not in (0, 1)):
        raise _UnusableError(f"weight is {weight!r}; it can be 0 or 1")
    return Message(role, _text(content, "content"), 1 if weight is None else weight)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _UnusableError(f"{name} is {_kind(value)}, not text")
    if not value.strip():
        raise _UnusableError(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _UnusableError(f"{name} holds half of a surrogate pair, which is no character") from None
    return value


def _check_turns(messages: tuple[Message, ...], name: str) -> None:
    turns = messages[1:] if messages[0].role == "system" else messages
    first = len(messages) - len(turns)
    expected = "user"
    for i, message in enumerate(turns):
        of_tool = message.role == "tool" and i > 0 and turns[i - 1].role in ("assistant", "tool")
        if message.role != expected and not of_tool:
            rule = "system may only come first" if message.role == "system" else "user and assistant take turns"
            rule = "tool follows an assistant turn or another tool" if message.role == "tool" else rule
            raise _UnusableError(f"{name}[{first + i}] is {message.role} where {expected} is due ({rule})")
        expected = "user" if message.role == "assistant" else "assistant"
    answers = [m for m in turns if m.role == "assistant"]
    if not answers:
        raise _UnusableError("no assistant turn")
    if not any(m.weight for m in answers):
        raise _UnusableError("supervises nothing: every assistant turn has weight 0")


def _is_are(key: str) -> str:
    return "are" if key.endswith("s") else "is"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
