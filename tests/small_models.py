"""The small Phi-3 that tests of single modules share."""

from __future__ import annotations

import torch
from transformers import Phi3Config, Phi3ForCausalLM


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
