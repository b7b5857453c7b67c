"""The README.md of an adapter: what it is, what it was trained on, how to load it. No path of this machine in it.

adapter_config.json beside it names a local base by its path: see adapters/publishing.py for a folder to hand on.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_dist.adapters.front_matter import divided, front_matter, with_front
from phi3_dist.machine.installed_versions import versions_of
from phi3_dist.serving.rules import judge
from phi3_dist.serving.served import served_of_card
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
}
_OPTIM = {
    "name": "optimizer",
    "lr": "learning rate",
    "schedule": "schedule",
    "warmup": "warm-up (below 1 a share of the steps)",
    "weight_decay": "weight decay",
    "max_grad_norm": "gradients clipped to norm",
}
_RESULT = {
    "loss": "training loss, last step (nats a token)",
    "heldout_loss": "held-out loss (nats a token)",
    "heldout_perplexity": "held-out perplexity",
}


def adapter_card(contents: Mapping[str, Any]) -> str:
    """The model card in Markdown, with YAML front matter as the Hugging Face hub reads it (adapters/front_matter.py).

    `contents`, all of them optional: `name`, `base` (hub id or folder), `base_is_local`, `revision`, `license`,
    `language`, `datasets` (hub ids), `lora` (the run file's section or PEFT's configuration), `versions` (by package,
    else those installed), `data_fingerprint`, `rows`, `supervised_tokens`, `pack_length`, `steps`, `global_batch`,
    `base_rows` (how many its tables must have, where the base has fewer), `taught_tokens`, `longrope` (`short`,
    `long`), `original_context` and `window` (tokens), `quantization` (`nf4`, `int8`), `precision`, `strategy`,
    `world_size`, `optim`, `loss`, `heldout_loss`, `heldout_perplexity`. Any other fact is for machines: no card has it.
    A local base, and any other absolute path, is shown by the name of its folder alone.
    """
    base, local = _base(contents)
    lora, versions = contents.get("lora") or {}, contents.get("versions") or _installed()
    training = {**{key: contents.get(key) for key in _RUN}, **(contents.get("optim") or {})}
    parts = [
        with_front("", front_matter(contents, base if "/" in base and not local else None)),
        f"# {contents.get('name') or 'LoRA adapter'}\n",
        _introduction(base, local, contents.get("revision")),
        _section("LoRA", {k: v for k, v in lora.items() if k in _LORA}, _LORA),
        _section("Data", contents, _DATA),
        _section("Training", training, {**_RUN, **_OPTIM}),
        _section("Results", contents, _RESULT),
        _loading(base, local, contents),
        _serving(base, local, contents),
        _merging(contents),
        _section("Versions", versions, {key: key for key in versions}),
    ]
    return "\n".join(part for part in parts if part)


def _base(contents: Mapping[str, Any]) -> tuple[str, bool]:
    """The base's hub id, or its folder's name and True."""
    source = str(contents.get("base") or "")
    looks_local = source.startswith((".", "~")) or Path(source).is_absolute() or (source and Path(source).is_dir())
    local = bool(source) and bool(contents.get("base_is_local", looks_local) or looks_local)
    return (Path(source).expanduser().resolve().name if local else source), local


def _introduction(base: str, local: bool, revision: Any) -> str:
    if not base:
        return "A LoRA adapter, trained with phi3_dist. It holds no weight of its base model.\n"
    at = f" (revision `{revision}`)" if revision else ""
    where = f"a model in the local folder `{base}`" if local else f"`{base}`{at}"
    note = " The folder is on the machine that trained it; this page gives only its name." if local else ""
    return f"A LoRA adapter for {where}, trained with phi3_dist. It holds no weight of its base model.{note}\n"


def _section(title: str, contents: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """A table of those that `labels` names; nothing where there are none."""
    rows = [
        f"| {labels[key]} | {_cell(value)} |"
        for key, value in contents.items()
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


def _loading(base: str, local: bool, contents: Mapping[str, Any]) -> str:
    source = "path/to/" + base if local else base or "path/to/base"
    revision = f', revision="{contents["revision"]}"' if contents.get("revision") and not local else ""
    arguments = f', dtype="auto"{revision}'
    note, classes, before, after = "", "AutoModelForCausalLM", "", ""
    if contents.get("longrope"):
        kept, other = ("long", "short") if contents["longrope"] == "long" else ("short", "long")
        note += _of_longrope(kept)
        classes = "AutoConfig, " + classes
        before += f"""config = AutoConfig.from_pretrained("{source}"{revision})
