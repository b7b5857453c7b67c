"""The forms that a LoRA linear can take on a card, each a forward and a backward over the same tensors.

`base` is not LoRA at all: what the others are held against. `shipped` is fused_lora's autograd function. `beta 1` puts
LoRA's product first and adds the base's to it, with torch's operations; `triton` does so over Triton's kernels.
`padded` keeps W, A and B in one weight (O + R) × (I + R), so that LoRA is R more columns of the same product: the pass
before must write x into rows of I + R, the one behind the gradient into rows of O + R (not timed here). With dropout
x's gradient carries a mask, and only its forward can be so.

Shapes: T tokens, I inputs, O outputs, R the adapter's rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phi3_dist.modeling.fused_lora import lora_linear

__all__ = ["FORMS", "Form", "Prepared", "Tensors", "make", "reference"]


class Tensors(NamedTuple):
    """A linear's tensors, and the gradient of its output."""

    x: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor
    grad: Tensor


Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of x, A and B."""


class Prepared(NamedTuple):
    """`forward` gives the output and what `backward` takes."""

    forward: Callable[[], tuple[Tensor, Any]]
    backward: Callable[[Any], Grads]


class Form(NamedTuple):
    """How to set a form up for (tensors, scaling, dropout)."""

    prepare: Callable[[Tensors, float, float], Prepared]
    with_lora: bool = True

    def takes(self, dropout: float) -> bool:
        return self.with_lora or not dropout


def make(random: Callable[..., Tensor], tokens: int, outputs: int, inputs: int, rank: int) -> Tensors:
    """Random tensors of a trained adapter's magnitudes."""
    return Tensors(
        random(tokens, inputs),
        random(outputs, inputs, scale=inputs**-0.5),
        random(rank, inputs, scale=inputs**-0.5),
        random(outputs, rank, scale=0.1),
        random(tokens, outputs),
    )


def reference(t: Tensors, scaling: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and gradients of x, A, B in float32."""
    x, weight, a, b, grad = (one.float() for one in t)
    low, grad_low = scaling * (x @ a.T), scaling * (grad @ b)
    return x @ weight.T + low @ b.T, grad @ weight + grad_low @ a, grad_low.T @ x, grad.T @ low


def _base(t: Tensors, scaling: float, dropout: float) -> Prepared:
    return Prepared(lambda: (F.linear(t.x, t.weight), None), lambda _: (t.grad @ t.weight, None, None))


def _shipped(t: Tensors, scaling: float, dropout: float) -> Prepared:
    leaves = [one.detach().requires_grad_() for one in (t.x, t.a, t.b)]

    def forward() -> tuple[Tensor, Any]:
        out = lora_linear(leaves[0], t.weight, None, leaves[1], leaves[2], scaling, dropout)
        return out, out

    def backward(out: Tensor) -> Grads:
        of_x, of_a, of_b = torch.autograd.grad(out, leaves, t.grad, retain_graph=True)
        return of_x, of_a, of_b

    return Prepared(forward, backward)


def _beta_one(t: Tensors, scaling: float, dropout: float) -> Prepared:
    """With dropout by a mask of a byte, drawn directly."""

    def forward() -> tuple[Tensor, Any]:
        dropped, seen, scale = None, t.x, scaling
        if dropout:
            dropped = torch.empty(t.x.shape, dtype=torch.bool, device=t.x.device).bernoulli_(dropout)
            seen, scale = t.x.masked_fill(dropped, 0), scaling / (1 - dropout)
        low = (seen @ t.a.T).mul_(scale)
        return (low @ t.b.T).addmm_(t.x, t.weight.T), (low, dropped, scale)

    def backward(saved: Any) -> Grads:
        low, dropped, scale = saved
        grad_low = (t.grad @ t.b).mul_(scale)
        part, seen = grad_low @ t.a, t.x
        if dropped is not None:
            part, seen = part.masked_fill_(dropped, 0), t.x.masked_fill(dropped, 0)
        return part.addmm_(t.grad, t.weight), grad_low.T @ seen, t.grad.T @ low

    return Prepared(forward, backward)


def _triton(t: Tensors, scaling: float, dropout: float) -> Prepared:
    from phi3_dist.modeling.kernels import linear
    from phi3_dist.modeling.kernels.lora import drop_of

    drop = drop_of(dropout)

    def backward(low: Tensor) -> Grads:
        return linear.backward(t.grad, t.x, t.weight, t.a, t.b, low, scaling, drop, of_input=True)

    return Prepared(lambda: linear.forward(t.x, t.weight, None, t.a, t.b, scaling, drop), backward)


def _padded(t: Tensors, scaling: float, dropout: float) -> Prepared:
    from phi3_dist.modeling.kernels.lora import down, drop_of, grads_of_input, grads_of_output

    (outputs, inputs), rank, drop = t.weight.shape, t.a.shape[0], drop_of(dropout)
    pad = max(16, rank)
    joined = t.x.new_zeros(outputs + pad, inputs + pad)
    joined[:outputs, :inputs] = t.weight
    x_pad, grad_pad = t.x.new_zeros(len(t.x), inputs + pad), t.x.new_zeros(len(t.x), outputs + pad)
    x_pad[:, :inputs] = t.x
    grad_pad[:, :outputs] = t.grad
    x, grad, low = x_pad[:, :inputs], grad_pad[:, :outputs], x_pad[:, inputs : inputs + rank]

    def forward() -> tuple[Tensor, Any]:
        joined[:outputs, inputs : inputs + rank] = t.b
        joined[outputs : outputs + rank, :inputs] = t.a
        down(x, t.a, scaling, drop, low)
        return F.linear(x_pad, joined[:outputs]), None

    def backward(_: Any) -> Grads:
        grad_low, grad_b = grads_of_output(grad, t.b, low, scaling * drop.scale)
        grad_a, part = grads_of_input(x, grad_low, t.a, drop, write=drop.dropped > 0)
        if part is not None:
            return part.addmm_(grad, t.weight), grad_a, grad_b
        grad_pad[:, outputs : outputs + rank] = grad_low
        return grad_pad @ joined[:, :inputs], grad_a, grad_b

    return Prepared(forward, backward)


FORMS: dict[str, Form] = {
    "base": Form(_base, with_lora=False),
    "shipped": Form(_shipped),
    "beta 1": Form(_beta_one),
    "triton": Form(_triton),
    "padded": Form(_padded),
}
