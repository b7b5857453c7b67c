"""The frozen base's product, from weights as they are stored: plain, bitsandbytes' NF4 (dequantised here) or FP8.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phi3_dist.modeling.fp8 import Fp8Linear, Fp8Scale, fp8_grad_input, fp8_product

__all__ = ["base_grad_input", "base_product", "dense", "quant_state_of"]


def dense(weight: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """The weight as (O, I): itself, or dequantised where it is bitsandbytes' 4-bit storage."""
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    dense_OI: Tensor = dequantize_4bit(weight, quant_state=state).to(dtype)
    return dense_OI


def base_product(x_TI: Tensor, weight: Tensor, state: Any, bias_O: Tensor | None) -> Tensor:
    if isinstance(state, Fp8Scale):
        return fp8_product(x_TI, weight, state, bias_O)
    return F.linear(x_TI, dense(weight, state, x_TI.dtype), bias_O)


def base_grad_input(grad_TO: Tensor, weight: Tensor, state: Any) -> Tensor:
    if isinstance(state, Fp8Scale):
        return fp8_grad_input(grad_TO, weight, state)
    return grad_TO @ dense(weight, state, grad_TO.dtype)


def quant_state_of(base: nn.Linear | Fp8Linear) -> Any:
    """What turns the stored weight into numbers: bitsandbytes' state, an FP8 scale, or None where it is the numbers."""
    if isinstance(base, Fp8Linear):
        return base.scale
    state = getattr(base.weight, "quant_state", None)
    return state if state is not None else getattr(base, "quant_state", None)
