"""From another toolkit's file to a run file: each key taken, changed with the reason, or not supported.

The result is always a run file that `load_run` accepts. What it needs and the source does not say stands in it as
`FILL_IN_…`, which names no file and no model, so that a run stops there with a message that shows it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from rich.table import Table
from rich.text import Text

from phi3_dist.config.cross_checks import cross_checks
from phi3_dist.config.mistakes import explain
from phi3_dist.config.schema import RunConfig
from phi3_dist.config.starter import FILL_IN_ROWS
from phi3_dist.config.unsafe_texts import text_faults
from phi3_dist.recipes import dialects
from phi3_dist.recipes.draft import Draft, Finding
from phi3_dist.recipes.entries import Computed, Entry, Foreign
from phi3_dist.recipes.rules import ALIASES, FULL, RULES, UNSUPPORTED, unsupported_by_prefix
from phi3_dist.recipes.rules_data_sets import account_for_data_sets
from phi3_dist.recipes.rules_extras import UNSLOTH_DEFAULTS
from phi3_dist.recipes.rules_joint import JOINT_KEYS, apply_joint_rules

__all__ = ["FILL_IN_MODEL", "Imported", "findings_table", "import_run"]

FILL_IN_MODEL = "FILL_IN_base_model"
_REQUIRED: Mapping[str, Any] = {"model.source": FILL_IN_MODEL, "data.train": FILL_IN_ROWS}

_HF_DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "seed": 42,
}
"""`TrainingArguments`' own, where they differ from this toolkit's (transformers 5.24)."""
_PEFT_DEFAULTS: Mapping[str, Any] = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
"""`LoraConfig`'s own (peft 0.21)."""
_BY_HF = (dialects.SCRIPT, dialects.NOTEBOOK, dialects.PAIR, dialects.TRAINING_ARGUMENTS, dialects.LLAMA_FACTORY)
_NOTHING: tuple[Any, ...] = (None, "", [], {}, 0, False)


@dataclass(frozen=True)
class Imported:
    """The run file's text, and what became of each key, in the source's order."""

    run_yaml: str
    findings: list[Finding]
    dialect: str
    """The source's dialect, in words; one of `dialects.DIALECTS`."""


def import_run(path: str | Path, *, devices: int = 1) -> Imported:
    """Read a script, notebook, JSON or YAML of another toolkit, by parsing alone, and write it as a run file.

    `devices` is how many of them the source ran on: its batch is counted per device. Raises `ConfigError` where the
    file is missing, damaged or of no known dialect, and `ValueError` for `devices` below 1.
    """
    if devices < 1:
        raise ValueError(f"devices is {devices}; expected 1 or more")
    foreign = dialects.read_foreign(path)
    entries = [*foreign.entries, *_defaults(foreign)]
    draft = Draft(foreign, devices)
    # flags of mixed precision go before dtypes, which follow them where both are given
    for entry in sorted(entries, key=lambda entry: _canonical(entry) not in ("bf16", "fp16")):
        _translate(draft, entry)
    literal = [
        entry for entry in entries if not isinstance(entry.value, Computed) and entry.value not in (None, "auto")
    ]
    apply_joint_rules(draft, {_canonical(entry): entry for entry in reversed(literal)})
    for entry in literal:
        account_for_data_sets(draft, entry)
    reported = {(finding.key, finding.place) for finding in draft.findings}
    for entry in entries:
        if (entry.key, entry.place) not in reported:
            draft.refuse(entry, "another key decides it")
    _full_fine_tuning(draft)
    draft.values = {**_REQUIRED, **draft.values}
    _until_valid(draft)
    order = {(entry.key, entry.place): number for number, entry in reversed(list(enumerate(entries)))}

    def place_of(finding: Finding) -> int:
        """A key inside another stands with it."""
        key = finding.key if (finding.key, finding.place) in order else re.split(r"[.\[]", finding.key)[0]
        return order.get((key, finding.place), len(order))

    findings = sorted(draft.findings, key=place_of)
    findings += [Finding("", "not supported", "", part.why, "", part.place) for part in foreign.unread]
    return Imported(_render(draft, findings), findings, foreign.dialect)


def _canonical(entry: Entry) -> str:
    if entry.section == "data" and entry.key == "revision":
        return "data_revision"
    return ALIASES.get(entry.key, entry.key)


