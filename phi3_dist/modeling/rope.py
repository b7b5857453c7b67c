"""LongRoPE with one regime for the whole run.

transformers chooses between the short and the long factors once per forward pass, from the longest position in
the batch: one long row changes the logits of every short one, and two ranks can differ. Here the regime is a
value of the plan: pinned once, the same on every rank and at evaluation.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

__all__ = ["PinnedRotary", "Regime", "pin_longrope", "pinned_regime", "regime_for"]

Regime = Literal["short", "long"]


def regime_for(config: Phi3Config, longest_row: int, configured: Literal["auto"] | Regime = "auto") -> Regime | None:
    """The factors that serve rows of up to `longest_row` tokens, or those asked for; None without LongRoPE."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "longrope":
        return None
    if configured != "auto":
        return configured
    original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
    return "long" if longest_row > original else "short"


class PinnedRotary(nn.Module):
    """cos and sin (1, T, rotary size) of positions (1, T), from factors fixed at construction."""

    inv_freq: Tensor

    def __init__(self, config: Phi3Config, regime: Regime) -> None:
        super().__init__()
        self.regime = regime
        rope = config.rope_parameters
        original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
        # transformers' own function picks the factors by the length it is told
        seq_len = original + 1 if regime == "long" else original
        inv_freq, self.attention_scaling = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=seq_len)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        inv_freq = self.inv_freq.to(device=x.device, dtype=torch.float32)
        freqs = position_ids[..., None].float() * inv_freq
        angles = torch.cat((freqs, freqs), dim=-1)
        scale = self.attention_scaling
        return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)


def pinned_regime(model: nn.Module) -> Regime | None:
    """The factors that a model is pinned to, whatever wraps it; None where it has no LongRoPE."""
    return next((module.regime for module in model.modules() if isinstance(module, PinnedRotary)), None)


def pin_longrope(model: Any, longest_row: int, asked: Literal["auto"] | Regime = "auto") -> Regime | None:
    """Replace the rotary module of a `Phi3ForCausalLM` where it has LongRoPE. Returns the regime."""
    regime = regime_for(model.config, longest_row, asked)
    if regime is not None:
        model.model.rotary_emb = PinnedRotary(model.config, regime)
    return regime
