"""The README.md of an adapter: what it is, what it was trained on, how to load it. No path of this machine in it.

adapter_config.json beside it names a local base by its path: see adapters/publishing.py for a folder to hand on.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from phi3_dist.version import __version__

__all__ = ["adapter_card", "with_hub_base"]

_LORA = {
    "r": "rank r",
    "alpha": "alpha",
    "lora_alpha": "alpha",
    "dropout": "dropout",
    "lora_dropout": "dropout",
    "bias": "bias",
    "targets": "targets",
    "target_modules": "targets",
    "modules_to_save": "trained in full",
    "rslora": "rank-stabilised",
    "use_rslora": "rank-stabilised",
    "dora": "DoRA",
    "use_dora": "DoRA",
    "rank_pattern": "other ranks",
    "alpha_pattern": "other alphas",
    "layers": "layers",
    "plus_ratio": "learning rate of B to that of A",
    "freeze_a": "A frozen",
    "init": "start",
}
_QUANTIZED = {
    "nf4": (
        'load_in_4bit=True,\n    bnb_4bit_quant_type="nf4",\n    bnb_4bit_use_double_quant=True,\n'
        '    bnb_4bit_compute_dtype="{dtype}",'
    ),
    "int8": "load_in_8bit=True,",
}
"""How the base was quantised (modeling/base.py), as arguments of transformers' BitsAndBytesConfig."""
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_DATA = {
    "data_fingerprint": "fingerprint (SHA-256 of the prepared data)",
    "rows": "rows",
    "supervised_tokens": "supervised tokens in one pass",
    "pack_length": "pack length (tokens)",
}
_RUN = {
    "steps": "optimizer steps",
    "global_batch": "packs in a step",
    "longrope": "LongRoPE factors: serve it with these, whatever the length",
    "base_rows": "rows that the base's tables must have",
    "quantization": "quantisation of the base",
    "precision": "precision",
    "strategy": "strategy",
    "world_size": "processes",
    "optim": "optimizer",
}
_RESULT = {
    "loss": "training loss, last step (nats a token)",
    "heldout_loss": "held-out loss (nats a token)",
    "heldout_perplexity": "held-out perplexity",
}
_OWN_PLACE = {"name", "base", "base_is_local", "revision", "license", "lora", "versions"}


def adapter_card(facts: Mapping[str, Any]) -> str:
    """The model card in Markdown, with YAML front matter as the Hugging Face hub reads it.

    facts, all of them optional: `name`, `base` (hub id or folder), `base_is_local`, `revision`, `license`, `lora` (the
    run file's section or PEFT's configuration), `versions` (package → version; by default those installed),
    `data_fingerprint`, `rows`, `supervised_tokens`, `pack_length`, `steps`, `global_batch`, `base_rows` (how many its
    tables must have, where the base has fewer), `longrope` (`short`, `long`), `quantization` (`nf4`, `int8`),
    `precision`, `strategy`, `world_size`, `optim`, `loss`, `heldout_loss`, `heldout_perplexity`. Any other fact is
    listed under its own name.
    A local base, and any other absolute path, is shown by the name of its folder alone.
    """
    base, local = _base(facts)
    front: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    if base and not local:
        front["base_model"] = base
    if facts.get("license"):
        front["license"] = str(facts["license"])
    front["tags"] = ["lora", "peft", "phi3", "base_model:adapter:" + base if base and not local else "adapter"]
    known = {**_DATA, **_RUN, **_RESULT}
    other = {k: k.replace("_", " ") for k in facts if k not in known and k not in _OWN_PLACE}
    lora, versions = facts.get("lora") or {}, facts.get("versions") or _installed()
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {facts.get('name') or 'LoRA adapter'}\n",
        _introduction(base, local, facts.get("revision")),
        _section("LoRA", {k: v for k, v in lora.items() if k in _LORA}, _LORA),
        _section("Data", facts, _DATA),
        _section("Training", facts, _RUN),
        _section("Results", facts, _RESULT),
        _section("More", {key: facts[key] for key in other}, other),
        _loading(base, local, facts),
        _section("Versions", versions, {key: key for key in versions}),
    ]
    return "\n".join(part for part in parts if part)


def _base(facts: Mapping[str, Any]) -> tuple[str, bool]:
    """The base's hub id, or its folder's name and True."""
    source = str(facts.get("base") or "")
    looks_local = source.startswith((".", "~")) or Path(source).is_absolute() or (source and Path(source).is_dir())
    local = bool(source) and bool(facts.get("base_is_local", looks_local) or looks_local)
    return (Path(source).expanduser().resolve().name if local else source), local


