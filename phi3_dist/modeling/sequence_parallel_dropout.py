"""LoRA's dropout over packs that several ranks share: each draws the whole pack's mask and keeps its own rows of it.

The numbers are then those of one process, whatever the ranks. It costs each of them the drawing for all, and for that
moment a byte for each token of the pack and input of the linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from peft.tuners.lora import LoraLayer
from torch import nn

from phi3_dist.modeling.attention.sequence_parallel import Rows, Share
from phi3_dist.modeling.fused_lora import draw_for_rows
from phi3_dist.modeling.loss import PackedLoss

__all__ = ["ShareInUse", "dropout_by_peft", "draw_dropout_for_whole_packs"]

_OF_CHOSEN = ("o_proj", "gate_up_proj", "down_proj")
"""The last layer's linears after attention, which see supervised rows alone where that layer selects them."""


class ShareInUse:
    """The share of the micro batch that is under way, until the next forward: its backward may run layers again."""

    def __init__(self) -> None:
        self.share: Share | None = None

    def rows(self, which: Literal["tokens", "supervised"]) -> Rows | None:
        if self.share is None:
            return None
        return self.share.tokens if which == "tokens" else self.share.supervised


def _with_dropout(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and any(getattr(d, "p", 0.0) > 0 for d in layer.lora_dropout.values()):
            yield name, layer


def dropout_by_peft(model: nn.Module) -> tuple[str, ...]:
    """Names of LoRA layers with dropout that PEFT's own forward draws, for the rows at hand alone."""
    return tuple(name for name, layer in _with_dropout(model) if "forward" not in vars(layer))


def draw_dropout_for_whole_packs(model: PackedLoss) -> None:
    """Let fused LoRA linears draw for whole packs, of which `forward` gets a share. After the forwards are fused."""
    last = f".layers.{len(model.causal_lm.model.layers) - 1}."
    model.in_use = ShareInUse()
    for name, layer in _with_dropout(model):
        of_chosen = model.last_layer_selects and last in name and name.endswith(_OF_CHOSEN)
        supervised = of_chosen or name.endswith("lm_head")
        draw_for_rows(layer, partial(model.in_use.rows, "supervised" if supervised else "tokens"))
