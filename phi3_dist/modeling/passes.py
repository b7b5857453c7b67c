"""The passes over memory between a layer's matrix products: written by hand, compiled by torch, or Triton's kernels.

Those by hand write in place where they may. Those to be compiled are pure functions of plain tensors: no module, hook
or shard is ever traced, so that every strategy may use them. Tokens are marked as the one size that changes: a function
is compiled once for a model, whatever the packs are.

Compiled are those that gain by it on a CPU: backward of the norm and of the rotary embedding, SwiGLU both ways. Of a
layer of 1,024 tokens on one core in float32 they take, in ms by hand and compiled (medians of 25 in turns), 7.7 and 4.2
at 576 wide and 1,536 inside, 14.9 and 9.9 at 1,152, 93 and 77 at 3,072; in bf16 8.4 and 3.9, 17.7 and 8.3, 65 and 47.
The four are compiled in 13 s, or in 3 from torch's cache. Not compiled: the norm forward, which gains nothing; rotation
forward, which would lose its place in the projection's memory (10 ms became 19); the loss's passes over a chunk of
logits (6.3 ms became 7.8). A whole decoder layer compiled took 1.74 times the processor time and 51 s to compile, and
was compiled anew for each of four more packs, since it holds document lengths.

Triton's kernels (kernels/passes.py) are for CUDA; they also add the residual in the norm behind it.

Shapes: T tokens, H hidden, I inner, N query heads, K key/value heads, D head size, R rotated values of a head / 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BY_HAND", "Passes", "compiled_passes", "kernel_passes"]

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Passes:
    """One function for each pass; arguments as in those by hand below.

    `with_residual`: decoder layers give the norm what is to be added first, and the norm's backward x's own gradient.
    `norm8`, `swiglu8` and `swiglu_backward8` give FP8 rows beside the result; only Triton's kernels do.
    """

    norm: Callable[..., tuple[Tensor, Tensor, Tensor]]
    norm_backward: Function
    swiglu: Function
    swiglu_backward: Function
    rotate: Callable[..., None]
    rotate_backward: Function
    with_residual: bool = False
    norm8: Callable[..., Any] | None = None
    swiglu8: Callable[..., Any] | None = None
    swiglu_backward8: Callable[..., Any] | None = None


# --- by hand ----------------------------------------------------------------------------------------------------------


def _norm(x: Tensor, delta: Tensor | None, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + delta (x itself without one), its norm and `rstd` (..., 1) in float32.

    transformers' order of roundings: normalised in float32, back to the input's type, then the weight.
    """
    total = x if delta is None else x + delta
    x32 = total.float()
    rstd = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed: Tensor = (x32 * rstd).to(x.dtype)
    return total, normed.mul_(weight_H) if weight_H.dtype == x.dtype else weight_H * normed, rstd


def _norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight_H: Tensor, other: Tensor | None = None) -> Tensor:
    """The gradient of x (..., H) from that of its norm and `rstd` (..., 1) in float32, plus `other`, x's own."""
    grad32, x32 = (grad * weight_H).float(), x.float()
    along = (grad32 * x32).sum(-1, keepdim=True)
    along.mul_(rstd**3).div_(-x.shape[-1])
    out = grad32.mul_(rstd).addcmul_(x32, along).to(x.dtype)
    return out if other is None else out.add_(other)


