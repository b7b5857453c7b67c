"""What a mistake in a run file is called: pydantic's errors in the user's words, and the pairs that cannot be.

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
from phi3_dist.config.unsafe_texts import Cross, is_folder
from phi3_dist.family.variants import LINEARS

__all__ = ["EXPLAINED_AT_MOST", "Cross", "cross_checks", "explain", "kind", "shown"]

EXPLAINED_AT_MOST = 200
"""Errors that are put into words: each unknown key is compared with every known one."""

_TOPOLOGY = "topology stands in the Accelerate config (configs/accelerate/), not in the run file"
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
    "<<": "merge keys are not read; write the keys out",
}
_FORMS: Mapping[str, str] = {
    LORA_INITS: "default, pissa, pissa_niter_16, loftq or eva",
}
"""What a regular expression of the schema means, in words."""
_IN_UNIONS: Mapping[str, type[BaseModel]] = {"DataSource": DataSource}
_FP16 = ("fp16", "float16", "half", "16", "16-mixed")


def kind(value: object) -> str:
    """What a YAML value is, in words."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true or false"
    names = ((dict, "a section"), (list, "a list"), (str, "text"), (int, "a whole number"), (float, "a number"))
    return next((name for type_, name in names if isinstance(value, type_)), f"a {type(value).__name__}")


def shown(value: object) -> str:
    """A value for a message: as YAML would show it, cut after 60 characters."""
    text = (
        {None: "null", True: "true", False: "false"}.get(value)
        if value is None or value is True or value is False
        else None
    )
    text = text or (repr(value) if isinstance(value, str | int | float | list | dict) else f"'{value}'")
    return text if len(text) <= 60 else f"{text[:57]}..."


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
    return f"the keys of {prefix.rstrip('.') or 'a run file'} are {', '.join(siblings)}"


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _path_of(loc: tuple[int | str, ...]) -> tuple[str, type[BaseModel]]:
    """The dotted path of a pydantic location without its union tags, and the section that its last key stands in."""
    inside: type[BaseModel] | None = RunConfig
    section: type[BaseModel] = RunConfig
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part == "str" or part.startswith(("tuple[", "literal[")):
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
        "literal_error": f"one of {context.get('expected')}",
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


