"""PEFT's LoRA linear as one autograd function: the input saved once, LoRA added to the base's output in place.

PEFT stays the owner of names, configuration, merging and files. Only `forward` of a stock `lora.Linear` (over a plain
linear, bitsandbytes' NF4 or FP8) is replaced, as an attribute of that instance: `nn.Module.__call__` looks it up
there, so the hooks of DDP, DeepSpeed and FSDP2 run as before, state dicts and `isinstance` see PEFT's own layer, and
`del layer.forward` undoes it. Whatever is not the plain case when a forward is called (merged, disabled, mixed
adapters, a weight that is a shard) goes to PEFT's forward, and `declined` tells why.

Sharded weights: FSDP2 holds a decoder layer's weights whole while that layer runs, forward and backward. ZeRO-3
gathers a parameter when a forward touches it and registers it with the module whose forward that is (DeepSpeed's
"external parameters"), which is the LoRA layer, so that it is gathered before that layer's backward too.

Shapes: T tokens, I inputs, O outputs, R the adapter's rank.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from phi3_dist.modeling.attention.sequence_parallel import Rows
from phi3_dist.modeling.dequantize import base_grad_input, base_product, dense, quant_state_of
from phi3_dist.modeling.fp8 import Fp8Linear

__all__ = [
    "FusedReport",
    "declined",
    "draw_for_rows",
    "dropped_positions",
    "install_forwards",
    "install_fused",
    "keep_dequantized",
    "lora_linear",
    "remove_fused",
    "takes_rows",
    "why_not_fused",
]

_DECLINED = "_fused_declined"
_KEEPS = "_fused_keeps_weight"
_KERNELS = "_fused_by_kernels"
_DROPS_FOR = "_fused_drops_for"
KERNEL_RANK = 128
"""The largest rank that Triton's kernels take: a tile holds all of it."""
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class FusedReport:
    """How many modules got the fused forward, and the reasons of those that keep the library's own."""

    fused: int
    kept: dict[str, int]
    unit: str = "layers"

    def __str__(self) -> str:
        parts = [f"{self.fused} {self.unit}"] if self.fused or not self.kept else []
        return "; ".join([*parts, *(f"{count} as they were: {why}" for why, count in self.kept.items())])


