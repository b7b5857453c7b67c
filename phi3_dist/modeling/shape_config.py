"""A Phi3Config from the numbers of a shape, for models of random weights."""

from __future__ import annotations

from typing import Any

from transformers import Phi3Config

from phi3_dist.family.variants import Shape

__all__ = ["config_of_shape"]


def config_of_shape(shape: Shape, **more: Any) -> Phi3Config:
    """4,096 positions, no window and no special tokens, unless `more` says otherwise."""
    values = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 4096,
        "sliding_window": None,
        "tie_word_embeddings": shape.tied,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return Phi3Config(**{**values, **more})
