"""Matrix rates at the model's own sizes, the head with its loss, and what fused AdamW does with a bad step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phi3_dist.bench.card.checks import Group, Skip, relative_error
from phi3_dist.modeling.loss import chunked_nll, liger_nll

__all__ = ["products"]

HIDDEN, INNER, VOCAB = 3072, 8192, 32064


def _sizes(group: Group) -> list[tuple[int, int]]:
    """Inputs and outputs of the four linears of a layer."""
    hidden, inner = (96, 128) if group.cpu else (HIDDEN, INNER)
    return [(hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)]


def _rates(group: Group) -> dict[str, Any]:
    found = {}
    for tokens in (64,) if group.cpu else (1024, 2048, 4096, 4093, 8192):
        ms = flops = 0.0
        for inputs, outputs in _sizes(group):
            x, w, grad = (group.random(*s) for s in ((tokens, inputs), (outputs, inputs), (tokens, outputs)))
            ms += group.milliseconds(partial(F.linear, x, w)) + group.milliseconds(partial(torch.mm, grad, w))
            flops += 4 * tokens * inputs * outputs
        found[tokens] = round(flops / ms / 1e9, 1)
    return {"tflops_by_tokens": found}


def _head(group: Group) -> dict[str, Any]:
    hidden, rows, vocab = (96, 64, 320) if group.cpu else (HIDDEN, 4096, VOCAB)
    weight = group.random(vocab, hidden) * 0.02
    target = torch.randint(0, vocab, (rows,), device=group.device)

    def both(loss: Any, *more: Any) -> Tensor:
        states = group.random(rows, hidden, grad=True)
        (loss(states, weight, None, target, *more) / rows).backward()
        return states

    found: dict[str, Any] = {
        f"ms_chunk_{size}": group.milliseconds(partial(both, chunked_nll, size), runs=7)
        for size in (512, 1024, 2048, 4096)
    }
    if not group.cpu:
        try:
            found["ms_liger"] = group.milliseconds(lambda: both(liger_nll), runs=7)
        except ImportError as missing:
            found["liger"] = str(missing)
    states = group.random(rows, hidden, grad=True)
    nll = chunked_nll(states, weight, None, target)
    nll.backward()  # type: ignore[no-untyped-call]
    exact = states.detach().float().requires_grad_()
    want = F.cross_entropy(exact @ weight.float().T, target, reduction="sum")
    want.backward()  # type: ignore[no-untyped-call]
    assert states.grad is not None
    assert exact.grad is not None
    error = relative_error(states.grad, exact.grad)
    return {"ok": error < 2e-2, "error_loss": abs(float(nll) / float(want) - 1), "error_grad": error, **found}


def _bad_step(group: Group) -> dict[str, Any]:
    """AdamW of one kernel leaves out a step whose norm is not finite, and a count on the host is refused or moved."""
    if group.cpu:
        raise Skip("needs CUDA")
    weight = torch.nn.Parameter(torch.randn(100, device=group.device))
    optimizer: Any = torch.optim.AdamW([weight], lr=0.1, fused=True)
    weight.grad = torch.full_like(weight, float("nan"))
    norm = torch.nn.utils.clip_grad_norm_([weight], 1.0)
    optimizer.found_inf = torch.isfinite(norm).logical_not().float()
    before = weight.detach().clone()
    optimizer.step()
    skipped = torch.equal(before, weight)
    weight.grad = torch.ones_like(weight)
    optimizer.found_inf = torch.zeros((), device=group.device)
    optimizer.step()
    moved, step = not torch.equal(before, weight), float(optimizer.state[weight]["step"])
    return {"ok": skipped and moved and step == 1.0}


def products(group: Group) -> None:
    group.check("matrix rate", lambda: _rates(group))
    group.check("head and cross-entropy", lambda: _head(group))
    group.check("fused AdamW leaves out a bad step", lambda: _bad_step(group))