factors = config.rope_parameters
factors["{other}_factor"] = factors["{kept}_factor"]  # the same whatever the length
"""
        arguments += ", config=config"
    if contents.get("quantization") in _QUANTIZED:
        dtype = _DTYPES.get(contents.get("precision", ""), "bfloat16")
        note += _of_quantised(contents)
        classes += ", BitsAndBytesConfig"
        options = _QUANTIZED[contents["quantization"]].format(dtype=dtype)
        before += f"quantized = BitsAndBytesConfig(\n    {options}\n)\n"
        arguments += ", quantization_config=quantized"
    if contents.get("base_rows"):
        rows = f"base.resize_token_embeddings({contents['base_rows']}, mean_resizing=False)"
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


def _serving(base: str, local: bool, contents: Mapping[str, Any]) -> str:
    """Of each server what its rules say: phi3_dist/serving/rules.py."""
    served = served_of_card(contents, "path/to/" + base if local else base)
    parts = ["## How to serve it\n"]
    for server, title in (("vllm", "vLLM"), ("llama.cpp", "llama.cpp, Ollama")):
        verdict = judge(served, server)  # type: ignore[arg-type]
        why = [f"- {finding.what}." for finding in verdict.findings if finding.effect != "flag" or not verdict.loads]
        line = (
            f"```bash\n{verdict.command}\n```"
            if verdict.right
            else "Merge it (below): as an adapter it answers wrongly there."
        )
        parts += [f"**{title}**\n", line, *(["", *why] if why else []), ""]
    parts.append("`phi3-dist check path/to/this/folder --for vllm --run` compares a server's answers with PEFT's.\n")
    return "\n".join(parts)


def _merging(contents: Mapping[str, Any]) -> str:
    into = " --into nf4" if (contents.get("lora") or {}).get("init") == "loftq" else ""
    return f"""## How to merge it

```bash
phi3-dist export path/to/this/folder merged --as merged{into}
```
"""


def _of_longrope(kept: str) -> str:
    return f"""
It was trained with LongRoPE's {kept} factors. transformers takes the short ones for a prompt within the base's original
context and the long ones for a longer one: the lines below make it the {kept} ones for all. base_facts.json says so for
programs; `phi3_dist.adapters.loading.load_adapter` does this for you, `AutoPeftModelForCausalLM` does not.
"""


def _of_quantised(contents: Mapping[str, Any]) -> str:
    if (contents.get("lora") or {}).get("init") == "loftq":
        return "\nLoftQ: the adapter makes up for what NF4 loses of the base, and is for the base in NF4 alone.\n"
    return f"\nIt was trained on the base in {contents['quantization']}, and is loaded on the same here.\n"


def _installed() -> dict[str, str]:
    packages = versions_of(("torch", "transformers", "peft", "accelerate"))
    return {"python": platform.python_version(), "phi3-dist": __version__, **packages}


def with_hub_base(card: str, before: str, base: str, revision: str | None) -> str:
    """A card as it is handed on: `base`, a hub id, in place of the local base `before`, a path or a name.

    Raises ValueError for front matter that is not YAML.
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
    card = card.replace(f"path/to/{name}", base) if name else card
    try:
        front, _ = divided(card)
    except ValueError as error:
        raise ValueError(f"the front matter of {name or 'the card'} is not YAML") from error
    tags = [tag for tag in front.get("tags") or ["lora", "peft", "phi3"] if not str(tag).startswith("base_model:")]
    tags = [*(tag for tag in tags if tag != "adapter"), f"base_model:adapter:{base}"]
    return with_front(card, {"base_model": base, "tags": tags})