class _LoraLinear(torch.autograd.Function):
    """`x Wᵀ + bias + scaling · (x where not dropped) Aᵀ Bᵀ` for a frozen W. All floating tensors are of one dtype.

    An NF4 W is dequantised anew in backward, since kept it costs what quantisation saves. With `keep` its numbers are
    saved in its place: a layer that is recomputed for its backward holds them no longer than that.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scaling: float,
        dropped_TI: Tensor | None,
        quant_state: Any,
        keep: bool,
    ) -> Tensor:
        if keep:
            weight, quant_state = dense(weight, quant_state, x_TI.dtype), None
        out_TO = base_product(x_TI, weight, quant_state, bias_O)
        lora_x_TI = x_TI if dropped_TI is None else x_TI.masked_fill(dropped_TI, 0)
        down_TR = lora_x_TI @ a_RI.T
        out_TO.addmm_(down_TR, b_OR.T, alpha=scaling)
        ctx.save_for_backward(x_TI, weight, a_RI, b_OR, dropped_TI, down_TR)
        ctx.scaling, ctx.quant_state = scaling, quant_state
        return out_TO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight, a_RI, b_OR, dropped_TI, down_TR = ctx.saved_tensors
        grad_TO = grad_TO.contiguous()
        grad_down_TR = (grad_TO @ b_OR).mul_(ctx.scaling)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[3]:
            grad_a = grad_down_TR.T @ (x_TI if dropped_TI is None else x_TI.masked_fill(dropped_TI, 0))
        if ctx.needs_input_grad[4]:
            grad_b = (grad_TO.T @ down_TR).mul_(ctx.scaling)
        if ctx.needs_input_grad[0]:
            grad_x = base_grad_input(grad_TO, weight, ctx.quant_state)
            if dropped_TI is None:
                grad_x.addmm_(grad_down_TR, a_RI)
            else:
                grad_x += (grad_down_TR @ a_RI).masked_fill_(dropped_TI, 0)
        return grad_x, None, None, grad_a, grad_b, None, None, None, None


def dropped_positions(
    x: Tensor, dropout: float, generator: torch.Generator | None = None, rows: Rows | None = None
) -> Tensor:
    """A byte an element: where zeros go. On a CPU the same as `F.dropout` puts there, which draws just so.

    `rows`: x are those of a larger tensor, for all of which is drawn.
    """
    shape = x.shape if rows is None else (rows.total, x.shape[-1])
    kept = torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - dropout, generator=generator)
    if rows is not None:
        kept = kept[rows.start : rows.stop].clone().view(x.shape)
    return kept.logical_not_()


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias_O: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    scaling: float,
    dropout: float = 0.0,
    quant_state: Any = None,
    *,
    keep: bool = False,
    kernels: bool = False,
    rows: Rows | None = None,
) -> Tensor:
    """`linear(x, weight, bias) + scaling · linear(linear(dropout(x), A), B)`; weight and bias get no gradient.

    x (..., I) gives (..., O); `weight` is (O, I), or bitsandbytes' 4-bit storage or FP8 bytes with a `quant_state`.
    Under autocast all is computed in its dtype, as `F.linear` does. With `dropout` a mask of one byte an element is
    kept, not a second copy of x; on a CPU the generator advances as by PEFT's `nn.Dropout`, so that the same seed drops
    the same positions. `keep`: hold a 4-bit weight's numbers until backward. `kernels`: by Triton's (in kernels/),
    which draw the mask anew in backward, up to rank 128. `rows`: which of a larger x they are; not for the kernels.
    """
    assert rows is None or not kernels
    by_kernels = kernels and a_RI.shape[0] <= KERNEL_RANK
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        if not by_kernels:
            a_RI, b_OR = a_RI.to(dtype), b_OR.to(dtype)
        weight = weight if quant_state is not None else weight.to(dtype)
        bias_O = None if bias_O is None else bias_O.to(dtype)
    elif not by_kernels and a_RI.dtype != x.dtype:  # a float32 adapter over 16 bits: as under autocast
        a_RI, b_OR = a_RI.to(x.dtype), b_OR.to(x.dtype)
    if by_kernels:
        from phi3_dist.modeling.kernels.linear import kernel_lora_linear

        return kernel_lora_linear(x, weight, bias_O, a_RI, b_OR, scaling, dropout, quant_state, keep=keep)
    dropped = None
    if dropout > 0:
        dropped = dropped_positions(x, dropout, rows=rows).reshape(-1, x.shape[-1])
        # the survivors' scale is applied to R columns instead of I
        scaling = scaling / (1.0 - dropout)
    out_TO: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x.reshape(-1, x.shape[-1]), weight, bias_O, a_RI, b_OR, scaling, dropped, quant_state, keep
    )
    return out_TO.view(*x.shape[:-1], out_TO.shape[-1])


def _is_nf4(layer: LoraLayer) -> bool:
    """PEFT's layer over bitsandbytes' 4-bit linear. By name: neither class exists where bitsandbytes does not."""
    return (type(layer).__module__, type(layer).__name__) == ("peft.tuners.lora.bnb", "Linear4bit")


def why_not_fused(layer: LoraLayer) -> str:
    """The reason why a LoRA layer must keep PEFT's own forward; empty where it need not."""
    base = layer.get_base_layer()
    if type(layer) is not PeftLinear and not _is_nf4(layer):
        return f"PEFT's {type(layer).__name__} over {type(base).__module__.split('.')[0]}'s {type(base).__name__}"
    if layer.base_layer is not base or not (_is_nf4(layer) or type(base) in {nn.Linear, Fp8Linear}):
        return f"its base is a {type(layer.base_layer).__name__}, not a plain nn.Linear"
    if any(p.requires_grad for p in base.parameters()):
        return "its base trains too (bias, or in full)"
    adapters = list(layer.lora_A)
    return _why_not_adapter(layer, adapters[0]) if len(adapters) == 1 else f"{len(adapters)} adapters"


def _why_not_adapter(layer: LoraLayer, name: str) -> str:
    if name in layer.lora_variant:
        return f"a LoRA variant ({type(layer.lora_variant[name]).__name__.removesuffix('LinearVariant')})"
    if layer.lora_A[name].bias is not None or layer.lora_B[name].bias is not None:
        return "a bias in the adapter"
    if type(layer.lora_dropout[name]) not in {nn.Dropout, nn.Identity}:
        return f"dropout of the kind {type(layer.lora_dropout[name]).__name__}"
    return ""


