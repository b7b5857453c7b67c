"""The passes between the products as Triton kernels: each reads its inputs once and writes its outputs once.

Imported only where triton is installed, and run on CUDA (or in Triton's interpreter, on a CPU, by the tests). Sums and
products are in float32 and each result is rounded once; block sizes are fixed, so that the same input always gives the
same bits. The residual is added in the norm that follows it, and its gradient in that norm's backward.

Shapes: T tokens, H hidden, I inner, N query heads, K key/value heads, D head size, R rotated values of a head / 2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    "add_norm",
    "launch",
    "norm_backward",
    "rotate_backward",
    "rotate_in_place",
    "swiglu",
    "swiglu_backward",
]


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a kernel, unless its first tensor is a fake one: then there is nothing to compute with."""
    if not isinstance(arguments[0], FakeTensor):
        kernel[grid](*arguments, **options)


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


# --- norm -------------------------------------------------------------------------------------------------------------


@triton.jit
def _add_norm_kernel(
    x, delta, weight, total, out, rstd, row_x, row_delta, row_out, eps, hidden, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    value = tl.load(x + row * row_x + columns, mask=inside, other=0.0)
    if ADD:
        added = tl.load(delta + row * row_delta + columns, mask=inside, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
        tl.store(total + row * hidden + columns, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / hidden + eps)
    tl.store(rstd + row, scale)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    # transformers' order of roundings: the normalised value in the input's type, then the weight
    normed = (wide * scale).to(value.dtype).to(tl.float32) * factor
    tl.store(out + row * row_out + columns, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward_kernel(
    grad, x, rstd, weight, other, out, row_grad, row_x, row_other, hidden, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    wide = tl.load(grad + row * row_grad + columns, mask=inside, other=0.0).to(tl.float32) * factor
    value = tl.load(x + row * row_x + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(rstd + row)
    normed = value * scale
    result = (wide - normed * (tl.sum(wide * normed) / hidden)) * scale
    if ADD:
        result += tl.load(other + row * row_other + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * hidden + columns, result.to(out.dtype.element_ty), mask=inside)


def _rows(tensor: Tensor) -> Tensor:
    """(T, C) with whole rows; rows may lie apart."""
    flat = tensor.detach().reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def add_norm(x: Tensor, delta: Tensor | None, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + delta (x itself without one), its RMS norm with `weight_H`, and `rstd` (..., 1) in float32."""
    x_TH = _rows(x)
    tokens, hidden = x_TH.shape
    delta_TH = x_TH if delta is None else _rows(delta)
    total_TH = x_TH if delta is None else torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    out_TH = torch.empty(tokens, hidden, dtype=torch.promote_types(x.dtype, weight_H.dtype), device=x.device)
    rstd_T = torch.empty(tokens, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(hidden)
    launch(
        _add_norm_kernel,
        (tokens,),
        *(x_TH, delta_TH, weight_H, total_TH, out_TH, rstd_T),
        *(x_TH.stride(0), delta_TH.stride(0), hidden, eps, hidden),
        ADD=delta is not None,
        BLOCK=block,
        num_warps=_warps(block),
    )
    total = x if delta is None else total_TH.view(x.shape)
    return total, out_TH.view(x.shape), rstd_T.view(*x.shape[:-1], 1)


def norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight_H: Tensor, other: Tensor | None = None) -> Tensor:
    """The gradient of x from that of its norm, plus `other`, which is x's own (the residual's)."""
    grad_TH, x_TH = _rows(grad), _rows(x)
    other_TH = grad_TH if other is None else _rows(other)
    tokens, hidden = x_TH.shape
    out_TH = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(hidden)
    launch(
        _norm_backward_kernel,
        (tokens,),
        *(grad_TH, x_TH, rstd, weight_H, other_TH, out_TH),
        *(grad_TH.stride(0), x_TH.stride(0), other_TH.stride(0), hidden),
        ADD=other is not None,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return out_TH.view(x.shape)


# --- rotary embedding -------------------------------------------------------------------------------------------------


@triton.jit
def _turn(
    source, target, from_head, to_head, cos, sin, heads, size, turned, SIGN: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """The heads of one token turned; with COPY the values of a head that are not turned are written too."""
    head, column = tl.arange(0, BN)[:, None], tl.arange(0, BR)[None, :]
    inside = (head < heads) & (column < turned)
    left = tl.load(source + head * from_head + column, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(source + head * from_head + turned + column, mask=inside, other=0.0).to(tl.float32)
    kind = target.dtype.element_ty
    tl.store(target + head * to_head + column, (left * cos - SIGN * right * sin).to(kind), mask=inside)
    tl.store(target + head * to_head + turned + column, (right * cos + SIGN * left * sin).to(kind), mask=inside)
    if COPY:
        every = tl.arange(0, BD)[None, :]
        rest = (head < heads) & (every >= 2 * turned) & (every < size)
        tl.store(target + head * to_head + every, tl.load(source + head * from_head + every, mask=rest), mask=rest)


@triton.jit
def _rotate_kernel(qkv, cos, sin, row_qkv, row_cos, row_sin, heads, size, turned, BN: tl.constexpr, BR: tl.constexpr):
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN
    column = tl.arange(0, BR)[None, :]
    turn = column < turned
    cosine = tl.load(cos + row * row_cos + column, mask=turn, other=0.0).to(tl.float32)
    sine = tl.load(sin + row * row_sin + column, mask=turn, other=0.0).to(tl.float32)
    place = qkv + row * row_qkv + first * size
    _turn(place, place, size, size, cosine, sine, heads - first, size, turned, 1, BN, BR, BR, False)


@triton.jit
def _rotate_backward_kernel(
    query, key, value, cos, sin, out, row_query, head_query, row_key, head_key, row_value, head_value, row_cos, row_sin,
    heads, kv_heads, size, turned, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    COPY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BR)[None, :]
    turn = column < turned
    cosine = tl.load(cos + row * row_cos + column, mask=turn, other=0.0).to(tl.float32)
    sine = tl.load(sin + row * row_sin + column, mask=turn, other=0.0).to(tl.float32)
    place = out + row * (heads + 2 * kv_heads) * size
    _turn(query + row * row_query, place, head_query, size, cosine, sine, heads, size, turned, -1, BN, BR, BD, COPY)
    place += heads * size
    _turn(key + row * row_key, place, head_key, size, cosine, sine, kv_heads, size, turned, -1, BK, BR, BD, COPY)
    place += kv_heads * size
    head, every = tl.arange(0, BK)[:, None], tl.arange(0, BD)[None, :]
    inside = (head < kv_heads) & (every < size)
    tl.store(
        place + head * size + every,
        tl.load(value + row * row_value + head * head_value + every, mask=inside),
        mask=inside,
    )


def rotate_in_place(qkv_TX: Tensor, cos_TR: Tensor, sin_TR: Tensor, heads: int, kv_heads: int) -> None:
    """Turn the query and key heads of the joined projection where they lie."""
    tokens, size = qkv_TX.shape[0], qkv_TX.shape[1] // (heads + 2 * kv_heads)
    turned, moving = cos_TR.shape[1], heads + kv_heads
    block = min(triton.next_power_of_2(moving), 32)
    launch(
        _rotate_kernel,
        (tokens, triton.cdiv(moving, block)),
        *(qkv_TX, cos_TR, sin_TR, qkv_TX.stride(0), cos_TR.stride(0), sin_TR.stride(0), moving, size, turned),
        BN=block,
        BR=triton.next_power_of_2(turned),
        num_warps=4,
    )


def rotate_backward(grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """The gradient (T, (N + 2·K)·D) of the joined projection."""
    grads = [t if t.stride(-1) == 1 else t.contiguous() for t in (grad_query, grad_key, grad_value)]
    tokens, heads, size = grad_query.shape
    kv_heads, turned = grad_key.shape[1], cos_TR.shape[1]
    out_TX = torch.empty(tokens, (heads + 2 * kv_heads) * size, dtype=grad_query.dtype, device=grad_query.device)
    launch(
        _rotate_backward_kernel,
        (tokens,),
        *(*grads, cos_TR, sin_TR, out_TX),
        *(step for grad in grads for step in grad.stride()[:2]),
        *(cos_TR.stride(0), sin_TR.stride(0), heads, kv_heads, size, turned),
        BN=triton.next_power_of_2(heads),
        BK=triton.next_power_of_2(kv_heads),
        BR=triton.next_power_of_2(turned),
        BD=triton.next_power_of_2(size),
        COPY=2 * turned < size,
        num_warps=8,
    )
    return out_TX


# --- SwiGLU -----------------------------------------------------------------------------------------------------------


@triton.jit
def _swiglu_kernel(gate_up, out, row_in, row_out, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < inner
    gate = tl.load(gate_up + row * row_in + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_in + inner + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * row_out + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(grad, gate_up, out, row_grad, row_in, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < inner
    wide = tl.load(grad + row * row_grad + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + row * row_in + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_in + inner + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    of_gate, of_up = wide * up * sigmoid * (1 + gate * (1 - sigmoid)), wide * gate * sigmoid
    place = out + row * 2 * inner + columns
    tl.store(place, of_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(place + inner, of_up.to(out.dtype.element_ty), mask=inside)


def swiglu(gate_up: Tensor) -> Tensor:
    """`up · silu(gate)` of (..., 2·I), gate first."""
    rows = _rows(gate_up)
    tokens, inner = rows.shape[0], rows.shape[1] // 2
    out_TI = torch.empty(tokens, inner, dtype=rows.dtype, device=rows.device)
    block = min(triton.next_power_of_2(inner), 1024)
    grid = (tokens, triton.cdiv(inner, block))
    launch(_swiglu_kernel, grid, rows, out_TI, rows.stride(0), inner, inner, BLOCK=block, num_warps=4)
    return out_TI.view(*gate_up.shape[:-1], inner)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of the joined projection (..., 2·I)."""
    rows, grad_TI = _rows(gate_up), _rows(grad)
    tokens, inner = grad_TI.shape
    out = torch.empty(tokens, 2 * inner, dtype=rows.dtype, device=rows.device)
    block = min(triton.next_power_of_2(inner), 1024)
    grid = (tokens, triton.cdiv(inner, block))
    strides = (grad_TI.stride(0), rows.stride(0), inner)
    launch(_swiglu_backward_kernel, grid, grad_TI, rows, out, *strides, BLOCK=block, num_warps=4)
    return out.view(gate_up.shape)
