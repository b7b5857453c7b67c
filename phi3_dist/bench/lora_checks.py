"""LoRA's kernels, and the whole linear in its forms at a layer's four shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F

from phi3_dist.bench import lora_forms
from phi3_dist.bench.kernel_table import DROPOUT, RANK, SCALING, Table, failures, gb_s, judged, rel

__all__ = ["lora", "sweep"]


def _lora_tensors(table: Table, name: str) -> lora_forms.Tensors:
    outputs, inputs = table.sizes.linears[name]
    return lora_forms.make(table.make, table.sizes.tokens, outputs, inputs, RANK)


def _lora_kernels(table: Table, name: str, dropout: float) -> dict[str, Any]:
    from phi3_dist.modeling.kernels import lora as kernels

    t = _lora_tensors(table, name)
    drop = kernels.drop_of(dropout)
    seen = kernels.masked(t.x, drop) if dropout else t.x
    keep = torch.ones_like(t.x, dtype=torch.bool) if not dropout else (seen != 0) | (t.x == 0)
    low = kernels.down(t.x, t.a, SCALING, drop)
    want_low = SCALING * drop.scale * (seen.float() @ t.a.float().T)
    grad_low, grad_b = kernels.grads_of_output(t.grad, t.b, low, SCALING * drop.scale)
    grad_a, part = kernels.grads_of_input(t.x, grad_low, t.a, drop, write=True)
    assert part is not None
    errors = {
        "down": rel(low, want_low),
        "grad_down": rel(grad_low, SCALING * drop.scale * (t.grad.float() @ t.b.float())),
        "grad_b": rel(grad_b, t.grad.float().T @ low.float()),
        "grad_a": rel(grad_a, grad_low.float().T @ seen.float()),
        "grad_x": rel(part, (grad_low.float() @ t.a.float()) * keep),
    }
    by = table.times(
        {
            "down": lambda: kernels.down(t.x, t.a, SCALING, drop),
            "torch x A": lambda: t.x @ t.a.T,
            "grads of output": lambda: kernels.grads_of_output(t.grad, t.b, low, SCALING),
            "torch grad B, grad d": lambda: (t.grad @ t.b, t.grad.T @ low),
            "grads of input": lambda: kernels.grads_of_input(t.x, grad_low, t.a, drop, write=True),
            "torch gd x, gd A": lambda: (grad_low.T @ t.x, grad_low @ t.a),
        }
    )
    rates = {
        "down": gb_s(by["down"], t.x),
        "grads of output": gb_s(by["grads of output"], t.grad),
        "grads of input": gb_s(by["grads of input"], t.x, part),
    }
    facts = judged(errors, table.limit)
    return {**facts, "dropped": round(1 - float(keep.float().mean()), 5), "by": by, "gb_s": rates}


def _linear_forms(table: Table, name: str, dropout: float) -> dict[str, Any]:
    """Each form forward and backward; errors against float32 where there is no dropout or the mask is known."""
    t = _lora_tensors(table, name)
    flops = 2.0 * table.sizes.tokens * t.weight.numel()
    by: dict[str, Any] = {}
    errors: dict[str, float] = {}
    for form_name, form in lora_forms.FORMS.items():
        if not form.takes(dropout):
            continue
        try:
            prepared = form.prepare(t, SCALING, dropout)
            out, saved = prepared.forward()
            grads = prepared.backward(saved)
            if not dropout and form.with_lora:
                wants = lora_forms.reference(t, SCALING)
                for part, got, want in zip(("out", "x", "A", "B"), (out, *grads), wants, strict=True):
                    if got is not None and want is not None:
                        errors[f"{form_name} {part}"] = rel(got, want)
            forward, backward = table.ms(prepared.forward), table.ms(lambda p=prepared, s=saved: p.backward(s))  # type: ignore[misc]
            by[form_name] = [forward, backward, round(2 * flops / (forward + backward) / 1e9, 1)]
        except failures() as error:
            by[form_name] = f"{type(error).__name__}: {str(error)[:300]}"
    return {**judged(errors, 2 * table.limit), "forward, backward, tflops": by}


def _mask(table: Table) -> dict[str, Any]:
    """The same seed draws the same mask, whatever the tile; another seed another; the share is the one asked for."""
    from phi3_dist.modeling.kernels import lora as kernels

    ones = torch.ones(table.sizes.tokens, table.sizes.inner, dtype=table.dtype, device=table.device)
    torch.manual_seed(5)
    first, second = kernels.drop_of(DROPOUT), kernels.drop_of(DROPOUT)
    torch.manual_seed(5)
    again = kernels.drop_of(DROPOUT)
    a, b, c = (kernels.masked(ones, drop) for drop in (first, second, again))
    rows, columns = (a == 0).float().mean(1), (a == 0).float().mean(0)
    share = float((a == 0).float().mean())
    by = table.times(
        {
            "triton": lambda: kernels.masked(ones, first),
            "torch dropout": lambda: F.dropout(ones, DROPOUT),
            "torch bernoulli": lambda: torch.empty(ones.shape, dtype=torch.bool, device=table.device).bernoulli_(0.95),
        }
    )
    return {
        "ok": bool(
            torch.equal(a, c) and not torch.equal(a, b) and abs(share - DROPOUT) < (0.02 if table.toy else 5e-4)
        ),
        "share": round(share, 5),
        "rows_std": round(float(rows.std()), 5),
        "columns_std": round(float(columns.std()), 5),
        "neighbours": round(float(((a[:, 1:] == 0) & (a[:, :-1] == 0)).float().mean()), 6),
        "by": by,
    }


def lora(table: Table) -> None:
    """LoRA's kernels, then the whole linear in its forms at the four shapes, without dropout and with."""
    table.check("dropout's mask", lambda: _mask(table))
    for dropout in (0.0, DROPOUT):
        table.check(f"kernels, gate_up, dropout {dropout}", lambda p=dropout: _lora_kernels(table, "gate_up", p))  # type: ignore[misc]
    for name in table.sizes.linears:
        for dropout in (0.0, DROPOUT):
            table.check(f"linear {name}, dropout {dropout}", lambda n=name, p=dropout: _linear_forms(table, n, p))  # type: ignore[misc]


