"""What a mistake in a run file is called: pydantic's errors in the user's words.

Kept apart from `load.py` because this is the part that grows with each mistake that someone makes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from phi3_dist.config.schema import LORA_INITS, DataSource, RunConfig
from phi3_dist.errors import shown

__all__ = ["EXPLAINED_AT_MOST", "explain"]

EXPLAINED_AT_MOST = 200
"""Errors that are put into words: each unknown key is compared with every known one."""

_TOPOLOGY = "topology belongs in the Accelerate config (configs/accelerate/), not in the run file"
_ELSEWHERE: Mapping[str, str] = {
    # names of other toolkits → the name here, or what to do
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "lr_scheduler": "optim.schedule",
    "warmup_ratio": "optim.warmup",
    "warmup_steps": "optim.warmup",
    "max_length": "data.pack_length",
    "max_seq_length": "data.pack_length",
    "max_seq_len": "data.pack_length",
    "cutoff_len": "data.pack_length",
    "sequence_len": "data.pack_length",
    "lora_r": "lora.r",
    "rank": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "use_dora": "lora.dora",
    "use_rslora": "lora.rslora",
    "per_device_train_batch_size": "train.micro_batch",
    "micro_batch_size": "train.micro_batch",
    "batch_size": "train.global_batch",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "eval_steps": "train.eval_every",
    "logging_steps": "log.every",
    "report_to": "log.trackers",
    "output_dir": "save.folder",
    "model_name_or_path": "model.source",
    "base_model": "model.source",
    "gradient_checkpointing": "model.activation_checkpointing",
    "attn_implementation": "model.attention",
    "optimizer": "optim.name",
}
_ADVICE: Mapping[str, str] = {
    "gradient_accumulation_steps": "accumulation follows from train.global_batch, train.micro_batch and the ranks",
    "accumulation": "accumulation follows from train.global_batch, train.micro_batch and the ranks",
    "load_in_4bit": "write `model.quantization: nf4`",
    "load_in_8bit": "write `model.quantization: int8`",
    "bf16": "write `model.precision: bf16`",
    "fp16": "fp16 needs loss scaling, which this toolkit refuses; write `model.precision: bf16` or fp32",
    "packing": "rows are always packed; `data.pack_length` sets how long a pack is",
    "trust_remote_code": "remote code is never run; the native Phi-3 class is used",
    "deepspeed": _TOPOLOGY,
    "fsdp": _TOPOLOGY,
    "num_processes": _TOPOLOGY,
    "zero_stage": _TOPOLOGY,
    "sweep": "phi3-dist sweep trains a file with this section; also plan, prepare, slurm and config show read it",
    "<<": "merge keys are not read; write the keys out",
}
_FORMS: Mapping[str, str] = {
    LORA_INITS: "default, pissa, pissa_niter_16, loftq or eva",
}
"""What a regular expression of the schema means, in words."""
_PLAIN_IN_UNIONS = {"str", "int", "bool", "float", "constrained-int", "constrained-float"}
"""What pydantic calls the plain types of a union that it tried."""
_IN_UNIONS: Mapping[str, type[BaseModel]] = {"DataSource": DataSource}
_FP16 = ("fp16", "float16", "half", "16", "16-mixed")


def _all_paths(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _all_paths(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _unknown_key_fix(path: str, section: type[BaseModel]) -> str:
    above, _, key = path.rpartition(".")
    prefix = f"{above}." if above else ""
    siblings = section.model_fields
    if key in _ADVICE:
        return _ADVICE[key]
    close = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    if key in _ELSEWHERE:
        return f"did you mean {_ELSEWHERE[key]}?"
    by_last: dict[str, str] = {}
    for known in _all_paths():
        by_last.setdefault(known.rsplit(".", 1)[-1], known)
    elsewhere = difflib.get_close_matches(key, by_last, n=1, cutoff=0.75)
    if elsewhere:
        return f"did you mean {by_last[elsewhere[0]]}?"
    of = prefix.rstrip(".") or ("a run file" if section is RunConfig else "this section")
    return f"the keys of {of} are {', '.join(siblings)}"


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _path_of(loc: tuple[int | str, ...], root: type[BaseModel]) -> tuple[str, type[BaseModel]]:
    """The dotted path of a pydantic location without its union tags, and the section that its last key stands in."""
    inside: type[BaseModel] | None = root
    section: type[BaseModel] = root
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in _PLAIN_IN_UNIONS or part.startswith(("tuple[", "literal[")):
            continue  # which type of a union was tried
        elif part in _IN_UNIONS:
            inside = _IN_UNIONS[part]
        else:
            path += f".{part}" if path else part
            section = inside or section
            field = inside.model_fields.get(part) if inside else None
            inside = _inner_model(field.annotation) if field else None
    return path, section


def _wanted(error: ErrorDetails) -> str:
    """What the field takes instead of the value it got."""
    context = error.get("ctx", {})
    named = str(context.get("expected"))
    words = {
        "string_type": "text",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "bool_type": "true or false",
        "float_type": "a number",
        "float_parsing": "a number",
        "finite_number": "a finite number",
        "tuple_type": "a list",
        "model_type": "a section with keys under it",
        "literal_error": f"one of {named}" if " or " in named else named.strip("'"),
        "greater_than": f"above {context.get('gt')}",
        "greater_than_equal": f"{context.get('ge')} or more",
        "less_than": f"below {context.get('lt')}",
        "less_than_equal": f"{context.get('le')} or less",
        "string_pattern_mismatch": _FORMS.get(
            context.get("pattern", ""), f"a text of the form {context.get('pattern')}"
        ),
        "dict_type": "a section with keys under it",
        "too_long": f"a list of {context.get('max_length')}",
        "value_error": "a number",
    }
    return words.get(error["type"], error["msg"])


def _fix_for(error: ErrorDetails, path: str) -> str:
    value = error["input"]
    if path == "model.precision" and str(value).lower() in _FP16:
        return "fp16 needs loss scaling, which this toolkit refuses; use bf16 or fp32"
    if error["type"] == "string_type" and not isinstance(value, dict | list) and value is not None:
        return "put it in quotes if that text is meant"
    if error["type"] == "tuple_type" and isinstance(value, str | int | float) and not isinstance(value, bool):
        return f"write it as a list: [{value}]"
    if error["type"] in ("float_parsing", "int_type") and isinstance(value, str):
        return _number_meant(value)
    if error["type"] == "literal_error" and isinstance(value, str):
        allowed = re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", "")))
        close = difflib.get_close_matches(value.lower(), allowed, n=1)
        return f"did you mean {close[0]}?" if close else ""
    return ""


def _number_meant(text: str) -> str:
    """The number in a text that is nearly one: `5%`, `0,05`, `'16'`; or nothing."""
    plain = text.strip().replace("_", "")
    percent = re.fullmatch(r"(\d+(?:[.,]\d+)?) ?%", plain)
    if percent:
        return f"write the share: {float(percent[1].replace(',', '.')) / 100:g}"
    if re.fullmatch(r"[+-]?\d+,\d+", plain):
        return f"write it with a point: {plain.replace(',', '.')}"
    return f"write {plain}, without quotes" if re.fullmatch(r"[+-]?\d+", plain) else ""


def explain(
    error: ValidationError, values: Mapping[str, Any], root: type[BaseModel] = RunConfig
) -> list[tuple[str, str, str]]:
    """(dotted path below `root`, what is wrong, fix) for each bad place: one for each field, however many types."""
    unknown: list[tuple[str, str, str]] = []
    grouped: dict[str, list[ErrorDetails]] = {}
    for item in error.errors(include_url=False)[:EXPLAINED_AT_MOST]:
        path, section = _path_of(item["loc"], root)
        if item["type"] == "extra_forbidden":
            unknown.append((path, f"unknown key (value {shown(item['input'])})", _unknown_key_fix(path, section)))
        elif item["type"] == "missing" and path.endswith("]"):
            field = path.rpartition("[")[0]
            unknown.append((field, "has too few values", _about(field, section)))
        elif item["type"] == "missing":
            unknown.append((path, "is required, and missing", _about(path, section)))
        else:
            grouped.setdefault(path, []).append(item)
    found = []
    everywhere = [*grouped, *(path for path, _, _ in unknown)]
    for path, items in grouped.items():
        if any(other.startswith((f"{path}[", f"{path}.")) for other in everywhere):
            continue  # a union of text, list and section: what is wrong inside says it better
        wanted = " or ".join(dict.fromkeys(_wanted(item) for item in items))
        value = items[0]["input"]
        fix = next((text for text in (_fix_for(item, path) for item in items) if text), "")
        found.append((path, f"is {shown(value)}; expected {wanted}", fix))
    return _in_file_order(unknown + found, values)


def _about(path: str, section: type[BaseModel]) -> str:
    last = path.rpartition(".")[2]
    return section.model_fields[last].description or f"add the section `{last}:`"


def _in_file_order(found: list[tuple[str, str, str]], values: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    order = {key: place for place, key in enumerate(values)}
    return sorted(found, key=lambda item: order.get(item[0].split(".")[0], -1))