def _introduction(base: str, local: bool, revision: Any) -> str:
    if not base:
        return "A LoRA adapter, trained with phi3_dist. It holds no weight of its base model.\n"
    at = f" (revision `{revision}`)" if revision else ""
    where = f"a model in the local folder `{base}`" if local else f"`{base}`{at}"
    note = " The folder is on the machine that trained it; this page gives only its name." if local else ""
    return f"A LoRA adapter for {where}, trained with phi3_dist. It holds no weight of its base model.{note}\n"


def _section(title: str, facts: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """A table of the facts that `labels` names; nothing where there are none."""
    rows = [
        f"| {labels[key]} | {_cell(value)} |"
        for key, value in facts.items()
        if key in labels and value is not None and value not in ((), [], {})
    ]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *rows, ""]) if rows else ""


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_cell(v)}" for k, v in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(_cell(v) for v in (sorted(value) if isinstance(value, set | frozenset) else value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    text = Path(text).name if Path(text).is_absolute() or text.startswith(("~/", "./", "../")) else text
    return text.replace("|", "\\|").replace("\n", " ")


def _loading(base: str, local: bool, facts: Mapping[str, Any]) -> str:
    source = "path/to/" + base if local else base or "path/to/base"
    revision = f', revision="{facts["revision"]}"' if facts.get("revision") and not local else ""
    arguments = f', dtype="auto"{revision}'
    note, classes, before, after = "", "AutoModelForCausalLM", "", ""
    if facts.get("longrope"):
        kept, other = ("long", "short") if facts["longrope"] == "long" else ("short", "long")
        note += _of_longrope(kept)
        classes = "AutoConfig, " + classes
        before += f"""config = AutoConfig.from_pretrained("{source}"{revision})
factors = config.rope_parameters
factors["{other}_factor"] = factors["{kept}_factor"]  # the same whatever the length
"""
        arguments += ", config=config"
    if facts.get("quantization") in _QUANTIZED:
        dtype = _DTYPES.get(facts.get("precision", ""), "bfloat16")
        note += _of_quantised(facts)
        classes += ", BitsAndBytesConfig"
        before += f"quantized = BitsAndBytesConfig(\n    {_QUANTIZED[facts['quantization']].format(dtype=dtype)}\n)\n"
        arguments += ", quantization_config=quantized"
    if facts.get("base_rows"):
        rows = f"base.resize_token_embeddings({facts['base_rows']}, mean_resizing=False)"
        after = f"{rows}  # the adapter fills the new rows\n"
    return f"""## How to load it
{note}
```python
from peft import PeftModel
from transformers import {classes}

{before}base = AutoModelForCausalLM.from_pretrained("{source}"{arguments})
{after}model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""


def _of_longrope(kept: str) -> str:
    return f"""
It was trained with LongRoPE's {kept} factors. transformers takes the short ones for a prompt within the base's original
context and the long ones for a longer one: the lines below make it the {kept} ones for all. base_facts.json says so for
programs; `phi3_dist.adapters.loading.load_adapter` does it by itself, `AutoPeftModelForCausalLM` does not.
"""


def _of_quantised(facts: Mapping[str, Any]) -> str:
    if (facts.get("lora") or {}).get("init") == "loftq":
        return "\nLoftQ: the adapter makes up for what NF4 loses of the base, and is for the base in NF4 alone.\n"
    return f"\nIt was trained on the base in {facts['quantization']}, and is loaded on the same here.\n"


def _installed() -> dict[str, str]:
    found = {"python": platform.python_version(), "phi3-dist": __version__}
    for package in ("torch", "transformers", "peft", "accelerate"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def with_hub_base(card: str, before: str, base: str, revision: str | None) -> str:
    """A card as it is handed on: `base`, a hub id, in place of the local base `before`, a path or a name.

    Raises ValueError for front matter that is no YAML.
    """
    name, at = Path(before).name, f" (revision `{revision}`)" if revision else ""
    argument = f', revision="{revision}"' if revision else ""
    for old, new in (
        (_introduction(name, True, None), _introduction(base, False, revision)),
        (f'"path/to/{name}"', f'"{base}"{argument}'),
        (f"`{before}`", f"`{base}`{at}"),
        (f'"{before}"', f'"{base}"{argument}'),
        (before if Path(before).is_absolute() else "", base),
    ):
        card = card.replace(old, new) if name and old else card
    front: dict[str, Any] = {}
    body = card
    if card.startswith("---\n") and "\n---\n" in card:
        head, _, body = card.removeprefix("---\n").partition("\n---\n")
        try:
            front = yaml.safe_load(head) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"the front matter of {name or 'the card'} is no YAML") from error
    tags = [tag for tag in front.get("tags") or ["lora", "peft", "phi3"] if not str(tag).startswith("base_model:")]
    front |= {"base_model": base, "tags": [*(tag for tag in tags if tag != "adapter"), f"base_model:adapter:{base}"]}
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n{body}"
