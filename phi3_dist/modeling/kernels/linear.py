"""A LoRA linear over the kernels of lora.py, in the order that moves fewest bytes.

LoRA's product comes first and the base's is added to it by the matrix library (beta 1), which reads the accumulator's
start while it computes; the other way round LoRA's thin product reads and writes the whole output once more. The same
in backward, where LoRA's part of x's gradient also carries the dropout mask. An FP8 product takes no accumulator: there
LoRA's parts are added behind it.

Shapes: T tokens, I inputs, O outputs, R the adapter's rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phi3_dist.modeling.fp8 import Fp8Scale, Rows8, fp8_grad_input, fp8_product, noted_rows
from phi3_dist.modeling.kernels.fp8 import quantize_rows
from phi3_dist.modeling.kernels.lora import Drop, down, drop_of, grads_of_input, grads_of_output

__all__ = ["backward", "forward", "kernel_lora_linear"]


def forward(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float, drop: Drop
) -> tuple[Tensor, Tensor]:
    """`x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ`, and `scaling · dropout(x) Aᵀ`, which backward needs."""
    down_TR = down(x_TI, a_RI, scaling, drop)
    b_RO = b_OR.to(x_TI.dtype).T
    out_TO = torch.mm(down_TR, b_RO) if bias_O is None else torch.addmm(bias_O, down_TR, b_RO)
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


class _KernelLora(torch.autograd.Function):
    """As `fused_lora._LoraLinear`; x comes as it is (..., I), so that FP8 rows left on it or its gradient are seen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scaling: float,
        drop: Drop,
        quant_state: Any,
        keep: bool,
    ) -> Tensor:
        from phi3_dist.modeling.dequantize import dense

        x_TI = x.reshape(-1, x.shape[-1])
        if isinstance(quant_state, Fp8Scale):
            rows = noted_rows(x) or Rows8(*quantize_rows(x_TI))
            down_TR = down(x_TI, a_RI, scaling, drop)
            out_TO = fp8_product(x_TI, weight, quant_state, bias_O, rows).addmm_(down_TR, b_OR.to(x.dtype).T)
        else:
            weight_OI = dense(weight, quant_state, x.dtype)
            out_TO, down_TR = forward(x_TI, weight_OI, bias_O, a_RI, b_OR, scaling, drop)
            if keep:
                weight, quant_state = weight_OI, None
        ctx.save_for_backward(x, weight, a_RI, b_OR, down_TR)
        ctx.scaling, ctx.drop, ctx.quant_state = scaling, drop, quant_state
        # no view in autograd's eyes: what follows may write into it
        out: Tensor = torch.ops.aten._unsafe_view(out_TO, (*x.shape[:-1], out_TO.shape[-1]))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from phi3_dist.modeling.dequantize import dense

        x, weight, a_RI, b_OR, down_TR = ctx.saved_tensors
        x_TI, grad_TO = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]).contiguous()
        scaling, drop, state, of_input = ctx.scaling, ctx.drop, ctx.quant_state, ctx.needs_input_grad[0]
        if isinstance(state, Fp8Scale):
            grad_down_TR, grad_b = grads_of_output(grad_TO, b_OR, down_TR, scaling * drop.scale)
            grad_x = None
            if of_input:
                rows = noted_rows(grad) or Rows8(*quantize_rows(grad_TO, state.rows_O))
                grad_x = fp8_grad_input(grad_TO, weight, state, rows)
            grad_a, grad_x = grads_of_input(x_TI, grad_down_TR, a_RI, drop, write=of_input, into_TI=grad_x)
        else:
            weights = (dense(weight, state, grad.dtype), a_RI, b_OR)
            grad_x, grad_a, grad_b = backward(grad_TO, x_TI, *weights, down_TR, scaling, drop, of_input=of_input)
        of_a, of_b = ctx.needs_input_grad[3:5]
        if grad_x is not None:
            grad_x = torch.ops.aten._unsafe_view(grad_x, x.shape)
        return grad_x, None, None, grad_a if of_a else None, grad_b if of_b else None, None, None, None, None


def kernel_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias_O: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    scaling: float,
    dropout: float,
    quant_state: Any,
    *,
    keep: bool,
) -> Tensor:
    """`fused_lora.lora_linear` by these kernels, dropout's mask by Philox. x, W and bias are of one dtype.

    A and B may be of another, in which their gradients come.
    """
    arguments = (x, weight, bias_O, a_RI.contiguous(), b_OR.contiguous(), scaling, drop_of(dropout), quant_state, keep)
    out: Tensor = _KernelLora.apply(*arguments)
    return out