def _is_whole(linear: nn.Linear, *, four_bit: bool = False) -> bool:
    weight: Any = linear.weight
    if hasattr(weight, "device_mesh"):
        return False
    if four_bit:  # two weights a byte, in storage of any dtype, rounded up to a whole element
        size = weight.element_size()
        return bool(weight.numel() == -(-linear.out_features * linear.in_features // (2 * size)))
    return tuple(weight.shape) == (linear.out_features, linear.in_features)


def _why_not_now(layer: Any, x: Tensor) -> str:
    """Why this call is not the plain one (the one adapter active and unmerged, one dtype, no shard); or empty."""
    names = list(layer.lora_A)
    plain = not layer.disable_adapters and not layer.merged and not layer.lora_variant
    if not plain or len(names) != 1 or layer.active_adapters != names:
        return "merged, switched off, or with other adapters than the one it began with"
    base, four_bit = layer.base_layer, _is_nf4(layer)
    linears = (layer.lora_A[names[0]], layer.lora_B[names[0]])
    if not (_is_whole(base, four_bit=four_bit) and all(map(_is_whole, linears))):
        return "this rank holds only a shard of a weight"
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    # a float32 adapter is rounded as autocast rounds it: ZeRO-3 keeps it so beside a bf16 base
    wide = {torch.float32} if dtype in {torch.bfloat16, torch.float16} else set()
    dtypes = set() if torch.is_autocast_enabled(kind) else {linear.weight.dtype for linear in linears} - wide
    if four_bit:
        dtypes.add(base.compute_dtype or dtype)
        state = quant_state_of(base)
        if state is None or getattr(state, "packing_format_for_cpu", False):
            return "4-bit weights packed for inference"
    elif not torch.is_autocast_enabled(kind) and not isinstance(base, Fp8Linear):
        dtypes.add(base.weight.dtype)
    if dtypes - {dtype}:
        return f"weights of another dtype than the input's {str(dtype).removeprefix('torch.')}"
    return ""


def _fused_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What stands in for the layer's own `forward`. It looks at the layer's state anew each time."""
    why = "extra arguments" if args or kwargs else _why_not_now(layer, x)
    if why:
        if layer.training and torch.is_grad_enabled():
            setattr(layer, _DECLINED, why)
        out: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return out
    (name,) = layer.lora_A
    base, lora_a, lora_b, dropout = layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    drop = float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    state = quant_state_of(base)
    keep = _is_nf4(layer) and vars(layer).get(_KEEPS, False)
    weights = (base.weight, base.bias, lora_a.weight, lora_b.weight)
    kernels, rows_now = vars(layer).get(_KERNELS, False), vars(layer).get(_DROPS_FOR)
    rows = rows_now() if rows_now else None
    return lora_linear(x, *weights, layer.scaling[name], drop, state, keep=keep, kernels=kernels, rows=rows)


def install_forwards(
    model: nn.Module,
    forward_of: Callable[[nn.Module], Callable[..., Any] | None],
    why_not: Callable[[Any], str],
    unit: str = "layers",
) -> FusedReport:
    """Give each module for which `forward_of` names one another forward, unless `why_not` has a reason against it."""
    kept: Counter[str] = Counter()
    fused = 0
    for module in model.modules():
        forward = forward_of(module)
        if forward is None:
            continue
        why = why_not(module)
        if why:
            kept[why] += 1
            continue
        module.forward = MethodType(forward, module)
        fused += 1
    return FusedReport(fused, dict(kept), unit)


def install_fused(model: nn.Module, *, kernels: bool = False) -> FusedReport:
    """Give every stock LoRA linear of `model` the fused forward. Call it once adapters are added; again is harmless.

    `kernels`: computed by Triton's kernels, which need CUDA (or Triton's interpreter).
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            setattr(layer, _KERNELS, kernels)
    return install_forwards(model, lambda m: _fused_forward if isinstance(m, LoraLayer) else None, why_not_fused)


def keep_dequantized(model: nn.Module, layers: int) -> int:
    """Let the fused NF4 linears of the last `layers` decoder layers keep their weights for backward; how many do.

    The last, because their backward comes first: all are held at once when backward begins, and soon fewer.
    """
    found: dict[int, list[nn.Module]] = {}
    for name, module in model.named_modules():
        place = _LAYER.search(name)
        if place and isinstance(module, LoraLayer) and _is_nf4(module) and "forward" in vars(module):
            found.setdefault(int(place[1]), []).append(module)
    chosen = [module for number in sorted(found)[max(len(found) - layers, 0) :] for module in found[number]]
    for module in chosen:
        setattr(module, _KEEPS, True)
    return len(chosen)


def draw_for_rows(layer: nn.Module, rows: Callable[[], Rows | None]) -> None:
    """Let a fused layer draw dropout for all the rows of which `rows` names those that a call gets."""
    setattr(layer, _DROPS_FOR, rows)


def takes_rows(layer: nn.Module) -> bool:
    """Whether a layer computes by Triton's kernels, which look for FP8 rows on what they are given."""
    return "forward" in vars(layer) and bool(vars(layer).get(_KERNELS, False))


def remove_fused(model: nn.Module) -> None:
    """Give every LoRA layer its own forward back."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.__dict__.pop("forward", None)
            layer.__dict__.pop(_DECLINED, None)
            layer.__dict__.pop(_KEEPS, None)
            layer.__dict__.pop(_KERNELS, None)
            layer.__dict__.pop(_DROPS_FOR, None)


def declined(model: nn.Module) -> dict[str, int]:
    """Fused layers that went to PEFT's forward in training all the same: how many, by the last reason."""
    whys = (vars(layer).get(_DECLINED) for layer in model.modules() if isinstance(layer, LoraLayer))
    return dict(Counter(why for why in whys if why))
