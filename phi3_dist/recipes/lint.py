"""The known faults of scripts and configs that fine-tune Phi-3, found by reading them: `phi3-dist lint`.

Each was published or reported; none stops with an error where it is made, except renamed arguments. A finding is
about the source as it runs under its own toolkit, not about what `import_run` makes of it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table
from rich.text import Text

from phi3_dist.family.variants import FUSED_TARGETS
from phi3_dist.recipes import dialects
from phi3_dist.recipes.draft import as_flag
from phi3_dist.recipes.entries import Entry, Foreign
from phi3_dist.recipes.rules import ALIASES, fused_targets

__all__ = ["Fault", "faults", "faults_table"]

Node = TypeVar("Node", bound=ast.AST)


@dataclass(frozen=True)
class Fault:
    """A known fault: `script.py:12`, what goes wrong, and what to write instead."""

    place: str
    what: str
    fix: str


def faults(path: str | Path) -> list[Fault]:
    """Every known fault of a foreign file, in the order of its lines. Raises `ConfigError` as `read_foreign` does."""
    foreign = dialects.read_foreign(path)
    found = [fault for check in _CHECKS for fault in check(foreign)]
    return sorted(dict.fromkeys(found), key=_line)


def _line(fault: Fault) -> tuple[int, int]:
    cell = re.search(r" cell (\d+)", fault.place)
    line = re.search(r":(\d+)$", fault.place)
    return int(cell.group(1)) if cell else 0, int(line.group(1)) if line else 0


def _named(foreign: Foreign, *names: str) -> Iterator[Entry]:
    return (entry for entry in foreign.entries if ALIASES.get(entry.key, entry.key) in names)


def _on(foreign: Foreign, *names: str) -> Entry | None:
    """The first of these keys that is switched on."""
    return next((entry for entry in _named(foreign, *names) if as_flag(entry.value)), None)


# --- values -------------------------------------------------------------------------------------------------------


def _llama_targets(foreign: Foreign) -> Iterator[Fault]:
    for entry in _named(foreign, "target_modules"):
        names = entry.value.split(",") if isinstance(entry.value, str) else entry.value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            continue
        names = [name.strip() for name in names]
        llama = [name for name in names if name.rsplit(".", 1)[-1] in FUSED_TARGETS]
        if llama:
            kept = [name for name in names if name not in llama]
            rest = f"only {', '.join(kept)} would train, without a warning" if kept else "PEFT finds nothing to adapt"
            fused = ", ".join(fused_targets(names)[0])
            yield Fault(
                entry.place, f"{', '.join(llama)} match no module of Phi-3: {rest}", f"name {fused}, or all-linear"
            )


def _remote_code(foreign: Foreign) -> Iterator[Fault]:
    for entry in _named(foreign, "trust_remote_code"):
        if as_flag(entry.value):
            what = "trust_remote_code=True runs code from the hub, which changes under you and lags behind transformers"
            yield Fault(entry.place, what, "leave it out: transformers has Phi-3 itself")


_DTYPE_KEYS = ("torch_dtype", "dtype", "bnb_4bit_compute_dtype")


def _fp16_twice(foreign: Foreign) -> Iterator[Fault]:
    autocast = _on(foreign, "fp16")
    weights = next((e for e in foreign.entries if e.key in ("torch_dtype", "dtype") and _is_fp16(e.value)), None)
    if autocast is not None and weights is not None:
        what = f"fp16 weights ({weights.place}) under fp16 autocast: the gradient scaler refuses fp16 gradients"
        yield Fault(autocast.place, what, "bf16=True with bfloat16 weights, or float32 weights under fp16")


def _other_sixteen_bits(foreign: Foreign) -> Iterator[Fault]:
    """Weights, or the arithmetic of 4-bit weights, in one 16-bit type under autocast of the other."""
    pairs = (
        ("bf16", _is_fp16, "what fp16 cannot hold (above 65,504) is lost, and bf16's few digits remain"),
        ("fp16", _is_bf16, "the gradient scaler of fp16 has no arithmetic for bf16 gradients"),
    )
    for name, is_other, why in pairs:
        autocast = _on(foreign, name)
        other = next((e for e in foreign.entries if e.key in _DTYPE_KEYS and is_other(e.value)), None)
        if autocast is not None and other is not None:
            what = f"{other.key} is {other.value} ({other.place}) under {name} autocast: {why}"
            yield Fault(autocast.place, what, f"{other.key}=torch.bfloat16" if name == "bf16" else "bf16=True")


def _is_fp16(value: Any) -> bool:
    return str(value).removeprefix("torch.") in ("float16", "fp16", "half")


def _is_bf16(value: Any) -> bool:
    return str(value).removeprefix("torch.") in ("bfloat16", "bf16")


def _naive_packing(foreign: Foreign) -> Iterator[Fault]:
    apart = {
        dialects.LLAMA_FACTORY: foreign.first("neat_packing"),
        dialects.AXOLOTL: foreign.first("flash_attention", "flash_attn") or _uses_flash(foreign),
    }.get(foreign.dialect, foreign.first("padding_free"))
    for entry in _named(foreign, "packing"):
        if as_flag(entry.value) and entry.key != "neat_packing" and not apart:
            what = "rows are packed without their boundaries: documents of a pack attend to each other"
            fix = {
                dialects.LLAMA_FACTORY: "neat_packing: true",
                dialects.AXOLOTL: "flash_attention: true",
            }.get(
                foreign.dialect, "padding_free=True with flash-attention and a TRL that resets positions, or no packing"
            )
            yield Fault(entry.place, what, fix)


def _uses_flash(foreign: Foreign) -> bool:
    return bool(foreign.first("attn_implementation") == "flash_attention_2")


def _evaluation_without_rows(foreign: Foreign) -> Iterator[Fault]:
    strategy = next(_named(foreign, "eval_strategy", "evaluation_strategy"), None)
    steps = next(_named(foreign, "eval_steps", "evals_per_epoch"), None)
    off = strategy is not None and str(strategy.value).lower() in ("no", "none", "false")
    by_default_off = strategy is None and foreign.dialect != dialects.AXOLOTL
    if steps is not None and steps.value and (off or by_default_off):
        what = f"{steps.key} is set and eval_strategy is not: nothing is ever evaluated"
        yield Fault(steps.place, what, "eval_strategy='steps' and an evaluation set, or leave it out")
    elif (strategy or steps) is not None and not off and _has_rows(foreign) is False:
        entry = strategy or steps
        assert entry is not None
        yield Fault(entry.place, f"{entry.key} is {entry.value!r} without an evaluation set", _EVALUATION_FIX)


_EVALUATION_FIX = "give the trainer an eval_dataset (or hold a share out), or eval_strategy='no'"


def _has_rows(foreign: Foreign) -> bool | None:
    """Whether the source names rows to evaluate on; None where it is not the place to say it."""
    keys = ("eval_dataset", "test_datasets", "validation_file", "dataset_test_split")
    if any(entry.value for entry in _named(foreign, "test_size", *keys)):
        return True
    if foreign.dialect in (dialects.SCRIPT, dialects.NOTEBOOK):
        calls = [node for _, node in _nodes(foreign, ast.Call) if _name_of(node.func).endswith("Trainer")]
        given = any(keyword.arg in ("eval_dataset", None) for node in calls for keyword in node.keywords)
        return given if calls else None
    if foreign.dialect == dialects.HANDBOOK:
        splits = foreign.first("dataset_splits") or []
        mixture = foreign.first("dataset_mixture")
        return len(splits) > 1 or bool(isinstance(mixture, dict) and mixture.get("test_split_size"))
    return False if foreign.dialect in (dialects.LLAMA_FACTORY, dialects.AXOLOTL) else None


_RENAMED: Mapping[str, str] = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps, which takes a share below 1",
    "no_cuda": "use_cpu",
    "group_by_length": "train_sampling_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "torch_dtype": "dtype",
    "use_flash_attention_2": "attn_implementation='flash_attention_2'",
    "max_seq_length": "max_length, in SFTConfig",
    **dict.fromkeys(("save_safetensors", "overwrite_output_dir", "logging_dir"), ""),
}
"""Gone from transformers 5 and today's TRL, and the name that took its place, if one did."""
_MOVED = ("packing", "dataset_text_field")


