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

from phi3_dist.modeling.kernels.passes import _power, _rows, _warps, launch

__all__ = ["add_norm8", "quantize_rows", "swiglu8", "swiglu_backward8"]

_CHUNK = 4096


@triton.jit
def _eight(values, scale):
    return tl.minimum(tl.maximum(values / scale, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit
def _scale_of(largest):
    return tl.maximum(largest, 1e-12) / 448.0


@triton.jit
def _quantize_kernel(
    x, factor, out, scales, row_x: tl.constexpr, width: tl.constexpr, FACTOR: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < width
        value = tl.load(x + row * row_x + columns, mask=inside, other=0.0).to(tl.float32)
        if FACTOR:
            value *= tl.load(factor + columns, mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.abs(value))
    scale = _scale_of(tl.max(largest))
    tl.store(scales + row, scale)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < width
        value = tl.load(x + row * row_x + columns, mask=inside, other=0.0).to(tl.float32)
        if FACTOR:
            value *= tl.load(factor + columns, mask=inside, other=0.0)
        tl.store(out + row * width + columns, _eight(value, scale), mask=inside)


@triton.jit
def _add_norm8_kernel(
    x, delta, weight, total, out, out8, rstd, scales, eps, row_x: tl.constexpr, row_delta: tl.constexpr,
    hidden: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    value = tl.load(x + row * row_x + columns, mask=inside, other=0.0)
    if ADD:
        added = tl.load(delta + row * row_delta + columns, mask=inside, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
        tl.store(total + row * hidden + columns, value, mask=inside)
    wide = value.to(tl.float32)
    root = tl.rsqrt(tl.sum(wide * wide) / hidden + eps)
    tl.store(rstd + row, root)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    normed = ((wide * root).to(value.dtype).to(tl.float32) * factor).to(value.dtype)
    tl.store(out + row * hidden + columns, normed, mask=inside)
    exact = normed.to(tl.float32)
    scale = _scale_of(tl.max(tl.abs(exact)))
    tl.store(scales + row, scale)
    tl.store(out8 + row * hidden + columns, _eight(exact, scale), mask=inside)


@triton.jit
def _swiglu8_kernel(gate_up, out, out8, scales, row_in: tl.constexpr, inner: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < inner
    gate = tl.load(gate_up + row * row_in + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_in + inner + columns, mask=inside, other=0.0).to(tl.float32)
    value = (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty)
    tl.store(out + row * inner + columns, value, mask=inside)
    exact = value.to(tl.float32)
    scale = _scale_of(tl.max(tl.abs(exact)))
    tl.store(scales + row, scale)
    tl.store(out8 + row * inner + columns, _eight(exact, scale), mask=inside)


@triton.jit
def _swiglu_grads(grad, gate_up, row_grad, row_in, row, columns, inner):
    inside = columns < inner
    wide = tl.load(grad + row * row_grad + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + row * row_in + columns, mask=inside, other=0.0)
    up = tl.load(gate_up + row * row_in + inner + columns, mask=inside, other=0.0)
    wide_gate = gate.to(tl.float32)
    sigmoid = tl.sigmoid(wide_gate)
    of_gate = (wide * up.to(tl.float32) * sigmoid * (1 + wide_gate * (1 - sigmoid))).to(gate.dtype)
    of_up = (wide * wide_gate * sigmoid).to(gate.dtype)
    return of_gate, of_up


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
        of_gate, of_up = _swiglu_grads(grad, gate_up, row_grad, row_in, row, columns, inner)
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
        of_gate, of_up = _swiglu_grads(grad, gate_up, row_grad, row_in, row, columns, inner)
        left = of_gate.to(tl.float32) * tl.load(factor + columns, mask=inside, other=0.0)
        right = of_up.to(tl.float32) * tl.load(factor + inner + columns, mask=inside, other=0.0)
        tl.store(out8 + row * 2 * inner + columns, _eight(left, scale), mask=inside)
        tl.store(out8 + row * 2 * inner + inner + columns, _eight(right, scale), mask=inside)


def _outputs(rows: Tensor, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    values = torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device=rows.device)
    return values, torch.empty(tokens, 1, dtype=torch.float32, device=rows.device)


def quantize_rows(x: Tensor, factor_C: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """E4M3 values of x (T, C), or of x · `factor_C`, and the float32 scale (T, 1) that brings them back."""
    (rows, row_x), width = _rows(x), x.shape[-1]
    tokens = x.numel() // width
    out8, scales = _outputs(x, tokens, width)
    block = min(_power(width), _CHUNK)
    tensors = (rows, scales if factor_C is None else factor_C, out8, scales)
    fixed = (row_x, width, int(factor_C is not None), block)
    launch(_quantize_kernel, (tokens, 1, 1), tensors, (), fixed, _warps(block))
    return out8, scales


def add_norm8(
    x: Tensor, delta: Tensor | None, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """`passes.add_norm`, and the norm's rows in FP8 with their scales."""
    (x_TH, row_x), hidden = _rows(x), x.shape[-1]
    tokens = x.numel() // hidden
    delta_TH, row_delta = (x_TH, row_x) if delta is None else _rows(delta)
    total = x if delta is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    out8, scales = _outputs(x, tokens, hidden)
    block = _power(hidden)
    tensors = (x_TH, delta_TH, weight_H, total, out, out8, rstd, scales)
    fixed = (row_x, row_delta, hidden, int(delta is not None), block)
    launch(_add_norm8_kernel, (tokens, 1, 1), tensors, (eps,), fixed, _warps(block))
    return total, out, rstd, (out8, scales)


def swiglu8(gate_up: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`up · silu(gate)` of (..., 2·I), and its rows in FP8 with their scales."""
    (rows, row_in), inner = _rows(gate_up), gate_up.shape[-1] // 2
    tokens = gate_up.numel() // (2 * inner)
    out = torch.empty((*gate_up.shape[:-1], inner), dtype=gate_up.dtype, device=gate_up.device)
    out8, scales = _outputs(gate_up, tokens, inner)
    block = _power(inner)
    fixed = (row_in, inner, block)
    launch(_swiglu8_kernel, (tokens, 1, 1), (rows, out, out8, scales), (), fixed, _warps(block))
    return out, (out8, scales)


def swiglu_backward8(grad: Tensor, gate_up: Tensor, factor_C: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """SwiGLU's gradient (..., 2·I), and the rows of that · `factor_C` (2·I) in FP8 with their scales."""
    (rows, row_in), (grad_TI, row_grad) = _rows(gate_up), _rows(grad)
    inner = grad.shape[-1]
    tokens = grad.numel() // inner
    out = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    out8, scales = _outputs(gate_up, tokens, 2 * inner)
    block = min(_power(inner), 2048)
    fixed = (row_grad, row_in, inner, block)
    launch(_swiglu_backward8_kernel, (tokens, 1, 1), (grad_TI, rows, factor_C, out, out8, scales), (), fixed, 8)
    return out, (out8, scales)
