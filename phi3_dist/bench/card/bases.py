"""A saved tiny base for the checks that need a folder: quantised bases, and adapters large enough for 8 bits."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Phi3ForCausalLM

from phi3_dist.modeling.base import tiny_config
from phi3_dist.modeling.tokenizer import tiny_tokenizer

__all__ = ["save_tiny_base"]


def save_tiny_base(folder: Path) -> Path:
    """Random weights and the byte tokenizer, 256 wide: no toy for bitsandbytes, which leaves small tensors alone."""
    torch.manual_seed(1)
    config = tiny_config()
    config.hidden_size, config.intermediate_size = 256, 512
    Phi3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
