"""LoRA's own products as Triton kernels that read each large tensor once, and dropout without a stored mask.

A LoRA linear is `out = x Wᵀ + d Bᵀ` with `d = s · (keep ∘ x) Aᵀ`. Forward: `down` makes d (x read once); d Bᵀ is
written into the output's memory, which the base's product then takes as its accumulator's start (beta 1). Backward:
`grads_of_output` reads the gradient once for both `s · grad B` and `gradᵀ d`; `grads_of_input` reads x once for A's
gradient and writes LoRA's part of x's, on which the base's product is again added.

Whether an element is kept follows from (seed, row, column) alone, by Philox of 7 rounds (which passes BigCrush; ten
are usual), 16 bits an element: backward draws the same again, and no block size changes it. Sums over programs go
through partial results in a fixed order: no atomics, the same bits each time.

Shapes: T tokens, I inputs, O outputs, R the adapter's rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from phi3_dist.modeling.kernels.launch import launch, power_of_two

__all__ = ["LEVELS", "NO_DROP", "Drop", "down", "drop_of", "grads_of_input", "grads_of_output", "masked"]

LEVELS = 65536
"""Dropout's probability is rounded to a multiple of 1 / LEVELS, and the survivors' scale is that of the rounded one."""


class Drop(NamedTuple):
    """The seed of one call's mask, and how many of LEVELS are dropped. None dropped: no mask is drawn."""

    seed: int
    dropped: int

    @property
    def scale(self) -> float:
        return LEVELS / (LEVELS - self.dropped)


NO_DROP = Drop(0, 0)


def drop_of(dropout: float) -> Drop:
    """A mask for one call, its seed drawn from torch's generator on the host: nothing waits for the device.

    Activation checkpointing restores that generator before it runs a layer again, so that it draws the same.
    """
    if dropout <= 0:
        return NO_DROP
    with _disable_current_modes():  # a number of the host, where tensors are fake too
        seed = int(torch.randint(2**61, 2**62, ()))  # always of 64 bits
    return Drop(seed, round(dropout * LEVELS))


@triton.jit
def _keep(seed, rows, first, width, dropped, BK: tl.constexpr):
    """Which of BK columns from `first` (both multiples of 8) are kept: 8 columns from each Philox call."""
    groups = rows[:, None] * tl.cdiv(width, 8) + first // 8 + tl.arange(0, BK // 8)[None, :]
    a, b, c, d = tl.randint4x(seed, groups, 7)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return tl.interleave(words & 0xFFFF, (words >> 16) & 0xFFFF) >= dropped


