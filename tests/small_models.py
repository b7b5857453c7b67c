"""The small Phi-3 bases that tests share."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Phi3Config, Phi3ForCausalLM

from phi3_dist.modeling.base import tiny_config
from phi3_dist.modeling.tokenizer import tiny_tokenizer


def small_phi3(**changes: object) -> Phi3ForCausalLM:
    """Seeded random weights, two layers, grouped queries, 97 tokens; `changes` are set on its configuration."""
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=None,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    for key, value in changes.items():
        setattr(config, key, value)
    return Phi3ForCausalLM(config)


def longrope_base(folder: Path, original: int) -> Path:
    """A tiny base with its tokenizer, grouped heads, and LongRoPE whose window before was `original` tokens."""
    values = tiny_config().to_dict()
    half = values["hidden_size"] // values["num_attention_heads"] // 2
    values["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(half)],
        "long_factor": [4.0 + i for i in range(half)],
        "original_max_position_embeddings": original,
    }
    values |= {"original_max_position_embeddings": original}
    torch.manual_seed(1)
    Phi3ForCausalLM(Phi3Config.from_dict(values)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
