"""Adapters of every kind on a small base that lies on the disk, with random weights that matter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import Phi3Config, Phi3ForCausalLM

from phi3_dist.adapters.files import save_adapter
from phi3_dist.adapters.model_card import adapter_card
from phi3_dist.config.schema import LoraConfig
from phi3_dist.modeling.base import find_base, load_full, load_quantized, tiny_config
from phi3_dist.modeling.lora import peft_config, quiet_peft
from phi3_dist.modeling.new_tokens import enlarged, new_token_ids
from phi3_dist.modeling.rope import pin_longrope
from phi3_dist.modeling.tokenizer import load_tokenizer, tiny_tokenizer

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "patterns": {"rank_pattern": {"o_proj": 3, "layers.1.mlp.down_proj": 5}, "alpha_pattern": {"qkv_proj": 4.0}},
    "some_layers": {"layers": (1,), "targets": ("qkv_proj",)},
    "bias": {"bias": "all"},
    "whole_head": {"modules_to_save": ("lm_head",)},
    "embedding": {"targets": ("embed_tokens", "qkv_proj", "lm_head")},
}


def small_base(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A base like `tiny-random` with its tokenizer, in `folder`; several shards. `changes` are of its config."""
    torch.manual_seed(0)
    config = tiny_config()
    for key, value in changes.items():
        setattr(config, key, value)
    model = Phi3ForCausalLM(Phi3Config.from_dict(config.to_dict())).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(6.0)  # so that attention is sharp and every update shows
    model.save_pretrained(folder, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(str(folder))
    return folder


def small_adapter(
    folder: Path,
    base_folder: Path,
    *,
    new_tokens: tuple[str, ...] = (),
    facts: Mapping[str, str] | None = None,
    quantization: str = "none",
    seed: int = 1,
    **lora: Any,
) -> Path:
    """An adapter that a run could have left: every tensor random, its card and tokenizer beside."""
    base = find_base(str(base_folder))
    tokenizer = load_tokenizer(str(base_folder), new_tokens=new_tokens)
    ids = new_token_ids(tokenizer, new_tokens, base)
    base = enlarged(base, ids)
    cfg = LoraConfig(**{"r": 4, "alpha": 8.0, "dropout": 0.0, **lora})
    if quantization == "none":
        model = load_full(base, torch.float32, torch.device("cpu"))
    else:
        model = load_quantized(base, quantization, torch.float32, torch.device("cpu"))
    if facts and "longrope" in facts:
        pin_longrope(model, 0, facts["longrope"])  # type: ignore[arg-type]
    with quiet_peft():
        peft_model: Any = get_peft_model(model, peft_config(model, cfg, str(base_folder), ids))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, param in peft_model.named_parameters():
            if param.requires_grad:
                spread = 0.02 if "magnitude" in name or "modules_to_save" in name else 0.3
                param.add_(spread * torch.randn_like(param))
    header = {**(facts or {}), **({"base_rows": str(base.enlarged_rows)} if base.enlarged_rows else {})}
    if quantization != "none":
        header |= {"quantization": quantization, "start": "default"}
    card = adapter_card({"name": "small", "base": str(base_folder), "lora": cfg.model_dump(), **header})
    save_adapter(peft_model, folder, tokenizer=tokenizer, card=card, metadata=header)
    return folder