def _defaults(foreign: Foreign) -> Iterator[Entry]:
    """What the source's toolkit fills in where the source is silent and this toolkit would fill in something else."""
    present = {_canonical(entry) for entry in foreign.entries}
    if foreign.dialect in _BY_HF and present & {"learning_rate", "per_device_train_batch_size", "num_train_epochs"}:
        silent = {"warmup_steps"} if "warmup_ratio" in present else set()
        for key, value in _HF_DEFAULTS.items():
            if key not in present | silent:
                yield Entry(key, value, "TrainingArguments' default", "training")
    has_lora = any(entry.section == "lora" for entry in foreign.entries)
    if foreign.is_unsloths:
        quantised = {} if present & {"load_in_8bit", "full_finetuning"} else {"load_in_4bit": True}
        for key, value in {**UNSLOTH_DEFAULTS, **quantised}.items():
            if key not in present:
                yield Entry(key, value, "Unsloth's default", "model" if key in quantised else "lora")
    elif has_lora or (foreign.dialect == dialects.LLAMA_FACTORY and foreign.first("finetuning_type") in (None, "lora")):
        rank = foreign.first("lora_rank") or 8
        alpha = {"lora_alpha": 2 * rank} if foreign.dialect == dialects.LLAMA_FACTORY and isinstance(rank, int) else {}
        owner = "LLaMA-Factory" if alpha else "LoraConfig"
        for key, value in {**_PEFT_DEFAULTS, **alpha}.items():
            if key not in present:
                yield Entry(key, value, f"{owner}'s default", "lora")


def _translate(draft: Draft, entry: Entry) -> None:
    """One key by its rule. Keys that are settled together only have their unusable values explained here."""
    name = _canonical(entry)
    if isinstance(entry.value, Computed):
        if name in ("bf16", "fp16"):
            reason = "depends on the hardware when the source runs; auto decides the same way here, without fp16"
            draft.change(entry, "model.precision", "auto", reason)
        elif name in RULES or name in JOINT_KEYS:
            draft.refuse(entry, "is computed when the source runs, and nothing is run to import it: set it by hand")
        else:
            draft.refuse(entry, UNSUPPORTED.get(name) or unsupported_by_prefix(name) or "has no counterpart here")
    elif entry.value == "auto" and (name in JOINT_KEYS or entry.section == "deepspeed"):
        draft.note(entry, "taken", "is filled in when it is launched")
    elif name in JOINT_KEYS and entry.value is not None:
        return
    elif name == "data_revision" and isinstance(entry.value, str):
        draft.take(entry, "data.revision", entry.value)
    elif name.startswith("zero_optimization."):
        _zero(draft, entry)
    elif name in RULES and entry.value not in (None, "", [], {}):
        RULES[name](draft, entry)
    elif name in UNSUPPORTED and entry.value not in _NOTHING:
        draft.refuse(entry, UNSUPPORTED[name])
    elif entry.value in _NOTHING:
        draft.note(entry, "taken", "changes nothing")
    else:
        draft.refuse(entry, unsupported_by_prefix(name) or "has no counterpart here")


def _zero(draft: Draft, entry: Entry) -> None:
    """ZeRO is the launch's business; the stage names the file to launch with."""
    if entry.key != "zero_optimization.stage":
        draft.refuse(entry, "ZeRO's settings are in configs/deepspeed/")
        return
    devices = [draft.foreign.first(f"zero_optimization.offload_{part}.device") for part in ("optimizer", "param")]
    stage = entry.value
    offload = "_offload" if stage in (2, 3) and any(device in ("cpu", "nvme") for device in devices) else ""
    config = f"configs/accelerate/zero{stage}{offload}.yaml" if stage in (1, 2, 3) else "configs/accelerate/ddp.yaml"
    draft.note(entry, "changed", f"launch with accelerate launch --config_file {config}")


def _full_fine_tuning(draft: Draft) -> None:
    """Say it where the source trains, and trains no adapter."""
    foreign = draft.foreign
    trains = "optim.lr" in draft.values
    has_lora = any(path.startswith("lora.") for path in draft.values)
    already_said = any(finding.reason == FULL for finding in draft.findings)
    if foreign.dialect == dialects.TRAINING_ARGUMENTS and trains:
        reason = "TrainingArguments do not say whether LoRA is used: this toolkit's defaults are used under lora"
    elif foreign.dialect in (dialects.DEEPSPEED, dialects.PEFT) or has_lora or not trains or already_said:
        reason = FULL if already_said else ""
    else:
        reason = FULL
    if reason:
        for path, value in (("lora.r", 16), ("lora.alpha", 32), ("lora.targets", "all-linear")):
            draft.values.setdefault(path, value)
        draft.comments.setdefault("lora.r", []).append(reason)
        if not already_said:
            draft.findings.append(Finding("(no adapter)", "changed", None, reason, "lora"))


