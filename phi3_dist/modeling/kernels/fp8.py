"""FP8 rows made in the pass before: a norm, a SwiGLU or its backward gives its result in FP8 too.

Each kernel holds or reads again a whole row, since the scale is that of its largest magnitude: values are read from
memory once. As `fp8.quantize_rows` defines it: E4M3, scale = amax / 448 in float32. A factor for each column (the
weight's row scales, in backward) is multiplied in before.

Shapes: T tokens, C columns, H hidden, I inner.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phi3_dist.modeling.kernels.launch import launch, power_of_two, warps_for, whole_rows
from phi3_dist.modeling.kernels.passes import add_norm_row, swiglu_row, swiglu_row_gradients

__all__ = ["add_norm8", "quantize_rows", "swiglu8", "swiglu_backward8"]

_CHUNK = 4096


@triton.jit
def _eight(values, scale):
    return tl.minimum(tl.maximum(values / scale, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit
def _scale_of(largest):
    return tl.maximum(largest, 1e-12) / 448.0


@triton.jit
def _store_both(out, out8, scales, row, columns, width, value):
    """A row in the type of `out`, and that in FP8 with its scale."""
    inside, value = columns < width, value.to(out.dtype.element_ty)
    tl.store(out + row * width + columns, value, mask=inside)
    exact = value.to(tl.float32)
    scale = _scale_of(tl.max(tl.abs(exact)))
    tl.store(scales + row, scale)
    tl.store(out8 + row * width + columns, _eight(exact, scale), mask=inside)


@triton.jit
def _factored(x, factor, row, columns, row_x, width, FACTOR: tl.constexpr):
    inside = columns < width
    value = tl.load(x + row * row_x + columns, mask=inside, other=0.0).to(tl.float32)
    if FACTOR:
        value *= tl.load(factor + columns, mask=inside, other=0.0)
    return value


@triton.jit
def _quantize_kernel(
    x, factor, out, scales, row_x: tl.constexpr, width: tl.constexpr, FACTOR: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        value = _factored(x, factor, row, first + tl.arange(0, BLOCK), row_x, width, FACTOR)
        largest = tl.maximum(largest, tl.abs(value))
    scale = _scale_of(tl.max(largest))
    tl.store(scales + row, scale)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        value = _factored(x, factor, row, columns, row_x, width, FACTOR)
        tl.store(out + row * width + columns, _eight(value, scale), mask=columns < width)


@triton.jit
def _add_norm8_kernel(
    x, delta, weight, total, out, out8, rstd, scales, eps, row_x: tl.constexpr, row_delta: tl.constexpr,
    hidden: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    normed = add_norm_row(x, delta, weight, total, rstd, eps, row, columns, row_x, row_delta, hidden, ADD)
    _store_both(out, out8, scales, row, columns, hidden, normed)


@triton.jit
def _swiglu8_kernel(gate_up, out, out8, scales, row_in: tl.constexpr, inner: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    _store_both(out, out8, scales, row, columns, inner, swiglu_row(gate_up, row, columns, row_in, inner))


@triton.jit
def _swiglu_backward8_kernel(
    grad, gate_up, factor, out, out8, scales, row_grad: tl.constexpr, row_in: tl.constexpr, inner: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, inner, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < inner
        of_gate, of_up = swiglu_row_gradients(grad, gate_up, row, columns, row_grad, row_in, inner)
        tl.store(out + row * 2 * inner + columns, of_gate, mask=inside)
        tl.store(out + row * 2 * inner + inner + columns, of_up, mask=inside)
        left = of_gate.to(tl.float32) * tl.load(factor + columns, mask=inside, other=0.0)
        right = of_up.to(tl.float32) * tl.load(factor + inner + columns, mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.maximum(tl.abs(left), tl.abs(right)))
    scale = _scale_of(tl.max(largest))
    tl.store(scales + row, scale)
    for first in range(0, inner, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < inner
        of_gate, of_up = swiglu_row_gradients(grad, gate_up, row, columns, row_grad, row_in, inner)
        left = of_gate.to(tl.float32) * tl.load(factor + columns, mask=inside, other=0.0)
        right = of_up.to(tl.float32) * tl.load(factor + inner + columns, mask=inside, other=0.0)
        tl.store(out8 + row * 2 * inner + columns, _eight(left, scale), mask=inside)
        tl.store(out8 + row * 2 * inner + inner + columns, _eight(right, scale), mask=inside)


def _outputs(rows: Tensor, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    values = torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device=rows.device)
    return values, torch.empty(tokens, 1, dtype=torch.float32, device=rows.device)


def quantize_rows(x: Tensor, factor_C: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """E4M3 values of x (T, C), or of x · `factor_C`, and the float32 scale (T, 1) that brings them back."""
    (rows, row_x), width = whole_rows(x), x.shape[-1]
    tokens = x.numel() // width
    out8, scales = _outputs(x, tokens, width)
    block = min(power_of_two(width), _CHUNK)
    tensors = (rows, scales if factor_C is None else factor_C, out8, scales)
    fixed = (row_x, width, int(factor_C is not None), block)
    launch(_quantize_kernel, (tokens, 1, 1), tensors, (), fixed, warps_for(block))
    return out8, scales


def add_norm8(
    x: Tensor, delta: Tensor | None, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """`passes.add_norm`, and the norm's rows in FP8 with their scales."""
    (x_TH, row_x), hidden = whole_rows(x), x.shape[-1]
    tokens = x.numel() // hidden
    delta_TH, row_delta = (x_TH, row_x) if delta is None else whole_rows(delta)
    total = x if delta is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    out8, scales = _outputs(x, tokens, hidden)
    block = power_of_two(hidden)
    tensors = (x_TH, delta_TH, weight_H, total, out, out8, rstd, scales)
    fixed = (row_x, row_delta, hidden, int(delta is not None), block)
    launch(_add_norm8_kernel, (tokens, 1, 1), tensors, (eps,), fixed, warps_for(block))
    return total, out, rstd, (out8, scales)


def swiglu8(gate_up: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`up · silu(gate)` of (..., 2·I), and its rows in FP8 with their scales."""
    (rows, row_in), inner = whole_rows(gate_up), gate_up.shape[-1] // 2
    tokens = gate_up.numel() // (2 * inner)
    out = torch.empty((*gate_up.shape[:-1], inner), dtype=gate_up.dtype, device=gate_up.device)
    out8, scales = _outputs(gate_up, tokens, inner)
    block = power_of_two(inner)
    fixed = (row_in, inner, block)
    launch(_swiglu8_kernel, (tokens, 1, 1), (rows, out, out8, scales), (), fixed, warps_for(block))
    return out, (out8, scales)


def swiglu_backward8(grad: Tensor, gate_up: Tensor, factor_C: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """SwiGLU's gradient (..., 2·I), and the rows of that · `factor_C` (2·I) in FP8 with their scales."""
    (rows, row_in), (grad_TI, row_grad) = whole_rows(gate_up), whole_rows(grad)
    inner = grad.shape[-1]
    tokens = grad.numel() // inner
    out = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    out8, scales = _outputs(gate_up, tokens, 2 * inner)
    block = min(power_of_two(inner), 2048)
    fixed = (row_grad, row_in, inner, block)
    launch(_swiglu_backward8_kernel, (tokens, 1, 1), (grad_TI, rows, factor_C, out, out8, scales), (), fixed, 8)
    return out, (out8, scales)