def _renamed(foreign: Foreign) -> Iterator[Fault]:
    if foreign.dialect in (dialects.AXOLOTL, dialects.LLAMA_FACTORY, dialects.DEEPSPEED, dialects.PEFT):
        return
    for entry in foreign.entries:
        if entry.key in _RENAMED:
            new = _RENAMED[entry.key]
            yield Fault(entry.place, f"{entry.key} is an older name", f"write {new}" if new else "leave it out")
        elif entry.section == "trainer" and entry.key in _MOVED:
            yield Fault(entry.place, f"{entry.key} is not an argument of SFTTrainer any more", "give it to SFTConfig")
        elif entry.section == "model" and entry.key in ("load_in_4bit", "load_in_8bit"):
            fix = f"quantization_config=BitsAndBytesConfig({entry.key}=True)"
            yield Fault(entry.place, f"{entry.key} is not an argument of from_pretrained any more", fix)


# --- code ---------------------------------------------------------------------------------------------------------


def _nodes(foreign: Foreign, kind: type[Node]) -> Iterator[tuple[str, Node]]:
    """(place, node) of every node of a kind in a script or a notebook's cells."""
    for prefix, tree in foreign.trees:
        for node in ast.walk(tree):
            if isinstance(node, kind):
                yield f"{prefix}:{getattr(node, 'lineno', 1)}", node


