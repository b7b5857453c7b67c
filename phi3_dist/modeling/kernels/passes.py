"""The passes between the products as Triton kernels: each reads its inputs once and writes its outputs once.

Imported only where triton is installed, and run on CUDA (or in Triton's interpreter, on a CPU, by the tests). Sums and
products are in float32 and each result is rounded once; block sizes are fixed, so that the same input always gives the
same bits. The residual is added in the norm that follows it, and its gradient in that norm's backward.

Shapes: T tokens, H hidden, I inner, N query heads, K key/value heads, D head size, R rotated values of a head / 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phi3_dist.modeling.kernels.launch import launch, power_of_two, warps_for, whole_rows

__all__ = [
    "add_norm",
    "add_norm_row",
    "norm_backward",
    "rotate_backward",
    "rotate_in_place",
    "swiglu",
    "swiglu_backward",
    "swiglu_row",
    "swiglu_row_gradients",
]


# --- norm -------------------------------------------------------------------------------------------------------------


@triton.jit
def add_norm_row(
    x, delta, weight, total, rstd, eps, row, columns, row_x, row_delta, hidden, ADD: tl.constexpr
):  # fmt: skip
    """The norm of one row times its weight, in float32 and not yet rounded; stores x + delta and `rstd`."""
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
    return (wide * scale).to(value.dtype).to(tl.float32) * factor


@triton.jit
def _add_norm_kernel(
    x, delta, weight, total, out, rstd, eps, row_x: tl.constexpr, row_delta: tl.constexpr, hidden: tl.constexpr,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    normed = add_norm_row(x, delta, weight, total, rstd, eps, row, columns, row_x, row_delta, hidden, ADD)
    tl.store(out + row * hidden + columns, normed.to(out.dtype.element_ty), mask=columns < hidden)


@triton.jit
def _norm_backward_kernel(
    grad, x, rstd, weight, other, out, row_grad: tl.constexpr, row_x: tl.constexpr, row_other: tl.constexpr,
    hidden: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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


def add_norm(x: Tensor, delta: Tensor | None, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + delta (x itself without one), its RMS norm with `weight_H`, and `rstd` (..., 1) in float32."""
    hidden = x.shape[-1]
    x_TH, row_x = whole_rows(x)
    delta_TH, row_delta = (x_TH, row_x) if delta is None else whole_rows(delta)
    total = x if delta is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight_H.dtype), device=x.device)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    block = power_of_two(hidden)
    launch(
        _add_norm_kernel,
        (rstd.numel(), 1, 1),
        (x_TH, delta_TH, weight_H, total, out, rstd),
        (eps,),
        (row_x, row_delta, hidden, int(delta is not None), block),
        warps_for(block),
    )
    return total, out, rstd


def norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight_H: Tensor, other: Tensor | None = None) -> Tensor:
    """The gradient of x from that of its norm, plus `other`, which is x's own (the residual's)."""
    hidden = x.shape[-1]
    (grad_TH, row_grad), (x_TH, row_x) = whole_rows(grad), whole_rows(x)
    other_TH, row_other = (grad_TH, row_grad) if other is None else whole_rows(other)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = power_of_two(hidden)
    launch(
        _norm_backward_kernel,
        (rstd.numel(), 1, 1),
        (grad_TH, x_TH, rstd, weight_H, other_TH, out),
        (),
        (row_grad, row_x, row_other, hidden, int(other is not None), block),
        warps_for(block),
    )
    return out


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
def _rotate_kernel(
    qkv, cos, sin, row_qkv: tl.constexpr, row_cos: tl.constexpr, row_sin: tl.constexpr, heads: tl.constexpr,
    size: tl.constexpr, turned: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN
    column = tl.arange(0, BR)[None, :]
    turn = column < turned
    cosine = tl.load(cos + row * row_cos + column, mask=turn, other=0.0).to(tl.float32)
    sine = tl.load(sin + row * row_sin + column, mask=turn, other=0.0).to(tl.float32)
    place = qkv + row * row_qkv + first * size
    _turn(place, place, size, size, cosine, sine, heads - first, size, turned, 1, BN, BR, BR, False)


@triton.jit
def _rotate_backward_kernel(
    query, key, value, cos, sin, out, row_query: tl.constexpr, head_query: tl.constexpr, row_key: tl.constexpr,
    head_key: tl.constexpr, row_value: tl.constexpr, head_value: tl.constexpr, row_cos: tl.constexpr,
    row_sin: tl.constexpr, heads: tl.constexpr, kv_heads: tl.constexpr, size: tl.constexpr, turned: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, COPY: tl.constexpr,
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
    block = min(power_of_two(moving), 32)
    fixed = (qkv_TX.stride(0), cos_TR.stride(0), sin_TR.stride(0), moving, size, turned, block, power_of_two(turned))
    launch(_rotate_kernel, (tokens, -(-moving // block), 1), (qkv_TX, cos_TR, sin_TR), (), fixed, 4)


def rotate_backward(grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """The gradient (T, (N + 2·K)·D) of the joined projection."""
    grads = [t if t.stride(-1) == 1 else t.contiguous() for t in (grad_query, grad_key, grad_value)]
    tokens, heads, size = grad_query.shape
    kv_heads, turned = grad_key.shape[1], cos_TR.shape[1]
    out_TX = torch.empty(tokens, (heads + 2 * kv_heads) * size, dtype=grad_query.dtype, device=grad_query.device)
    strides = tuple([step for grad in grads for step in grad.stride()[:2]])
    sizes = (cos_TR.stride(0), sin_TR.stride(0), heads, kv_heads, size, turned)
    blocks = (*map(power_of_two, (heads, kv_heads, turned, size)), int(2 * turned < size))
    launch(
        _rotate_backward_kernel,
        (tokens, 1, 1),
        (*grads, cos_TR, sin_TR, out_TX),
        (),
        (*strides, *sizes, *blocks),
        8,
    )
    return out_TX


# --- SwiGLU -----------------------------------------------------------------------------------------------------------


@triton.jit
def swiglu_row(gate_up, row, columns, row_in, inner):
    """`up · silu(gate)` of some columns of a row, in float32."""
    inside = columns < inner
    gate = tl.load(gate_up + row * row_in + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_in + inner + columns, mask=inside, other=0.0).to(tl.float32)
    return gate * tl.sigmoid(gate) * up


@triton.jit
def swiglu_row_gradients(grad, gate_up, row, columns, row_grad, row_in, inner):
    """The gradients of gate and up for some columns of a row, in the type of both."""
    inside = columns < inner
    wide = tl.load(grad + row * row_grad + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + row * row_in + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_in + inner + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    of_gate, of_up = wide * up * sigmoid * (1 + gate * (1 - sigmoid)), wide * gate * sigmoid
    return of_gate.to(gate_up.dtype.element_ty), of_up.to(gate_up.dtype.element_ty)


@triton.jit
def _swiglu_kernel(gate_up, out, row_in: tl.constexpr, inner: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = swiglu_row(gate_up, row, columns, row_in, inner)
    tl.store(out + row * inner + columns, value.to(out.dtype.element_ty), mask=columns < inner)


@triton.jit
def _swiglu_backward_kernel(
    grad, gate_up, out, row_grad: tl.constexpr, row_in: tl.constexpr, inner: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    of_gate, of_up = swiglu_row_gradients(grad, gate_up, row, columns, row_grad, row_in, inner)
    place = out + row * 2 * inner + columns
    tl.store(place, of_gate, mask=columns < inner)
    tl.store(place + inner, of_up, mask=columns < inner)


def swiglu(gate_up: Tensor) -> Tensor:
    """`up · silu(gate)` of (..., 2·I), gate first."""
    rows, row_in = whole_rows(gate_up)
    inner = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], inner), dtype=gate_up.dtype, device=gate_up.device)
    block = min(power_of_two(inner), 1024)
    grid = (gate_up.numel() // (2 * inner), -(-inner // block), 1)
    launch(_swiglu_kernel, grid, (rows, out), (), (row_in, inner, block), 4)
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of the joined projection (..., 2·I)."""
    (rows, row_in), (grad_TI, row_grad) = whole_rows(gate_up), whole_rows(grad)
    inner = grad.shape[-1]
    out = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    block = min(power_of_two(inner), 1024)
    grid = (grad.numel() // inner, -(-inner // block), 1)
    launch(_swiglu_backward_kernel, grid, (grad_TI, rows, out), (), (row_grad, row_in, inner, block), 4)
    return out
