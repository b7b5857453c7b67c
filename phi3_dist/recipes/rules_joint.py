"""Fields of a run file that follow from several foreign keys at once: batch, warm-up, evaluation, saving, data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from phi3_dist.recipes.draft import Draft, as_number
from phi3_dist.recipes.entries import Entry

__all__ = ["JOINT_KEYS", "apply_joint_rules"]

_PER_DEVICE = "per_device_train_batch_size"
_ACCUMULATION = "gradient_accumulation_steps"
_BUILDERS = ("json", "csv", "parquet", "text", "arrow")
_DATA_KEYS = (
    *("dataset_name", "dataset", "dataset_path", "data_path", "train_file", "data_files", "datasets"),
    *("dataset_mixer", "dataset_mixture"),
)
_SPLIT_KEYS = ("split", "dataset_split", "dataset_train_split", "dataset_test_split", "dataset_splits")
JOINT_KEYS = frozenset({
    *(_PER_DEVICE, _ACCUMULATION, "train_batch_size", "warmup_ratio", "warmup_steps", "max_steps"),
    *("eval_strategy", "evaluation_strategy", "eval_steps", "do_eval", "save_strategy", "save_steps"),
    *("logging_strategy", *_DATA_KEYS, *_SPLIT_KEYS),
})  # fmt: skip
"""Canonical names of the keys that are settled here."""


def apply_joint_rules(draft: Draft, entries: Mapping[str, Entry]) -> None:
    """Write what follows from `entries` (first one of each canonical name, literal values only) into the draft."""
    for part in (_batch, _warmup, _steps, _evaluation, _saving, _sources, _splits):
        part(draft, entries)


def _positive(draft: Draft, entry: Entry | None) -> int | None:
    """A count of one or more; anything else is refused, and None."""
    if entry is None:
        return None
    value = as_number(entry.value)
    if value is None or value < 1 or value != int(value):
        draft.refuse(entry, "expected a whole number of 1 or more")
        return None
    return int(value)


def _batch(draft: Draft, entries: Mapping[str, Entry]) -> None:
    per_device_entry, accumulation_entry = entries.get(_PER_DEVICE), entries.get(_ACCUMULATION)
    global_entry = entries.get("train_batch_size")
    per_device, accumulation = _positive(draft, per_device_entry), _positive(draft, accumulation_entry)
    total = _positive(draft, global_entry)
    if per_device is not None and per_device_entry is not None:
        draft.take(per_device_entry, "train.micro_batch", per_device)
    if total is not None and global_entry is not None:
        draft.take(global_entry, "train.global_batch", total)
        if accumulation is not None and accumulation_entry is not None:
            draft.note(accumulation_entry, "changed", "accumulation follows from train.global_batch and the processes")
        return
    if per_device is None and accumulation is None:
        return
    micro, steps = per_device or 1, accumulation or 1
    plural = "" if draft.devices == 1 else "s"
    sum_of = f"{micro} per device × {steps} accumulation × {draft.devices} device{plural}"
    reason = f"{sum_of} = {micro * steps * draft.devices}; accumulation follows from it"
    entry = accumulation_entry if accumulation is not None else per_device_entry
    assert entry is not None
    draft.change(entry, "train.global_batch", micro * steps * draft.devices, reason)


def _warmup(draft: Draft, entries: Mapping[str, Entry]) -> None:
    """As in transformers, steps above 0 win over the ratio; below 1 they are a share."""
    ratio, steps = entries.get("warmup_ratio"), entries.get("warmup_steps")
    count = as_number(steps.value) if steps is not None else None
    share = as_number(ratio.value) if ratio is not None else None
    if steps is not None and (count is None or count < 0):
        draft.refuse(steps, "optim.warmup takes a number of steps, or a share below 1")
    elif steps is not None and count is not None and (count > 0 or ratio is None):
        draft.take(steps, "optim.warmup", int(count) if count == int(count) else count)
        if ratio is not None:
            draft.note(ratio, "changed", f"{steps.key} wins over it, as in the source")
        return
    elif steps is not None:
        draft.note(steps, "taken", "changes nothing")
    if ratio is not None and (share is None or not 0 <= share < 1):
        draft.refuse(ratio, "optim.warmup takes a share below 1")
    elif ratio is not None and share is not None:
        draft.take(ratio, "optim.warmup", share, "below 1 it is a share of all steps")


def _steps(draft: Draft, entries: Mapping[str, Entry]) -> None:
    entry = entries.get("max_steps")
    if entry is None:
        return
    value = as_number(entry.value)
    if value is None or value < 1:
        draft.note(entry, "taken", "changes nothing")
        return
    draft.take(entry, "train.max_steps", int(value))
    if draft.values.pop("train.epochs", None) is not None:
        epochs = draft.set_by["train.epochs"]
        draft.findings = [f for f in draft.findings if f.target != "train.epochs"]
        draft.note(epochs, "changed", f"{entry.key} says when to stop, as in the source")


def _evaluation(draft: Draft, entries: Mapping[str, Entry]) -> None:
    every = entries.get("eval_steps")
    strategy = entries.get("eval_strategy") or entries.get("evaluation_strategy")
    if "do_eval" in entries:
        draft.note(entries["do_eval"], "taken", "held-out loss is measured at the end wherever rows are held out")
    kind = str(strategy.value).lower() if strategy is not None else ("steps" if every is not None else "no")
    if strategy is not None and kind in ("no", "none", "false"):
        draft.take(
            strategy, "train.eval_every", 0, "the end is measured all the same; data.validation_share=0 stops it"
        )
        if every is not None:
            draft.note(every, "changed", f"{strategy.key} is {strategy.value}: nothing is measured in between")
    elif strategy is not None and kind != "steps":
        draft.change(
            strategy, "train.eval_every", 0, "measuring goes by steps here, not by epochs: set train.eval_every"
        )
    else:
        source = every or (entries.get("logging_steps") if strategy is not None else None)
        count = _positive(draft, every) if every is not None else as_number(source.value) if source else None
        if every is not None and count is not None:
            draft.take(every, "train.eval_every", int(count))
        if strategy is not None and every is None and count is not None and count >= 1 and count == int(count):
            reason = f"without eval_steps it is every {int(count)} steps, as logging"
            draft.change(strategy, "train.eval_every", int(count), reason)
        elif strategy is not None:
            draft.note(strategy, "taken", "")


def _saving(draft: Draft, entries: Mapping[str, Entry]) -> None:
    strategy, every = entries.get("save_strategy"), entries.get("save_steps")
    kind = str(strategy.value).lower() if strategy is not None else "steps"
    if strategy is not None and kind == "no":
        draft.take(strategy, "save.every", 0)
    elif strategy is not None and kind != "steps":
        draft.change(
            strategy, "save.every", 100, f"{strategy.value} is not a unit here: checkpoints go by steps, and are small"
        )
    elif strategy is not None:
        draft.note(strategy, "taken", "")
    if every is not None and kind != "steps":
        draft.note(every, "changed", f"save_strategy is {kind}: the source does not use it either")
    elif every is not None and (count := _positive(draft, every)) is not None:
        draft.take(every, "save.every", count)
    logging = entries.get("logging_strategy")
    if logging is not None:
        same = str(logging.value).lower() == "steps"
        draft.note(logging, "taken" if same else "changed", "" if same else "logging goes by steps: log.every")


def _paths(value: Any) -> list[str]:
    """Names in a text, a list of texts, or the lists of data sets of axolotl (`path`) and TRL (`id`)."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        named = value.get("path") or value.get("id") or value.get("datasets") or value.get("train")
        return _paths(named)
    return [name for item in value for name in _paths(item)] if isinstance(value, list) else []


