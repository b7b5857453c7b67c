"""One turn of a conversation, out of what people write for one.

A turn is an object of role and content (`from` and `value` mean the same). Besides: flags that keep an answer out of
the loss, contents of several text parts, the reasoning before an answer. What is not text, and calls of tools, are
refused; keys that nobody here reads are counted, so that nothing is left out in silence.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "MEDIA",
    "ROLES",
    "TEXT",
    "Message",
    "Rules",
    "Seen",
    "UnusableError",
    "empty",
    "kind_name",
    "missing",
    "read_turn",
    "refuse_placeholders",
    "text_of",
]

TEXT = "text"
"""The role of the one message that stands for a document of raw text."""
ROLES = ("system", "user", "assistant", "tool")
_ROLE_OF = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "model": "assistant",
    "function": "tool",
    "developer": "system",
}
_TOOL_KEYS = ("tool_calls", "function_call")
FLAGS = ("weight", "loss", "train", "trainable", "train_on_turn")
"""Keys by which a message says whether it is learned."""
REASONING = ("reasoning_content", "thinking", "reasoning")
MEDIA = frozenset(("image", "images", "image_url", "video", "videos", "audio", "audios"))
_READ = frozenset(("role", "content", "from", "value", *FLAGS, *REASONING, *_TOOL_KEYS, *MEDIA))
_PLACEHOLDER = re.compile(r"<\|(?:image|video|audio)(?:_\d+)?\|>|<(image|video|audio)>")
_TEXT_PARTS = ("text", "input_text", "output_text")
_NOTHING = ("", "[]", "{}", "null", "None")
LONGEST_TEXT = 16 * 2**20
"""Characters. Longer ones fit no pack, and a tokenizer needs a hundred times as many bytes for them."""

Seen = Counter[tuple[str, str]]
"""What a user should hear of, by kind and name, and how often it was met."""


@dataclass(frozen=True)
class Message:
    """One turn. `weight` 0 keeps an assistant turn out of the loss; on other roles it means nothing."""

    role: str
    content: str
    weight: int = 1
    reasoning: str = ""
    """What an assistant thought before the content; only some templates render it."""


@dataclass(frozen=True)
class Rules:
    """What the `data` section says of keys that not everybody wants read."""

    ignore: frozenset[str] = frozenset()
    reasoning: Literal["auto", "drop", "refuse"] = "auto"


class UnusableError(Exception):
    """Why a row can't be used."""


def missing(value: Any) -> bool:
    """Whether a value stands for none: null, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def empty(value: Any) -> bool:
    """Whether there is nothing in a value, also where a table had to write that as text."""
    if isinstance(value, str):
        return value.strip() in _NOTHING
    return missing(value) or (isinstance(value, list | dict | tuple) and not value)


def read_turn(value: Any, seen: Seen, rules: Rules) -> Message | None:
    """The message of a turn; None for an empty system message. Raises UnusableError."""
    if not isinstance(value, dict):
        raise UnusableError(f"not an object but {kind_name(value)}")
    role = _role_of(value)
    for key in _TOOL_KEYS:
        if not empty(value.get(key)) and key not in rules.ignore:
            raise UnusableError(f"has {key}, which is not supported")
    for key in value.keys() - _READ:
        if not empty(value[key]) and key not in rules.ignore:
            seen["message key", str(key)] += 1
    for key in value.keys() & MEDIA:
        if not empty(value[key]) and key not in rules.ignore:
            raise UnusableError(f"has {key}, and only text can be trained on")
    content = value.get("content")
    content = value.get("value") if missing(content) else content
    if isinstance(content, list):
        content = _joined(content)
    if missing(content) or (isinstance(content, str) and not content.strip()):
        if role == "system":
            seen["empty system", ""] += 1
            return None
        raise UnusableError(f"empty content ({role})")
    text = text_of(content, "content")
    refuse_placeholders(text, rules)
    return Message(role, text, _weight(value, role, seen, rules), _reasoning(value, role, seen, rules))


def _role_of(value: Mapping[str, Any]) -> str:
    key = "from" if missing(value.get("role")) and "from" in value else "role"
    name = value.get(key)
    role = _ROLE_OF.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise UnusableError(f"unknown {key} {name!r}; known are {', '.join(_ROLE_OF)}")
    return role


def _joined(parts: list[Any]) -> str:
    """The text of parts, one after the other, as templates that know parts print them."""
    texts: list[str] = []
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS:
            if not isinstance(part, dict):
                raise UnusableError(f"content is a list, not text: content[{i}] is {kind_name(part)}")
            raise UnusableError(f"content[{i}] is a part of type {kind!r}, and only text can be trained on")
        texts.append(text_of(part.get("text"), f"content[{i}].text", may_be_empty=True))
    return "".join(texts)


def _weight(value: Mapping[str, Any], role: str, seen: Seen, rules: Rules) -> int:
    """0 where any flag keeps the turn out of the loss. Raises UnusableError for a flag that says neither."""
    weight = 1
    for key in FLAGS:
        flag = value.get(key)
        if missing(flag) or key in rules.ignore:
            continue
        said = isinstance(flag, bool) if key != "weight" else False
        if not said and (isinstance(flag, bool) or not isinstance(flag, int | float) or flag not in (0, 1)):
            known = "0 or 1" if key == "weight" else "true or false"
            raise UnusableError(f"{key} is {flag!r}; it can be {known}")
        if not flag:
            weight = 0
        if role == "assistant" and not flag:
            seen["not learned", key] += 1
        elif role != "assistant" and flag and key != "weight":
            seen["asks to learn", key] += 1
    return weight


def _reasoning(value: Mapping[str, Any], role: str, seen: Seen, rules: Rules) -> str:
    for key in REASONING:
        thought = value.get(key)
        if key not in value or empty(thought) or key in rules.ignore:
            continue
        if role != "assistant":
            seen["message key", key] += 1
            continue
        if rules.reasoning == "refuse":
            raise UnusableError(f"has {key}, which data.reasoning: refuse does not take")
        if rules.reasoning == "drop":
            return ""
        seen["reasoning", key] += 1
        return text_of(thought, key)
    return ""


def refuse_placeholders(text: str, rules: Rules) -> None:
    """Raises UnusableError for the place of a picture, a film or a sound in a text. HTML closes its tags and passes."""
    if "<" not in text:
        return
    for hole in _PLACEHOLDER.finditer(text):
        tag = hole[1]
        if hole[0] not in rules.ignore and not (tag and f"</{tag}>" in text):
            what = f"holds {hole[0]!r}, the place of something that is not text, and only text can be trained on"
            raise UnusableError(f"{what} (data.ignore: ['{hole[0]}'] learns it as text)")


def text_of(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    """A value that must be text. Raises UnusableError."""
    if not isinstance(value, str):
        raise UnusableError(f"{name} is {kind_name(value)}, not text")
    if not value.strip() and not may_be_empty:
        raise UnusableError(f"{name} is empty")
    if len(value) > LONGEST_TEXT:
        raise UnusableError(f"{name} has {len(value):,} characters, {LONGEST_TEXT:,} at most")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UnusableError(f"{name} holds half of a surrogate pair, which is not a character") from None
    return value


def kind_name(value: Any) -> str:
    """What kind of value it is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