def explain(error: ValidationError, values: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(dotted path, what is wrong, fix) for each bad place: one for each field, however many its types are."""
    unknown: list[tuple[str, str, str]] = []
    grouped: dict[str, list[ErrorDetails]] = {}
    for item in error.errors(include_url=False)[:EXPLAINED_AT_MOST]:
        path, section = _path_of(item["loc"])
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
        found.append((path, f"is {shown(value)}; {wanted} is wanted", fix))
    return _in_file_order(unknown + found, values)


def _about(path: str, section: type[BaseModel]) -> str:
    last = path.rpartition(".")[2]
    return section.model_fields[last].description or f"add the section `{last}:`"


def _in_file_order(found: list[tuple[str, str, str]], values: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    order = {key: place for place, key in enumerate(values)}
    return sorted(found, key=lambda item: order.get(item[0].split(".")[0], -1))


def cross_checks(cfg: RunConfig) -> list[Cross]:
    """Every impossible combination in a config whose fields are each valid.

    DoRA goes with quantised weights (PEFT 0.21 adapts `Linear4bit` and `Linear8bitLt` with it), so it is not here.
    """
    return [*_model_pairs(cfg), *_token_faults(cfg), *_lora_pairs(cfg), *_train_pairs(cfg), *_save_pairs(cfg)]


def _model_pairs(cfg: RunConfig) -> Iterator[Cross]:
    source, revision = cfg.model.source, cfg.model.revision
    if not source.strip():
        yield Cross(("model.source",), "is empty", "name a local folder, a hub id, or tiny-random")
    if revision is not None and source == "tiny-random":
        yield Cross(("model.revision", "model.source"), f"is {revision!r}, but tiny-random has none", "remove it")
    elif revision is not None and (source.startswith((".", "/", "~")) or is_folder(source)):
        what = f"is {revision!r}, but model.source is the local folder {source}"
        yield Cross(("model.revision", "model.source"), what, "remove it, or name a hub id as model.source")
    kept = cfg.model.dequantized_layers
    if kept != "auto" and kept > 0 and cfg.model.quantization != "nf4":
        what = f"is {kept}, and model.quantization is {cfg.model.quantization}: no weight is in NF4"
        yield Cross(("model.dequantized_layers", "model.quantization"), what, "leave it out")
    if cfg.model.compile is True and not cfg.model.fused_layers:
        what = "is true, and what is compiled are the passes of the fused layers, which model.fused_layers leaves out"
        yield Cross(("model.compile", "model.fused_layers"), what, "leave out one of them")


def _lora_pairs(cfg: RunConfig) -> Iterator[Cross]:
    targets = cfg.lora.targets
    yield from _pattern_faults(cfg)
    yield from _lora_init_pairs(cfg)
    if targets == ():
        yield Cross(("lora.targets",), "is an empty list: nothing would be adapted", "use all-linear")
    elif isinstance(targets, tuple) and "all-linear" in targets:
        fix = f"write `targets: all-linear`, or a list out of {', '.join(LINEARS)}"
        yield Cross(("lora.targets",), "all-linear stands in a list", fix)


def _pattern_faults(cfg: RunConfig) -> Iterator[Cross]:
    for name, pattern in (("rank_pattern", cfg.lora.rank_pattern), ("alpha_pattern", cfg.lora.alpha_pattern)):
        for key in pattern:
            try:
                re.compile(key)
            except (re.error, OverflowError, RecursionError) as error:
                what = f"{key!r} is no regular expression: {error}"
                yield Cross((f"lora.{name}",), what, "write the end of a module's name, such as down_proj")
    layers = cfg.lora.layers
    if layers == ():
        yield Cross(("lora.layers",), "is an empty list: nothing would be adapted", "leave it out for every layer")
    elif layers is not None and len(set(layers)) < len(layers):
        yield Cross(("lora.layers",), "names a layer twice", f"use {sorted(set(layers))}")


def _lora_init_pairs(cfg: RunConfig) -> Iterator[Cross]:
    lora = cfg.lora
    if lora.freeze_a and lora.plus_ratio != 1:
        what = f"is {lora.plus_ratio:g}, and lora.freeze_a leaves no A that could learn more slowly than B"
        yield Cross(("lora.plus_ratio", "lora.freeze_a"), what, "keep one of them, and raise optim.lr for B")
    if lora.init == "default":
        return
    if cfg.model.adapter is not None:
        what = f"is {lora.init}, and model.adapter brings the start itself"
        yield Cross(("lora.init", "model.adapter"), what, "leave it out when training on from an adapter")
    if lora.dora and lora.init != "eva":
        what = f"is {lora.init}, and DoRA's magnitudes start from the plain weight, which that start takes apart"
        yield Cross(("lora.init", "lora.dora"), what, "leave out one of them")
    other = [t for t in lora.targets if t.rsplit(".", 1)[-1] not in LINEARS] if lora.targets != "all-linear" else []
    if other and lora.init != "eva":
        what = f"is {lora.init}, which starts decoder linears only, and lora.targets has {other[0]}"
        yield Cross(("lora.init", "lora.targets"), what, f"keep to {', '.join(LINEARS)}")


def _token_faults(cfg: RunConfig) -> Iterator[Cross]:
    tokens, place = cfg.model.new_tokens, ("model.new_tokens",)
    if len(set(tokens)) < len(tokens):
        yield Cross(place, "names a token twice", "keep one of them")
    for token in tokens:
        if not token or token != token.strip():
            what = f"has {token!r}, " + ("which begins or ends with white space" if token.strip() else "which is empty")
            yield Cross(place, what, "write the token alone, such as <|tool|>")
    named = {name.rsplit(".", 1)[-1] for name in cfg.lora.modules_to_save}
    if cfg.lora.targets != "all-linear":
        named |= {name.rsplit(".", 1)[-1] for name in cfg.lora.targets}
    both = sorted(named & {"embed_tokens", "lm_head"})
    if tokens and both:
        what = f"trains single rows of embed_tokens and lm_head, and lora adapts {' and '.join(both)} as a whole"
        yield Cross((*place, "lora.modules_to_save", "lora.targets"), what, f"take {both[0]} out of the lora section")


def _train_pairs(cfg: RunConfig) -> Iterator[Cross]:
    train, warmup = cfg.train, cfg.optim.warmup
    if train.epochs is not None and train.max_steps is not None:
        what = f"is {train.epochs:g}, and train.max_steps is {train.max_steps}: both say when to stop"
        yield Cross(("train.epochs", "train.max_steps"), what, "keep one of them")
    if train.global_batch % train.micro_batch:
        below = train.global_batch // train.micro_batch * train.micro_batch
        near = f"{below} or {below + train.micro_batch}" if below else str(train.micro_batch)
        what = f"is {train.global_batch}, which is no multiple of train.micro_batch ({train.micro_batch})"
        yield Cross(("train.global_batch", "train.micro_batch"), what, f"use {near}")
    if warmup >= 1 and warmup != int(warmup):
        yield Cross(("optim.warmup",), f"is {warmup}: from 1 on it counts whole steps", f"use {round(warmup)}")
    if train.max_steps is not None and warmup >= 1 and warmup >= train.max_steps:
        what = f"is {warmup:g} steps, and train.max_steps is {train.max_steps}: the peak is never held"
        yield Cross(("optim.warmup", "train.max_steps"), what, "use a share below 1, such as 0.03")
    if train.eval_every > 0 and cfg.data.validation is None and cfg.data.validation_share == 0:
        what = f"is {train.eval_every}, but data.validation_share is 0 and there is no data.validation to measure on"
        fix = "set train.eval_every to 0, or give held-out rows"
        yield Cross(("train.eval_every", "data.validation_share", "data.validation"), what, fix)
    yield from _needs_held_out(cfg)


def _needs_held_out(cfg: RunConfig) -> Iterator[Cross]:
    nothing = cfg.data.validation is None and cfg.data.validation_share == 0
    best = cfg.save.final == "best"
    for key, asked in (("train.patience", cfg.train.patience), ("save.final", best and "best")):
        if asked and not cfg.train.eval_every:
            what = f"is {asked}, and train.eval_every is 0: the held-out loss is measured at the end alone"
            yield Cross((key, "train.eval_every"), what, "set train.eval_every to a number of steps")
    if cfg.train.min_improvement and not cfg.train.patience:
        what = f"is {cfg.train.min_improvement:g}, and train.patience is 0: no run ends early"
        yield Cross(("train.min_improvement", "train.patience"), what, "set train.patience, or leave it out")
    if best and not cfg.save.every:
        what = "is best, and save.every is 0: there are no checkpoints to take it from"
        yield Cross(("save.final", "save.every"), what, "set save.every to a number of steps")
    if cfg.eval.generate and nothing:
        what = f"is {cfg.eval.generate}, and no rows are held out that could be asked"
        yield Cross(("eval.generate", "data.validation_share", "data.validation"), what, "give held-out rows")


def _save_pairs(cfg: RunConfig) -> Iterator[Cross]:
    if not cfg.save.folder.strip():
        yield Cross(("save.folder",), "is empty", "name a folder, such as runs/{name}")
    other = [name for name in re.findall(r"\{([^}]*)\}", cfg.save.folder) if name != "name"]
    if other:
        yield Cross(("save.folder",), f"has the placeholder {{{other[0]}}}", "only {name} is filled in")
    if "/" in cfg.name or cfg.name in (".", ".."):
        yield Cross(("name",), f"is {cfg.name!r}, which cannot name a folder", "leave out the slash")
