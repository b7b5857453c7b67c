"""The passes between a layer's products, FP8 rows and the loss: right, and timed beside what they would replace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phi3_dist.bench.kernel_table import Table, gb_s, judged, rel
from phi3_dist.modeling import fp8
from phi3_dist.modeling.fused_layers import rms_norm, rotate
from phi3_dist.modeling.loss import chunked_nll, liger_nll
from phi3_dist.modeling.passes import BY_HAND, Passes, compiled_passes

__all__ = ["compiled", "fp8_checks", "loss", "passes"]


def _norm_tensors(table: Table) -> dict[str, Tensor]:
    tokens, hidden = table.sizes.tokens, table.sizes.hidden
    names = ("x", "delta", "grad", "other")
    found = {name: table.make(tokens, hidden) for name in names}
    return {**found, "weight": 1 + table.make(hidden, scale=0.1)}


def _norm_forward(table: Table) -> dict[str, Any]:
    from phi3_dist.modeling.kernels import passes as kernels

    t, eps = _norm_tensors(table), 1e-5
    total, out, rstd = kernels.add_norm(t["x"], t["delta"], t["weight"], eps)
    sum32 = t["x"].float() + t["delta"].float()
    root = total.float().pow(2).mean(-1, keepdim=True).add(eps).rsqrt()
    want = total.float() * root * t["weight"].float()
    facts = judged({"sum": rel(total, sum32), "norm": rel(out, want), "rstd": rel(rstd, root)}, table.limit)
    by = table.times(
        {
            "by hand": lambda: rms_norm(t["x"], t["weight"], eps),
            "triton": lambda: kernels.add_norm(t["x"], None, t["weight"], eps),
            "by hand, residual": lambda: rms_norm(t["x"] + t["delta"], t["weight"], eps),
            "triton, residual": lambda: kernels.add_norm(t["x"], t["delta"], t["weight"], eps),
        }
    )
    moved = (t["x"], t["delta"], total, out)
    return {**facts, "by": by, "gb_s": {"triton, residual": gb_s(by["triton, residual"], *moved)}}


def _norm_backward(table: Table) -> dict[str, Any]:
    from phi3_dist.modeling.kernels import passes as kernels

    t = _norm_tensors(table)
    root = t["x"].float().pow(2).mean(-1, keepdim=True).add(1e-5).rsqrt()
    arguments = (t["grad"], t["x"], root, t["weight"])
    got = kernels.norm_backward(*arguments, t["other"])
    want = BY_HAND.norm_backward(*(a.float() for a in arguments)) + t["other"].float()
    by = table.times(
        {
            "by hand": lambda: BY_HAND.norm_backward(*arguments),
            "triton": lambda: kernels.norm_backward(*arguments),
            "by hand, residual": lambda: BY_HAND.norm_backward(*arguments) + t["other"],
            "triton, residual": lambda: kernels.norm_backward(*arguments, t["other"]),
        }
    )
    moved = (t["grad"], t["x"], t["other"], got)
    facts = judged({"grad": rel(got, want)}, table.limit)
    return {**facts, "by": by, "gb_s": {"triton, residual": gb_s(by["triton, residual"], *moved)}}


def _liger_norm(table: Table) -> dict[str, Any]:
    """Liger's add and norm in one, whose backward gives the weight's gradient too unless the weight is frozen."""
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    t = _norm_tensors(table)
    x, delta = t["x"].requires_grad_(), t["delta"].requires_grad_()
    arguments = (x, delta, t["weight"], 1e-5, 0.0, "llama", False)
    out, total = LigerFusedAddRMSNormFunction.apply(*arguments)
    by = table.times(
        {
            "liger forward": lambda: LigerFusedAddRMSNormFunction.apply(*arguments),
            "liger both ways": lambda: torch.autograd.grad(
                LigerFusedAddRMSNormFunction.apply(*arguments), (x, delta), (t["grad"], t["other"])
            ),
        }
    )
    return {"by": by, "outputs": [list(out.shape), list(total.shape)]}


def _rotary(table: Table) -> dict[str, Any]:
    from phi3_dist.modeling.kernels import passes as kernels

    s = table.sizes
    cos, sin = table.make(s.tokens, s.size // 2), table.make(s.tokens, s.size // 2)
    cos2, sin2 = (torch.cat((t, t), dim=1) for t in (cos, sin))
    qkv = table.make(s.tokens, 3 * s.heads * s.size)
    want = rotate(qkv.float().clone(), cos2.float(), sin2.float(), s.heads, s.heads)
    turned = qkv.clone()
    kernels.rotate_in_place(turned, cos, sin, s.heads, s.heads)
    shape = (s.tokens, s.heads, s.size)
    grads = (table.make(*shape), table.make(*shape), table.make(*shape))
    back = kernels.rotate_backward(*grads, cos, sin)
    want_back = BY_HAND.rotate_backward(grads[0].float(), grads[1].float(), grads[2].float(), cos.float(), sin.float())
    errors = {"forward": rel(turned, torch.cat([t.flatten(1) for t in want], 1)), "backward": rel(back, want_back)}
    by = table.times(
        {
            "by hand": lambda: rotate(qkv, cos2, sin2, s.heads, s.heads),
            "triton": lambda: kernels.rotate_in_place(turned, cos, sin, s.heads, s.heads),
            "by hand, backward": lambda: BY_HAND.rotate_backward(grads[0], grads[1], grads[2], cos, sin),
            "triton, backward": lambda: kernels.rotate_backward(*grads, cos, sin),
        }
    )
    rates = {
        "triton": gb_s(by["triton"], *grads[:2], *grads[:2]),
        "triton, backward": gb_s(by["triton, backward"], *grads, back),
    }
    return {**judged(errors, table.limit), "by": by, "gb_s": rates}


def _swiglu(table: Table) -> dict[str, Any]:
    from phi3_dist.modeling.kernels import passes as kernels

    s = table.sizes
    joined, grad = table.make(s.tokens, 2 * s.inner), table.make(s.tokens, s.inner)
    out, back = kernels.swiglu(joined), kernels.swiglu_backward(grad, joined)
    want = BY_HAND.swiglu(joined.float()), BY_HAND.swiglu_backward(grad.float(), joined.float())
    by = table.times(
        {
            "by hand": lambda: BY_HAND.swiglu(joined),
            "triton": lambda: kernels.swiglu(joined),
            "by hand, backward": lambda: BY_HAND.swiglu_backward(grad, joined),
            "triton, backward": lambda: kernels.swiglu_backward(grad, joined),
        }
    )
    rates = {
        "triton": gb_s(by["triton"], joined, out),
        "triton, backward": gb_s(by["triton, backward"], grad, joined, back),
    }
    facts = judged({"forward": rel(out, want[0]), "backward": rel(back, want[1])}, table.limit)
    return {**facts, "by": by, "gb_s": rates}


def passes(table: Table) -> None:
    """Norm, rotary embedding and SwiGLU."""
    for name, facts in (
        ("norm forward", _norm_forward),
        ("norm backward", _norm_backward),
        ("rotary", _rotary),
        ("swiglu", _swiglu),
        ("liger's norm", _liger_norm),
    ):
        table.check(name, lambda facts=facts: facts(table))  # type: ignore[misc]


def compiled(table: Table) -> None:
    """The passes compiled by torch, beside those by hand."""

    def facts() -> dict[str, Any]:
        made: Passes = compiled_passes()
        s, t = table.sizes, _norm_tensors(table)
        root = t["x"].float().pow(2).mean(-1, keepdim=True).add(1e-5).rsqrt()
        joined, grad = table.make(s.tokens, 2 * s.inner), table.make(s.tokens, s.inner)
        heads = [table.make(s.tokens, s.heads, s.size) for _ in range(3)]
        tables = [table.make(s.tokens, s.size // 2) for _ in range(2)]
        return {
            "by": table.times(
                {
                    "norm, backward": lambda: made.norm_backward(t["grad"], t["x"], root, t["weight"]),
                    "swiglu": lambda: made.swiglu(joined),
                    "swiglu, backward": lambda: made.swiglu_backward(grad, joined),
                    "rotary, backward": lambda: made.rotate_backward(*heads, *tables),
                }
            )
        }

    table.check("torch.compile", facts)


# --- FP8 --------------------------------------------------------------------------------------------------------------


def _fp8_rates(table: Table) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (outputs, inputs) in table.sizes.linears.items():
        x8, x_scale = fp8.quantize_rows(table.make(table.sizes.tokens, inputs))
        w8, w_scale = fp8.quantize_rows(table.make(outputs, inputs))
        g8, g_scale = fp8.quantize_rows(table.make(table.sizes.tokens, outputs))
        turned, ones = w8.t().contiguous().t(), torch.ones(1, inputs, device=table.device)
        flops = 2.0 * table.sizes.tokens * outputs * inputs
        for fast in (False, True):
            options = {"out_dtype": torch.bfloat16, "use_fast_accum": fast}
            by = table.times(
                {
                    "forward": lambda o=options: torch._scaled_mm(x8, w8.t(), x_scale, w_scale.t(), **o),  # type: ignore[misc]  # noqa: B023
                    "backward": lambda o=options: torch._scaled_mm(g8, turned, g_scale, ones, **o),  # type: ignore[misc]  # noqa: B023
                }
            )
            for way, ms in by.items():
                label = f"{name} {way}{' fast' if fast else ''}"
                found[label] = round(flops / ms / 1e9, 1) if isinstance(ms, float) else ms
        found[f"{name} turn ms"] = table.ms(lambda: w8.t().contiguous())  # noqa: B023
    return {"tflops": found}


def _fp8_rows(table: Table) -> dict[str, Any]:
    from phi3_dist.modeling.kernels import fp8 as kernels

    s, t = table.sizes, _norm_tensors(table)
    joined, grad = table.make(s.tokens, 2 * s.inner), table.make(s.tokens, s.inner)
    factor = 0.5 + torch.rand(2 * s.inner, device=table.device)
    norm, swiglu = kernels.add_norm8(t["x"], t["delta"], t["weight"], 1e-5), kernels.swiglu8(joined)
    back = kernels.swiglu_backward8(grad, joined, factor)
    parts = {
        "rows": (kernels.quantize_rows(joined, factor), joined.float() * factor),
        "norm": (norm[3], norm[1].float()),
        "swiglu": (swiglu[1], swiglu[0].float()),
        "swiglu backward": (back[1], back[0].float() * factor),
    }
    errors = {name: rel(values.float() * scale, want) for name, ((values, scale), want) in parts.items()}
    errors["by hand"] = rel(torch.mul(*(p.float() for p in fp8.quantize_rows(joined))), joined)
    by = table.times(
        {
            "by hand, (T, 2 I)": lambda: fp8.quantize_rows(joined.float() * factor),
            "rows (T, 2 I)": lambda: kernels.quantize_rows(joined, factor),
            "rows (T, H)": lambda: kernels.quantize_rows(t["x"]),
            "norm, residual": lambda: kernels.add_norm8(t["x"], t["delta"], t["weight"], 1e-5),
            "swiglu": lambda: kernels.swiglu8(joined),
            "swiglu backward": lambda: kernels.swiglu_backward8(grad, joined, factor),
        }
    )
    return {**judged(errors, 0.08 if table.toy else 0.032), "by": by}


def fp8_checks(table: Table) -> None:
    """FP8 rows in the pass before, and the products' rates."""
    table.check("fp8 rows", lambda: _fp8_rows(table))
    if not table.toy:
        table.check("fp8 rates", lambda: _fp8_rates(table))


# --- loss -------------------------------------------------------------------------------------------------------------


def loss(table: Table) -> None:
    """Head and cross-entropy, forward and backward, by rows of a chunk."""
    s = table.sizes
    hidden = table.make(s.tokens // 2, s.hidden).requires_grad_()
    weight = table.make(s.vocab, s.hidden, scale=s.hidden**-0.5)
    target = torch.randint(0, s.vocab, (s.tokens // 2,), device=table.device)

    def both(call: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(call(hidden, weight, None, target), hidden)

    ways: dict[str, Callable[[], Any]] = {
        f"chunks of {rows}": both(partial(chunked_nll, chunk_rows=rows))
        for rows in ((8,) if table.toy else (256, 512, 1024, 2048))
    }
    if not table.toy:
        ways["liger"] = both(liger_nll)
    table.check(f"loss, {s.tokens // 2} rows", lambda: {"by": table.times(ways)})
