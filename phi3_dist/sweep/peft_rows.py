"""A candidate's rows of one linear as PEFT 0.21 computes them, where no function of ours does: DoRA, and int8 bases.

Each takes what the base's product gave for the rows and gives what PEFT's layer would have made of it, product by
product and in PEFT's order, so that the numbers are those of a run alone. Only the dropout's noise comes from outside:
PEFT draws it from the global generator, and here each candidate has one.

Shapes: T a candidate's tokens, I inputs, O outputs, R its rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phi3_dist.modeling.dequantize import dense, quant_state_of
from phi3_dist.modeling.fused_lora import dropped_positions

__all__ = ["Update", "dora_rows", "lora_rows", "noise_of", "row_norms"]


@dataclass(frozen=True)
class Update:
    """One candidate's LoRA at one linear; with a magnitude, its DoRA. The tensors may lie on the host (offload)."""

    a_RI: nn.Parameter
    b_OR: nn.Parameter
    scaling: float
    dropout: float
    magnitude_O: nn.Parameter | None = None


def noise_of(x_TI: Tensor, update: Update, generator: torch.Generator | None) -> Tensor | None:
    """What dropout multiplies x by, as `F.dropout` draws it; None where nothing is dropped."""
    if not update.dropout or generator is None:
        return None
    dropped_TI = dropped_positions(x_TI, update.dropout, generator)
    return dropped_TI.logical_not_().to(update.a_RI.dtype).div_(1.0 - update.dropout)


def lora_rows(x_TI: Tensor, base_TO: Tensor, linear: Any, update: Update, noise_TI: Tensor | None) -> Tensor:
    """`base + scaling · B A (x · noise)`, as PEFT's layer over an int8 linear adds it. Called as `dora_rows` is."""
    a_RI, b_OR = (one.to(x_TI.device) for one in (update.a_RI, update.b_OR))
    x_TI = x_TI if torch.is_autocast_enabled() else x_TI.to(a_RI.dtype)
    if noise_TI is not None:
        x_TI = x_TI * noise_TI
    added_TO = F.linear(F.linear(x_TI, a_RI), b_OR) * update.scaling
    return base_TO + added_TO.to(base_TO.dtype)


def dora_rows(x_TI: Tensor, base_TO: Tensor, linear: Any, update: Update, noise_TI: Tensor | None) -> Tensor:
    """The rows of a weight whose direction is that of W + scaling · B A and whose rows have the lengths `magnitude`.

    With dropout PEFT also drops from what goes through W, so that the base has a second product for these rows.
    """
    assert update.magnitude_O is not None
    tensors = (update.a_RI, update.b_OR, update.magnitude_O)
    a_RI, b_OR, magnitude_O = (one.to(x_TI.device) for one in tensors)
    x_TI = x_TI.to(a_RI.dtype)
    weight_OI = dense(linear.weight, quant_state_of(linear), x_TI.dtype).to(x_TI.dtype)
    with torch.no_grad():
        eye_II = torch.eye(a_RI.shape[1], device=a_RI.device, dtype=a_RI.dtype)
        delta_OI = F.linear(F.linear(eye_II, a_RI), b_OR).T.to(x_TI.dtype)
        norm_O = row_norms(weight_OI + update.scaling * delta_OI)
    scale_1O = (magnitude_O / norm_O).view(1, -1)
    lora_x_TI = x_TI if noise_TI is None else x_TI * noise_TI
    lora_TO = F.linear(F.linear(lora_x_TI, a_RI), b_OR)
    if noise_TI is not None:
        through_TO = F.linear(lora_x_TI, weight_OI)
    else:
        through_TO = base_TO if linear.bias is None else base_TO - linear.bias
    out_TO = base_TO + ((scale_1O - 1) * through_TO + scale_1O * lora_TO * update.scaling)
    return out_TO.to(base_TO.dtype)


def row_norms(weight_OI: Tensor) -> Tensor:
    """In the weight's own dtype, as PEFT has them."""
    norm_O: Tensor = torch.linalg.norm(weight_OI, dim=1)
    return norm_O.to(weight_OI.dtype)
