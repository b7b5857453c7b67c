"""A LoRA linear's forward and backward in the order that moves fewest bytes, over the kernels of lora.py.

LoRA's product comes first and the base's is added to it by the matrix library (beta 1), which reads the accumulator's
start while it computes; the other way round LoRA's thin product reads and writes the whole output once more. The same
in backward, where LoRA's part of x's gradient also carries the dropout mask.

Shapes: T tokens, I inputs, O outputs, R the adapter's rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phi3_dist.modeling.kernels.lora import Drop, down, grads_of_input, grads_of_output

__all__ = ["backward", "forward"]


def forward(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float, drop: Drop
) -> tuple[Tensor, Tensor]:
    """`x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ`, and `scaling · dropout(x) Aᵀ`, which backward needs."""
    down_TR = down(x_TI, a_RI, scaling, drop)
    out_TO = torch.mm(down_TR, b_OR.T) if bias_O is None else torch.addmm(bias_O, down_TR, b_OR.T)
    return out_TO.addmm_(x_TI, weight_OI.T), down_TR


def backward(
    grad_TO: Tensor,
    x_TI: Tensor,
    weight_OI: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    down_TR: Tensor,
    scaling: float,
    drop: Drop,
    *,
    of_input: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of x (None unless `of_input`), A and B."""
    grad_down_TR, grad_b = grads_of_output(grad_TO, b_OR, down_TR, scaling * drop.scale)
    grad_a, grad_x = grads_of_input(x_TI, grad_down_TR, a_RI, drop, write=of_input)
    return None if grad_x is None else grad_x.addmm_(grad_TO, weight_OI), grad_a, grad_b