def _swiglu(gate_up: Tensor) -> Tensor:
    """`up · silu(gate)` of (..., 2·I), gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty_like(gate_up)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    torch.ops.aten.silu.out(gate, out=grad_up)
    grad_up.mul_(grad)
    return out


def _rotate(qkv_TX: Tensor, cos_TR: Tensor, sin_TR: Tensor, heads: int, kv_heads: int) -> None:
    """Turn the query and key heads of the joined projection where they lie."""
    cos, sin, turned = cos_TR[:, None], sin_TR[:, None], cos_TR.shape[-1]
    moving = qkv_TX.view(qkv_TX.shape[0], heads + 2 * kv_heads, -1)[:, : heads + kv_heads]
    left, right = moving[..., :turned], moving[..., turned : 2 * turned]
    new_left = (left * cos).addcmul_(right, sin, value=-1)
    right.mul_(cos).addcmul_(left, sin)
    left.copy_(new_left)


def _rotate_backward(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, cos_TR: Tensor, sin_TR: Tensor
) -> Tensor:
    """The gradient (T, (N + 2·K)·D) of the joined projection."""
    tokens, heads, size = grad_query.shape
    kv_heads, turned = grad_key.shape[1], cos_TR.shape[-1]
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    out_TXD = grad_query.new_empty(tokens, heads + 2 * kv_heads, size)
    parts = ((grad_query, out_TXD[:, :heads]), (grad_key, out_TXD[:, heads : heads + kv_heads]))
    for grad, out in parts:
        left, right = grad[..., :turned], grad[..., turned : 2 * turned]
        torch.mul(left, cos, out=out[..., :turned]).addcmul_(right, sin)
        torch.mul(right, cos, out=out[..., turned : 2 * turned]).addcmul_(left, sin, value=-1)
        out[..., 2 * turned :] = grad[..., 2 * turned :]
    out_TXD[:, heads + kv_heads :] = grad_value
    return out_TXD.view(tokens, -1)


BY_HAND = Passes(_norm, _norm_backward, _swiglu, _swiglu_backward, _rotate, _rotate_backward)


# --- to be compiled ---------------------------------------------------------------------------------------------------


def _pure_norm_backward(grad_TH: Tensor, x_TH: Tensor, rstd_T1: Tensor, weight_H: Tensor) -> Tensor:
    grad32_TH, x32_TH = (grad_TH * weight_H).float(), x_TH.float()
    along_T1 = (grad32_TH * x32_TH).sum(-1, keepdim=True) * rstd_T1**3 / -x_TH.shape[-1]
    return (grad32_TH * rstd_T1 + x32_TH * along_T1).to(x_TH.dtype)


def _pure_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _pure_swiglu_backward(grad_TI: Tensor, gate_up: Tensor, out_gate_TI: Tensor, out_up_TI: Tensor) -> None:
    """Into both halves of the gradient: joined in here, 8,192 wide and in bf16, it took twice the time."""
    (gate, up), wide = gate_up.float().chunk(2, dim=-1), grad_TI.float()
    sigmoid = torch.sigmoid(gate)
    out_gate_TI.copy_(wide * up * (sigmoid * (1 + gate * (1 - sigmoid))))
    out_up_TI.copy_(wide * gate * sigmoid)


def _pure_rotate_backward(
    grad_TND: Tensor, grad_TKD: Tensor, value_TKD: Tensor, cos_TR: Tensor, sin_TR: Tensor
) -> Tensor:
    cos, sin, turned = cos_TR[:, None], sin_TR[:, None], cos_TR.shape[-1]
    parts = []
    for grad in (grad_TND, grad_TKD):
        left, right, rest = grad[..., :turned], grad[..., turned : 2 * turned], grad[..., 2 * turned :]
        parts.append(torch.cat((left * cos + right * sin, right * cos - left * sin, rest), dim=-1))
    return torch.cat((*parts, value_TKD), dim=1).flatten(1)


def _rows(tensor: Tensor) -> Tensor:
    """A plain tensor (T, C) in one layout, since another layout would be another program."""
    return tensor.detach().reshape(-1, tensor.shape[-1]).contiguous()


def _any_tokens(*tensors: Tensor) -> tuple[Tensor, ...]:
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 0)
    return tensors


def compiled_passes() -> Passes:
    """Each pass compiled at its first call, into torch's cache, where the next process finds it.

    A call with one token goes by hand, since a size of 1 is another program. Compiled in this process alone: torch's
    pool of compiling processes would stay.
    """
    pure = (_pure_norm_backward, _pure_swiglu, _pure_swiglu_backward, _pure_rotate_backward)
    compiled: list[Any] = [torch.compile(function, options={"compile_threads": 1}) for function in pure]
    run_norm, run_swiglu, run_swiglu_backward, run_rotate = compiled

    def norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight_H: Tensor, other: Tensor | None = None) -> Tensor:
        if rstd.numel() < 2:
            return BY_HAND.norm_backward(grad, x, rstd, weight_H, other)
        out_TH: Tensor = run_norm(*_any_tokens(*map(_rows, (grad, x, rstd))), weight_H.detach())
        return out_TH.view(x.shape) if other is None else out_TH.view(x.shape).add_(other)

    def swiglu(gate_up: Tensor) -> Tensor:
        rows = _rows(gate_up)
        if rows.shape[0] < 2:
            return BY_HAND.swiglu(gate_up)
        out_TI: Tensor = run_swiglu(*_any_tokens(rows))
        return out_TI.view(*gate_up.shape[:-1], -1)

    def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
        rows = _rows(gate_up)
        if rows.shape[0] < 2:
            return BY_HAND.swiglu_backward(grad, gate_up)
        out = torch.empty_like(rows)
        run_swiglu_backward(*_any_tokens(_rows(grad), rows, *out.chunk(2, dim=-1)))
        return out.view(gate_up.shape)

    def rotate_backward(*tensors: Tensor) -> Tensor:
        if tensors[0].shape[0] < 2:
            return BY_HAND.rotate_backward(*tensors)
        out_TX: Tensor = run_rotate(*_any_tokens(*(t.detach().contiguous() for t in tensors)))
        return out_TX

    return Passes(_norm, norm_backward, swiglu, swiglu_backward, _rotate, rotate_backward)


def kernel_passes() -> Passes:
    """Triton's kernels, which need CUDA (or Triton's interpreter)."""
    from phi3_dist.modeling.kernels import fp8, passes

    return Passes(
        norm=passes.add_norm,
        norm_backward=passes.norm_backward,
        swiglu=passes.swiglu,
        swiglu_backward=passes.swiglu_backward,
        rotate=passes.rotate_in_place,
        rotate_backward=passes.rotate_backward,
        with_residual=True,
        norm8=fp8.add_norm8,
        swiglu8=fp8.swiglu8,
        swiglu_backward8=fp8.swiglu_backward8,
    )
