"""`--as merged`: base and adapter in one folder of Hugging Face's form, written shard by shard.

At no time are more tensors in memory than those of the shard that is written and one being computed. The base is the
mapped file, of which the system keeps what it has room for.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from phi3_dist.adapters.durable_files import write_tensors
from phi3_dist.errors import AdapterError, MachineError, Problem
from phi3_dist.exports.open_adapter import Opened
from phi3_dist.modeling.base import Base

__all__ = ["Into", "merger", "settle_into", "unties", "weight_names", "write_merged"]

Into = Literal["base", "nf4"]
SHARD_BYTES = 2 * 2**30
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_CONFIG_OF_BASE = ("generation_config.json",)
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json",
    "tokenizer.model",
)  # fmt: skip


def settle_into(opened: Opened, into: Into | None) -> Into:
    """The weights that the adapter is merged into: those it was trained on, unless the others are asked for.

    Raises AdapterError for LoftQ's adapter and a base that is not NF4: its start makes up for what NF4 has lost.
    """
    chosen = into or ("nf4" if opened.trained_on == "nf4" else "base")
    if opened.lora_init == "loftq" and chosen == "base":
        what = "began with LoftQ, which makes up for what NF4 loses: on the 16-bit base it would be applied twice"
        raise AdapterError(Problem(str(opened.folder), what, "--into nf4"))
    if opened.trained_on == "int8" and chosen == "nf4":
        what = "was trained on the base in int8, and not in NF4"
        raise AdapterError(Problem(str(opened.folder), what, "--into base"))
    return chosen


def write_merged(opened: Opened, folder: Path, into: Into, tokenizer: Any) -> int:
    """Fill `folder`; config.json comes last. Returns the number of shards. Raises OSError, AdapterError."""
    untied = unties(opened)
    plan = list(_shards(opened, SHARD_BYTES))
    weight_map: dict[str, str] = {}
    total = 0
    merge = merger(opened, into)
    for number, names in enumerate(plan, start=1):
        file = "model.safetensors" if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        shard = {name: merge(name) for name in names}
        write_tensors(folder / file, shard)
        total += sum(t.nbytes for t in shard.values())
        weight_map |= dict.fromkeys(names, file)
        del shard
        opened.base.weights.close()
    if len(plan) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _write_tokenizer(opened, folder, tokenizer)
    config = _config(opened.base) | {"vocab_size": opened.rows}
    if untied:
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return len(plan)


def unties(opened: Opened) -> bool:
    """Whether a tied head must get weights of its own: only one of the two tables has changed.

    Taught rows are in both: PEFT's head follows the embedding.
    """
    if not opened.base.config.tie_word_embeddings:
        return False
    parts = opened.contents
    return any(
        {"model.embed_tokens", "lm_head"} & {n.removesuffix(".weight") for n in names}
        for names in (parts.updates, parts.whole)
    )


def weight_names(opened: Opened) -> list[str]:
    """The weights of the merged model, sorted."""
    names = {n for n in opened.base.weights.names() if not n.endswith("rotary_emb.inv_freq")}
    if unties(opened):
        names |= {_HEAD}
    elif opened.base.config.tie_word_embeddings:
        names -= {_HEAD}
    return sorted(names)


def _shards(opened: Opened, most: int) -> Iterator[list[str]]:
    weights = opened.base.weights
    shard: list[str] = []
    used = 0
    for name in weight_names(opened):
        stored = _stored(opened.base, name)
        size = max(opened.rows if name in (_EMBED, _HEAD) else 0, weights.shape(stored)[0])
        size = size * math.prod(weights.shape(stored)[1:]) * weights.rows(stored, 0, 0).dtype.itemsize
        if shard and used + size > most:
            yield shard
            shard, used = [], 0
        shard.append(name)
        used += size
    yield shard


def _stored(base: Base, name: str) -> str:
    return _EMBED if name == _HEAD and _HEAD not in base.weights.names() else name


def merger(opened: Opened, into: Into, dtype: torch.dtype | None = None) -> Callable[[str], Tensor]:
    """From a weight's name to the merged weight, in `dtype`, by default the one that the base has it in."""
    contents, weights = opened.contents, opened.base.weights
    dequantized = _nf4() if into == "nf4" else None
    tied = bool(opened.base.config.tie_word_embeddings)

    def merge(name: str) -> Tensor:
        module = name.removesuffix(".weight")
        stored = weights.whole(_stored(opened.base, name))
        weight = stored
        if name in contents.whole:
            weight = contents.whole[name]
        elif dequantized and _is_quantised(name):
            weight = dequantized(stored)
        if module in contents.updates:
            weight = contents.updates[module].of(weight)
        taught = contents.taught
        ids, rows = taught.get(module) or (taught.get("model.embed_tokens") if tied else None) or ([], None)
        if name in (_EMBED, _HEAD):
            more = opened.rows - len(weight)
            if more > 0:
                mean = weights.mean_row(_stored(opened.base, name)).to(weight)
                weight = torch.cat((weight, mean.expand(more, -1)))
            if rows is not None:
                weight = weight.clone()
                weight[ids] = rows.to(weight.dtype)
        merged = weight.to(dtype or stored.dtype).contiguous()
        if not torch.isfinite(merged).all():
            what = f"{name} would hold numbers that {str(merged.dtype).removeprefix('torch.')} can't"
            raise AdapterError(Problem(str(opened.folder), what, "serve the adapter beside its base"))
        return merged

    return merge


def _is_quantised(name: str) -> bool:
    """transformers quantises each linear module but the head."""
    return name.endswith("_proj.weight")


def _nf4() -> Callable[[Tensor], Tensor]:
    """The weight as NF4 keeps it: what modeling/base.py's `load_quantized` computes with, in float32."""
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError as error:
        what = "is needed for the base in NF4, and is not installed"
        raise MachineError(Problem("bitsandbytes", what, "pip install bitsandbytes, or --into base")) from error

    def through(weight: Tensor) -> Tensor:
        packed, state = quantize_4bit(weight.float().contiguous(), quant_type="nf4", compress_statistics=True)
        plain: Tensor = dequantize_4bit(packed, state)
        return plain

    return through


def _config(base: Base) -> dict[str, Any]:
    path = base.folder / "config.json" if base.folder else None
    if path is None:
        config: dict[str, Any] = base.config.to_dict()
        config["architectures"] = ["Phi3ForCausalLM"]
    else:
        config = json.loads(path.read_text("utf-8"))
    for key in ("quantization_config", "auto_map", "_name_or_path"):
        config.pop(key, None)  # no remote code, no quantised weights, no path of the machine that has saved the base
    return config


def _write_tokenizer(opened: Opened, folder: Path, tokenizer: Any) -> None:
    for name in _CONFIG_OF_BASE:
        if opened.base.folder is not None and (opened.base.folder / name).is_file():
            shutil.copyfile(opened.base.folder / name, folder / name)
    if (opened.folder / "tokenizer.json").is_file():
        source = opened.folder
    elif opened.base.folder is not None and (opened.base.folder / "tokenizer.json").is_file():
        source = opened.base.folder
    else:
        tokenizer.save_pretrained(str(folder))
        return
    for name in _TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