def sweep(table: Table) -> None:
    """Other tiles for LoRA's kernels."""
    from phi3_dist.modeling.kernels import lora as kernels

    if table.toy:
        return
    drop = kernels.drop_of(DROPOUT)
    t = _lora_tensors(table, "gate_up")
    low = kernels.down(t.x, t.a, SCALING, drop)

    def tiles(call: Callable[[kernels.Blocks], Any], found: Iterable[tuple[int, int, int, int, int]]) -> dict[str, Any]:
        return {
            "by": table.times({str(tile): lambda tile=tile: call(kernels.Blocks(*tile)) for tile in found})  # type: ignore[misc]
        }

    downs = ((32, 256, 4, 3, 0), (16, 256, 4, 4, 0), (32, 128, 4, 4, 0), (64, 128, 8, 4, 0), (16, 512, 8, 3, 0))
    table.check("down", lambda: tiles(lambda b: kernels.down(t.x, t.a, SCALING, drop, blocks=b), downs))
    outs = (
        (256, 64, 8, 3, 1024),
        (128, 64, 4, 3, 2048),
        (128, 64, 4, 4, 1024),
        (256, 32, 8, 4, 1024),
        (128, 128, 8, 3, 2048),
    )
    table.check("grads of output", lambda: tiles(lambda b: kernels.grads_of_output(t.grad, t.b, low, 1.0, b), outs))
    ins = ((32, 128, 4, 3, 256), (32, 64, 4, 4, 512), (64, 128, 8, 3, 512), (32, 256, 8, 3, 256), (64, 64, 4, 3, 256))
    table.check(
        "grads of input",
        lambda: tiles(lambda b: kernels.grads_of_input(t.x, low, t.a, drop, write=True, blocks=b), ins),
    )