def _until_valid(draft: Draft) -> None:
    """Leave out what the schema does not accept, with its words for why, until the rest is a run file."""
    for _ in range(len(draft.values) + 1):
        nested = _nested(draft.values)
        try:
            run = RunConfig.model_validate(nested)
            bad = [(fault.paths, fault.what) for fault in (*text_faults(run), *cross_checks(run))]
        except ValidationError as error:
            bad = [((path,), what) for path, what, _ in explain(error, nested)]
        if not bad:
            return
        paths, what = bad[0]
        inside = [(known, f"{path}.") for path in paths for known in draft.values]
        path = next(known for known, path in inside if path.startswith((f"{known}.", f"{known}[")))
        draft.values.pop(path)
        if path in _REQUIRED:
            draft.values[path] = _REQUIRED[path]
        reason = f"{path} {what}; {'it has to be filled in' if path in _REQUIRED else 'the default is used instead'}"
        draft.comments.setdefault(path, []).append(reason)
        draft.findings = [
            replace(f, verdict="not supported", reason=reason, target="") if f.target == path else f
            for f in draft.findings
        ]
    raise AssertionError("a run file of defaults is valid")


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path, value in values.items():
        *parents, last = path.split(".")
        section = out
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return out


def _render(draft: Draft, findings: list[Finding]) -> str:
    """The run file: sections in the schema's order, each change above its key, and at the end what was left out."""
    name, dialect = draft.foreign.name, draft.foreign.dialect
    lines = [*_comment(f"Written by `phi3-dist import` from {name} ({dialect})."), ""]
    if FILL_IN_MODEL in draft.values.values() or FILL_IN_ROWS in draft.values.values():
        lines[1:1] = _comment("Replace FILL_IN_…: the source does not say it.")
    for section, info in RunConfig.model_fields.items():
        inner = getattr(info.annotation, "model_fields", None)
        if inner is None:
            lines += _field(draft, section, section)
            continue
        body = [line for key in inner for line in _field(draft, f"{section}.{key}", key)]
        if any(not line.lstrip().startswith("#") for line in body):
            lines += [f"{section}:", *(f"  {line}" for line in body)]
        else:
            lines += body
    left_out = [finding for finding in findings if finding.verdict == "not supported"]
    if left_out:
        lines += ["", *_comment("Not carried over:")]
        for finding in left_out:
            what = f"{finding.key} = {finding.value}" if finding.key else finding.place
            lines += _comment(f"- {_short(what)}: {finding.reason}")
    return "\n".join(lines) + "\n"


def _field(draft: Draft, path: str, key: str) -> list[str]:
    inside = [other for other in draft.values if other.startswith(f"{path}.")]
    comments = [comment for other in (path, *inside) for comment in draft.comments.get(other, ())]
    lines = [line for comment in comments for line in _comment(comment)]
    if path in draft.values or inside:
        nested = {other.removeprefix(f"{path}."): draft.values[other] for other in inside}
        value = draft.values.get(path, nested)
        dumped = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=10_000)
        lines += dumped.splitlines()
    return lines


def _comment(text: str) -> list[str]:
    printable = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
    return [f"# {line}" for line in textwrap.wrap(printable, width=110, break_long_words=False)]


def _short(value: Any, width: int = 60) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= width else f"{text[: width - 1]}…"


def findings_table(imported: Imported) -> Table:
    """A table for a terminal: what became of each key; and the key, its value, its place in the run file, and why."""
    colours = {"taken": "green", "changed": "yellow", "not supported": "red"}
    table = Table(title=imported.dialect, title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in imported.findings:
        target = f" → {finding.target}" if finding.target else ""
        reason = f": {finding.reason}" if finding.reason else ""
        text = Text(f"{finding.key or finding.place} = {_short(finding.value, 40)}{target}{reason}")
        table.add_row(Text(finding.verdict, style=colours[finding.verdict]), text)
    return table