def _sources(draft: Draft, entries: Mapping[str, Entry]) -> None:
    for key in _DATA_KEYS:
        entry = entries.get(key)
        if entry is None:
            continue
        names = list(dict.fromkeys(_paths(entry.value)))
        weights = _weights(entry.value)
        if key == "dataset_mixer" and isinstance(entry.value, dict):
            names, weights = list(entry.value), {name: as_number(w) or 1.0 for name, w in entry.value.items()}
        if key == "dataset_name" and names and names[0] in _BUILDERS:
            draft.note(entry, "taken", "the reader; data_files names the rows")
        elif key == "dataset" and draft.foreign.first("cutoff_len", "finetuning_type") is not None:
            draft.refuse(entry, "names entries of dataset_info.json: name their files in data.train")
        elif not names:
            draft.refuse(entry, "data.train takes a file, a folder or a hub id")
        else:
            sources: list[Any] = [
                {"path": name, "weight": weights[name]} if weights.get(name, 1.0) != 1.0 else name for name in names
            ]
            whole = len(sources) == 1 and isinstance(sources[0], str)
            draft.take(entry, "data.train", sources[0] if whole else sources, _remark(entry.value))


def _weights(value: Any) -> dict[str, float]:
    """The weight of each data set in TRL's `dataset_mixture`."""
    inner = value.get("datasets") if isinstance(value, dict) else None
    items = [item for item in inner if isinstance(item, dict) and "id" in item] if isinstance(inner, list) else []
    return {str(item["id"]): as_number(item.get("weight")) or 1.0 for item in items}


_FORMATS = ("chat_template", "sharegpt", "alpaca")


def _remark(value: Any) -> str:
    """What axolotl's `type` of a data set comes to."""
    kinds = (
        {str(item.get("type", "")) for item in value if isinstance(item, dict)} if isinstance(value, list) else set()
    )
    strange = sorted(kind for kind in kinds - {""} if kind.split(".")[0].split(":")[0] not in _FORMATS)
    if strange:
        return f"rows of type {', '.join(strange)} are not read: bring them into `messages`"
    return "the format is detected from the rows" if kinds - {""} else ""


def _splits(draft: Draft, entries: Mapping[str, Entry]) -> None:
    actions: dict[str, Callable[[Entry], None]] = {
        "dataset_splits": lambda entry: _split_list(draft, entry),
        "dataset_test_split": lambda entry: _held_out_split(draft, entry, entry.value),
    }
    for key in _SPLIT_KEYS:
        entry = entries.get(key)
        if entry is None:
            continue
        if key in actions:
            actions[key](entry)
        elif isinstance(entry.value, str) and re.fullmatch(r"\w+", entry.value):
            draft.take(entry, "data.split", entry.value)
        else:
            draft.refuse(entry, "a slice of a split cannot be named: data.max_rows takes the first n rows")


def _split_list(draft: Draft, entry: Entry) -> None:
    names = [name for name in entry.value if isinstance(name, str)] if isinstance(entry.value, list) else []
    train = next((name for name in names if "train" in name), None)
    held_out = next((name for name in names if name != train), None)
    if train is None:
        draft.refuse(entry, "no split for training is named")
        return
    draft.take(entry, "data.split", train)
    if held_out is not None:
        _held_out_split(draft, entry, held_out)


def _held_out_split(draft: Draft, entry: Entry, name: Any) -> None:
    if "data.train" in draft.values and isinstance(name, str):
        train = draft.values["data.train"]
        draft.take(entry, "data.validation", train if isinstance(train, str) else _paths(train))
        draft.take(entry, "data.validation_split", name)
    else:
        draft.refuse(entry, "the data set that it is a split of is not known")
