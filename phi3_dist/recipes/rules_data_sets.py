"""Keys inside the lists of data sets of axolotl (`datasets`) and TRL (`dataset_mixture`): each is accounted for.

A run file has one set of columns for all its sources, so that two lists of different names can't both be taken.
Source: axolotl's `SFTDataset` and `UserDefinedPrompterType`, and TRL's `DatasetConfig`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from phi3_dist.recipes.draft import Draft
from phi3_dist.recipes.entries import Entry

__all__ = ["account_for_data_sets"]

Rule = Callable[[Draft, Entry], None]
_LISTS = ("datasets", "test_datasets", "dataset_mixture")


def account_for_data_sets(draft: Draft, entry: Entry) -> None:
    """A finding for each key inside a list of data sets; nothing for other entries."""
    name = entry.key.rpartition(".")[2]
    if name not in _LISTS:
        return
    inner = entry.value
    if isinstance(inner, dict) and "datasets" in inner:
        for key in inner:
            if key != "datasets":
                _take_or_report(draft, Entry(f"{entry.key}.{key}", inner[key], entry.place, entry.section), key)
        inner = inner["datasets"]
    for number, item in enumerate(inner if isinstance(inner, list) else [inner]):
        for key, value in item.items() if isinstance(item, dict) else ():
            held_out = name == "test_datasets"
            one = Entry(f"{entry.key}[{number}].{key}", value, entry.place, "held-out" if held_out else "data")
            _take_or_report(draft, one, str(key))


def _take_or_report(draft: Draft, entry: Entry, key: str) -> None:
    if entry.value is None:
        draft.note(entry, "taken", "changes nothing")
    elif entry.section == "held-out" and key not in _OF_HELD_OUT:
        draft.refuse(entry, "held-out rows are read as those of data.train are")
    elif key in _RULES:
        _RULES[key](draft, entry)
    else:
        draft.refuse(entry, _REASONS.get(key, "has no counterpart here"))


def _name(draft: Draft, entry: Entry) -> None:
    draft.note(entry, "taken", "", "data.validation" if entry.section == "held-out" else "data.train")


def _split(draft: Draft, entry: Entry) -> None:
    path = "data.validation_split" if entry.section == "held-out" else "data.split"
    if isinstance(entry.value, str) and re.fullmatch(r"\w+", entry.value):
        draft.take(entry, path, entry.value)
    else:
        draft.refuse(entry, "a slice of a split cannot be named: data.max_rows takes the first n rows")


def _column(key: str) -> Rule:
    def rule(draft: Draft, entry: Entry) -> None:
        if isinstance(entry.value, str):
            draft.take(entry, f"data.columns.{key}", entry.value) if entry.value != key else _found(draft, entry)
        else:
            draft.refuse(entry, f"data.columns.{key} takes text")

    return rule


def _found(draft: Draft, entry: Entry) -> None:
    draft.note(entry, "taken", "detected from the rows")


_FORMATS = ("alpaca", "sharegpt", "completion", "chat_template")
_FIELDS: Mapping[str, str] = {
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_system": "system",
}


def _type(draft: Draft, entry: Entry) -> None:
    """A name, or a prompter of the user's own with columns in it."""
    if isinstance(entry.value, dict):
        if not entry.value:
            draft.note(entry, "taken", "changes nothing")
        for key, value in entry.value.items():
            one = Entry(f"{entry.key}.{key}", value, entry.place, entry.section)
            if value is None:
                draft.note(one, "taken", "changes nothing")
            elif key in _FIELDS:
                _column(_FIELDS[key])(draft, one)
            else:
                draft.refuse(one, "rows are rendered by the tokenizer's template")
        return
    kind = re.split(r"[.:]", str(entry.value))[0]
    if kind in _FORMATS:
        _found(draft, entry)
    else:
        draft.refuse(entry, "such rows are not read: bring them into `messages`")


def _messages(draft: Draft, entry: Entry) -> None:
    """The list of a chat: `conversations` is known, other names are mapped."""
    if entry.value == "conversations":
        _found(draft, entry)
    else:
        _column("messages")(draft, entry)


def _properties(draft: Draft, entry: Entry) -> None:
    names = entry.value if isinstance(entry.value, dict) else {}
    for key, value in names.items():
        _property(str(key))(draft, Entry(f"{entry.key}.{key}", value, entry.place, entry.section))
    if not names:
        draft.refuse(entry, "expected names of keys")


def _property(key: str) -> Rule:
    """Where a message holds its role and its content: role and content, or ShareGPT's from and value."""

    def rule(draft: Draft, entry: Entry) -> None:
        if entry.value == key or (key, entry.value) in (("role", "from"), ("content", "value")):
            _found(draft, entry)
        else:
            draft.refuse(entry, f"a message holds its {key} under role, content, from and value only: rename it")

    return rule


def _learned_roles(draft: Draft, entry: Entry) -> None:
    roles = entry.value if isinstance(entry.value, list) else [entry.value]
    if roles and all(role in ("assistant", "gpt", "model") for role in roles):
        draft.take(entry, "data.supervise", "all")
    else:
        draft.refuse(entry, "only what the assistant says is learned")


def _end_of_turn(draft: Draft, entry: Entry) -> None:
    same = entry.value == "turn"
    draft.note(entry, "taken" if same else "changed", "the end of each learned turn is learned, and no other")


def _share(draft: Draft, entry: Entry) -> None:
    if isinstance(entry.value, float) and 0 <= entry.value < 1:
        draft.take(entry, "data.validation_share", entry.value)
    else:
        draft.refuse(entry, "held-out rows are a share below 1 here: set data.validation_share")


def _text(path: str) -> Rule:
    def rule(draft: Draft, entry: Entry) -> None:
        if isinstance(entry.value, str):
            draft.take(entry, path, entry.value)
        else:
            draft.refuse(entry, f"{path} takes text")

    return rule


_OF_HELD_OUT = ("path", "id", "split")
_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("path", "id"), _name),
    "weight": _name,
    "split": _split,
    "revision": _text("data.revision"),
    "type": _type,
    "ds_type": _found,
    "field": _column("text"),
    "field_messages": _messages,
    "message_property_mappings": _properties,
    "message_field_role": _property("role"),
    "message_field_content": _property("content"),
    **{key: _column(column) for key, column in _FIELDS.items()},
    "roles_to_train": _learned_roles,
    "train_on_eos": _end_of_turn,
    "test_split_size": _share,
}
_SHARDS = "data.max_rows takes the first n rows"
_REASONS: Mapping[str, str] = {
    **dict.fromkeys(("name", "config"), "a configuration of a hub set: download the set, and name its files"),
    **dict.fromkeys(("data_files", "data_dir"), "name the files themselves in data.train"),
    **dict.fromkeys(("message_field_training", "message_field_training_detail"),
                    "a message that is not to be learned says `weight: 0`"),
    **dict.fromkeys(("shards", "shards_idx", "preprocess_shards"), _SHARDS),
    "columns": "columns are named in data.columns",
    "roles": "roles are known by their usual names",
    "chat_template": "the template of the tokenizer folder is used",
    "chat_template_jinja": "the template of the tokenizer folder is used",
    "conversation": "the template of the tokenizer folder is used",
    "trust_remote_code": "remote code is never run",
    "streaming": "rows are prepared once, in bounded memory",
}  # fmt: skip