def _name_of(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


_DIGITS_WHAT = "end of sequence is written as the digits 32000, not as the token <|endoftext|>: the model never stops"
_DIGITS_FIX = "tokenizer.eos_token is the text, eos_token_id is a number; better, apply_chat_template"


def _digits_for_the_end(foreign: Foreign) -> Iterator[Fault]:
    """`"32000"` as text, or a name that holds `eos_token_id` inside an f-string or beside a `+ str(...)`."""
    ids = {
        _name_of(target)
        for _, node in _nodes(foreign, ast.Assign)
        if _name_of(node.value) == "eos_token_id"
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for place, constant in _nodes(foreign, ast.Constant):
        if isinstance(constant.value, str) and re.search(r"(?<!\d)32000\s*$", constant.value):
            yield Fault(place, _DIGITS_WHAT, _DIGITS_FIX)
    for place, formatted in _nodes(foreign, ast.FormattedValue):
        if _name_of(formatted.value) in {*ids, "eos_token_id"}:
            yield Fault(place, _DIGITS_WHAT, _DIGITS_FIX)
    for place, call in _nodes(foreign, ast.Call):
        if _name_of(call.func) == "str" and call.args and _name_of(call.args[0]) in {*ids, "eos_token_id"}:
            yield Fault(place, _DIGITS_WHAT, _DIGITS_FIX)
    for entry in foreign.entries:
        if not foreign.trees and "eos" in entry.key and entry.value in ("32000", 32000) and "id" not in entry.key:
            yield Fault(entry.place, _DIGITS_WHAT, _DIGITS_FIX)


# a role at the start of a line with nothing but a colon, a line end or blanks after it: "\nuser\n", "Assistant: "
_PLAIN_ROLE = re.compile(r"(?:^|\n)\s*(?:#{2,} *)?(?:user|assistant|human|gpt)\s*(?::|\n)", re.IGNORECASE)


def _plain_roles(foreign: Foreign) -> Iterator[Fault]:
    docstrings = {id(node.value) for _, node in _nodes(foreign, ast.Expr)}
    for place, node in _nodes(foreign, ast.Constant):
        if isinstance(node.value, str) and id(node) not in docstrings and _PLAIN_ROLE.search(node.value):
            role = " ".join(node.value.split())[:30]
            what = f"a role is written as plain text ({role!r}): Phi-3 knows <|user|>, <|assistant|> and <|end|>"
            yield Fault(place, what, "tokenizer.apply_chat_template(messages)")


def _pad_is_eos(foreign: Foreign) -> Iterator[Fault]:
    """Labels masked by the pad id where pad = eos. The published tokenizer has it so unless the script changes it."""
    set_to = {
        _name_of(node.value)
        for _, node in _nodes(foreign, ast.Assign)
        for target in node.targets
        if _name_of(target) in ("pad_token", "pad_token_id")
    }
    if set_to and not set_to & {"eos_token", "eos_token_id"}:
        return
    what = "labels are masked by the pad id, and pad is <|endoftext|>: the stop label is never learned"
    fix = "tokenizer.pad_token = tokenizer.unk_token, or mask by position"
    for place, call in _nodes(foreign, ast.Call):
        causal = any(k.arg == "mlm" and isinstance(k.value, ast.Constant) and not k.value.value for k in call.keywords)
        if _name_of(call.func) == "DataCollatorForLanguageModeling" and causal:
            yield Fault(place, what, fix)
    for place, compare in _nodes(foreign, ast.Compare):
        sides = [compare.left, *compare.comparators]
        if any(_name_of(side) == "pad_token_id" for side in sides) and "label" in ast.unparse(compare):
            yield Fault(place, what, fix)


_END = "<|endoftext|>"
_PAD_WHAT = "padding gets the end token: a collator that masks padding by its id masks the end of each answer too"
_PAD_FIX = "tokenizer.pad_token = tokenizer.unk_token, as the model card's script has it"


def _padding_is_the_end(foreign: Foreign) -> Iterator[Fault]:
    """The tokenizer's pad is set to its end. A model's `config.pad_token_id`, which only generation reads, may be."""
    for place, node in _nodes(foreign, ast.Assign):
        for target in node.targets:
            of_tokenizer = isinstance(target, ast.Attribute) and "config" not in ast.unparse(target.value)
            if of_tokenizer and _name_of(target) in ("pad_token", "pad_token_id") and _is_end(node.value):
                yield Fault(place, _PAD_WHAT, _PAD_FIX)
    for place, call in _nodes(foreign, ast.Call):
        given = [(keyword.arg, keyword.value) for keyword in call.keywords if "Tokenizer" in ast.unparse(call.func)]
        for literal in call.args if _name_of(call.func) == "add_special_tokens" else ():
            if isinstance(literal, ast.Dict):
                pairs = zip(literal.keys, literal.values, strict=True)
                given += [(str(key.value), value) for key, value in pairs if isinstance(key, ast.Constant)]
        if any(name == "pad_token" and _is_end(value) for name, value in given):
            yield Fault(place, _PAD_WHAT, _PAD_FIX)
    for entry in foreign.entries if not foreign.trees else ():
        value = (
            entry.value.get("pad_token") if entry.key == "special_tokens" and isinstance(entry.value, dict) else None
        )
        if value == _END or (entry.key == "pad_token" and entry.value == _END):
            yield Fault(entry.place, _PAD_WHAT, "pad_token: <unk>")


def _is_end(node: ast.expr) -> bool:
    return _name_of(node) in ("eos_token", "eos_token_id") or (isinstance(node, ast.Constant) and node.value == _END)


_CHECKS: tuple[Callable[[Foreign], Iterator[Fault]], ...] = (
    *(_llama_targets, _digits_for_the_end, _plain_roles, _fp16_twice, _naive_packing, _remote_code),
    *(_evaluation_without_rows, _pad_is_eos, _padding_is_the_end, _other_sixteen_bits, _renamed),
)


def faults_table(found: list[Fault]) -> Table:
    """A table for a terminal: place, what, fix."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("place", "what", "fix"):
        table.add_column(heading, overflow="fold")
    for fault in found:
        table.add_row(Text(fault.place), Text(fault.what), Text(fault.fix))
    return table