@triton.jit(do_not_specialize=["seed", "tokens"])
def _masked_kernel(
    x, out, seed, tokens, width: tl.constexpr, dropped: tl.constexpr, row_x: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * BK
    columns = first + tl.arange(0, BK)[None, :]
    wide, inside = rows.to(tl.int64)[:, None], (rows[:, None] < tokens) & (columns < width)
    value = tl.load(x + wide * row_x + columns, mask=inside, other=0.0)
    value = tl.where(_keep(seed, rows, first, width, dropped, BK), value, 0.0)
    tl.store(out + wide * width + columns, value, mask=inside)


@triton.jit(do_not_specialize=["seed", "tokens"])
def _down_kernel(
    x, a, out, seed, tokens, scale, width: tl.constexpr, rank: tl.constexpr, dropped: tl.constexpr,
    row_x: tl.constexpr, row_out: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    rows, ranks = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BR)[None, :]
    wide, real = rows.to(tl.int64)[:, None], rows[:, None] < tokens
    total = tl.zeros((BM, BR), tl.float32)
    for first in range(0, width, BK):
        columns = first + tl.arange(0, BK)
        inside = real & (columns[None, :] < width)
        value = tl.load(x + wide * row_x + columns[None, :], mask=inside, other=0.0)
        if dropped > 0:
            value = tl.where(_keep(seed, rows, first, width, dropped, BK), value, 0.0)
        there = (columns[:, None] < width) & (ranks < rank)
        weight = tl.load(a + ranks * width + columns[:, None], mask=there, other=0.0).to(value.dtype)
        total = tl.dot(value, weight, total, input_precision="ieee")
    total *= scale
    tl.store(out + wide * row_out + ranks, total.to(out.dtype.element_ty), mask=real & (ranks < rank))


@triton.jit(do_not_specialize=["tokens"])
def _grads_of_output_kernel(
    grad, b, down, part_down, part_b, tokens, width: tl.constexpr, rank: tl.constexpr, row_grad: tl.constexpr,
    row_down: tl.constexpr, SPAN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    which, strip = tl.program_id(0), tl.program_id(1)
    rows, ranks = which * BM + tl.arange(0, BM), tl.arange(0, BR)[None, :]
    wide, real = rows.to(tl.int64)[:, None], rows[:, None] < tokens
    low = tl.load(down + wide * row_down + ranks, mask=real & (ranks < rank), other=0.0)
    total = tl.zeros((BM, BR), tl.float32)
    for first in range(0, SPAN, BN):
        columns = strip * SPAN + first + tl.arange(0, BN)
        value = tl.load(grad + wide * row_grad + columns[None, :], mask=real & (columns[None, :] < width), other=0.0)
        there = (columns[:, None] < width) & (ranks < rank)
        weight = tl.load(b + columns[:, None] * rank + ranks, mask=there, other=0.0).to(value.dtype)
        total = tl.dot(value, weight, total, input_precision="ieee")
        of_b = tl.dot(tl.trans(value), low, input_precision="ieee")
        place = part_b + (which.to(tl.int64) * width + columns[:, None]) * rank + ranks
        tl.store(place, of_b, mask=there)
    place = part_down + (strip.to(tl.int64) * tokens + wide) * rank + ranks
    tl.store(place, total, mask=real & (ranks < rank))


@triton.jit(do_not_specialize=["seed", "tokens"])
def _grads_of_input_kernel(
    x, grad_down, a, out, part_a, seed, tokens, width: tl.constexpr, rank: tl.constexpr, dropped: tl.constexpr,
    row_x: tl.constexpr, SPAN: tl.constexpr, WRITE: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    first, strip = tl.program_id(0) * BK, tl.program_id(1)
    columns, ranks = first + tl.arange(0, BK)[None, :], tl.arange(0, BR)
    there = (ranks[:, None] < rank) & (columns < width)
    weight = tl.load(a + ranks[:, None] * width + columns, mask=there, other=0.0).to(grad_down.dtype.element_ty)
    total = tl.zeros((BR, BK), tl.float32)
    for start in range(0, SPAN, BM):
        rows = strip * SPAN + start + tl.arange(0, BM)
        wide, inside = rows.to(tl.int64)[:, None], (rows[:, None] < tokens) & (columns < width)
        real = (rows[:, None] < tokens) & (ranks[None, :] < rank)
        low = tl.load(grad_down + wide * rank + ranks[None, :], mask=real, other=0.0)
        value = tl.load(x + wide * row_x + columns, mask=inside, other=0.0)
        part = tl.dot(low, weight, input_precision="ieee")
        if dropped > 0:
            keep = _keep(seed, rows, first, width, dropped, BK)
            value = tl.where(keep, value, 0.0)
            part = tl.where(keep, part, 0.0)
        total = tl.dot(tl.trans(low), value, total, input_precision="ieee")
        if ADD:
            part += tl.load(out + wide * width + columns, mask=inside, other=0.0).to(tl.float32)
        if WRITE:
            tl.store(out + wide * width + columns, part.to(out.dtype.element_ty), mask=inside)
    place = part_a + (strip.to(tl.int64) * rank + ranks[:, None]) * width + columns
    tl.store(place, total, mask=there)


@triton.jit(do_not_specialize=["count"])
def _sum_kernel(parts, out, count, size, scale, MOST: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    # EVEN tells launch's table apart what Triton compiles for a size of 16s and for others
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(MOST):
        total += tl.load(parts + part * tl.cast(size, tl.int64) + places, mask=inside & (part < count), other=0.0)
    tl.store(out + places, (total * scale).to(out.dtype.element_ty), mask=inside)


class Blocks(NamedTuple):
    """Sizes of a kernel's tile, in rows and columns, and its warps and stages. `span` of rows or columns a program."""

    rows: int
    columns: int
    warps: int
    stages: int
    span: int = 0


DOWN = Blocks(32, 256, 4, 3)
OUTPUT = Blocks(256, 64, 8, 3, 1024)
INPUT = Blocks(32, 128, 4, 3, 256)


def _ranks(rank: int) -> int:
    return max(power_of_two(rank), 16)


def _sum(parts: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
    # the count of parts follows the tokens: as a power of two it is seldom another program
    size, count = out.numel(), parts.shape[0]
    most = power_of_two(count)
    launch(
        _sum_kernel,
        (-(-size // 512), 1, 1),
        (parts, out),
        (count, size, float(scale)),
        (most, int(size % 16 == 0), 512),
        4,
    )
    return out


def masked(x_TI: Tensor, drop: Drop) -> Tensor:
    """x with zeros where it is dropped: what the other kernels compute with."""
    out_TI, (tokens, width) = torch.empty_like(x_TI), x_TI.shape
    grid, fixed = (-(-tokens // 16), -(-width // 128), 1), (width, drop.dropped, x_TI.stride(0), 16, 128)
    launch(_masked_kernel, grid, (x_TI, out_TI), (drop.seed, tokens), fixed, 4)
    return out_TI


def down(
    x_TI: Tensor, a_RI: Tensor, scaling: float, drop: Drop, out_TR: Tensor | None = None, blocks: Blocks = DOWN
) -> Tensor:
    """`scaling · dropout(x) Aᵀ` in x's dtype, whatever A's; in `out_TR` where it is given, whose rows may lie apart."""
    (tokens, width), rank = x_TI.shape, a_RI.shape[0]
    out = torch.empty(tokens, rank, dtype=x_TI.dtype, device=x_TI.device) if out_TR is None else out_TR
    launch(
        _down_kernel,
        (-(-tokens // blocks.rows), 1, 1),
        (x_TI, a_RI, out),
        (drop.seed, tokens, float(scaling * drop.scale)),
        (width, rank, drop.dropped, x_TI.stride(0), out.stride(0), blocks.rows, blocks.columns, _ranks(rank)),
        blocks.warps,
        blocks.stages,
    )
    return out


def grads_of_output(
    grad_TO: Tensor, b_OR: Tensor, down_TR: Tensor, scale: float, blocks: Blocks = OUTPUT
) -> tuple[Tensor, Tensor]:
    """`scale · grad B` (T, R) in the gradient's dtype, and `gradᵀ down` (O, R) in B's. The gradient is read once."""
    (tokens, width), rank = grad_TO.shape, b_OR.shape[1]
    strips, spans = -(-tokens // blocks.rows), -(-width // blocks.span)
    part_down = torch.empty(spans, tokens, rank, dtype=torch.float32, device=grad_TO.device)
    part_b = torch.empty(strips, width, rank, dtype=torch.float32, device=grad_TO.device)
    strides = (grad_TO.stride(0), down_TR.stride(0))
    launch(
        _grads_of_output_kernel,
        (strips, spans, 1),
        (grad_TO, b_OR, down_TR, part_down, part_b),
        (tokens,),
        (width, rank, *strides, blocks.span, blocks.rows, blocks.columns, _ranks(rank)),
        blocks.warps,
        blocks.stages,
    )
    grad_down_TR = torch.empty(tokens, rank, dtype=grad_TO.dtype, device=grad_TO.device)
    return _sum(part_down, grad_down_TR, scale), _sum(part_b, torch.empty_like(b_OR))


def grads_of_input(
    x_TI: Tensor,
    grad_down_TR: Tensor,
    a_RI: Tensor,
    drop: Drop,
    *,
    write: bool,
    into_TI: Tensor | None = None,
    blocks: Blocks = INPUT,
) -> tuple[Tensor, Tensor | None]:
    """`grad_downᵀ dropout(x)` (R, I) in A's dtype, and, with `write`, `grad_down A` where x was kept (T, I).

    x is read once. The latter is added to `into_TI`, where it is given. The survivors' scale is the caller's to put
    into `grad_down`.
    """
    (tokens, width), rank = x_TI.shape, a_RI.shape[0]
    strips = -(-tokens // blocks.span)
    part_a = torch.empty(strips, rank, width, dtype=torch.float32, device=x_TI.device)
    out_TI = into_TI
    if write and out_TI is None:
        out_TI = torch.empty(tokens, width, dtype=x_TI.dtype, device=x_TI.device)
    modes = (blocks.span, int(write), int(into_TI is not None))
    launch(
        _grads_of_input_kernel,
        (-(-width // blocks.columns), strips, 1),
        (x_TI, grad_down_TR, a_RI, x_TI if out_TI is None else out_TI, part_a),
        (drop.seed, tokens),
        (width, rank, drop.dropped, x_TI.stride(0), *modes, blocks.rows, blocks.columns, _ranks(rank)),
        blocks.warps,
        blocks.stages,
    )
    return _sum(part_a, torch.empty_like(a_RI)), out_TI
