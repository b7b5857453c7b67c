"""What stands in an adapter_config.json, held against what PEFT makes of each key: a wrong type is named by its key."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from phi3_dist.errors import kind, shown

__all__ = ["wrong_values"]


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not _flag(value) and math.isfinite(value)


def _rank(value: Any) -> bool:
    return isinstance(value, int) and not _flag(value) and value > 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _by_name(allowed: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(allowed, value.values()))


_ANY_KIND: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "base_model_name_or_path": (_text, "text"),
    "revision": (_text, "text"),
}
_LORA: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_rank, "a whole number from 1"),
    "lora_alpha": (_number, "a number"),
    "lora_dropout": (_number, "a number"),
    "bias": (_text, "text"),
    "target_modules": (lambda value: _text(value) or _texts(value), "text or a list of text"),
    "exclude_modules": (lambda value: _text(value) or _texts(value), "text or a list of text"),
    "modules_to_save": (_texts, "a list of text"),
    "rank_pattern": (_by_name(_rank), "whole numbers from 1 by name"),
    "alpha_pattern": (_by_name(_number), "numbers by name"),
    "use_dora": (_flag, "true or false"),
    "use_rslora": (_flag, "true or false"),
    "fan_in_fan_out": (_flag, "true or false"),
}


def wrong_values(config: Mapping[str, Any]) -> list[str]:
    """One sentence for each key with a value that PEFT can't use; a key that is absent or null has its default."""
    rules = {**_ANY_KIND, **(_LORA if config.get("peft_type") == "LORA" else {})}
    wrong = [(key, config[key], rule[1]) for key, rule in rules.items()
             if config.get(key) is not None and not rule[0](config[key])]  # fmt: skip
    return [f"{key} is {shown(value)} ({kind(value)}), where PEFT has {wanted}" for key, value, wanted in wrong]
