"""A frozen base in FP8 under LoRA: half the memory of bf16, and products on FP8 tensor cores where a GPU has them.

Weights are E4M3 with a float32 scale for each output row; inputs and gradients are scaled by row as they come
(torch's `scaled_mm`). Backward needs the weight along its other side, where row scales do not factor out of the sum:
they are multiplied into the gradient first, which is the same product. The adapter and its optimizer stay as they are.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

__all__ = [
    "Fp8Linear",
    "Fp8Scale",
    "Rows8",
    "fp8_grad_input",
    "fp8_product",
    "note_rows",
    "noted_rows",
    "quantize_rows",
    "put_into_fp8",
    "use_fp8",
]

E4M3_MAX = 448.0
"""The largest number of `torch.float8_e4m3fn`."""
_ROWS = "_fp8_rows"
ALIGNED = 16
"""scaled_mm takes sizes of the weight that are multiples of this."""


class Fp8Scale(NamedTuple):
    """What an FP8 weight is multiplied by: one float32 for each of its O rows; and its bytes (I, O), where kept."""

    rows_O: Tensor
    turned_IO: Tensor | None = None


class Rows8(NamedTuple):
    """FP8 values (T, C) and the float32 scale (T, 1) of each row."""

    values_TC: Tensor
    scale_T1: Tensor


def note_rows(x: Tensor, rows: Rows8) -> None:
    """Let the pass that made x (..., C) leave its FP8 rows on it, for the product that takes x next."""
    setattr(x, _ROWS, (rows, x._version))


def noted_rows(x: Tensor) -> Rows8 | None:
    """The FP8 rows that were left on x, unless x has been written to since."""
    rows, version = getattr(x, _ROWS, (None, -1))
    return rows if version == x._version else None


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values of x (R, C) and the float32 scale (R, 1) that brings them back; a row of zeros stays one."""
    x32 = x.float()
    scale_R1 = x32.abs().amax(dim=-1, keepdim=True).clamp_min_(1e-12).div_(E4M3_MAX)
    return (x32 / scale_R1).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale_R1


def _scaled_mm(
    left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, dtype: torch.dtype, *, fast: bool = False
) -> Tensor:
    if left.is_cuda:  # the row-wise kernel there writes bf16 alone; torch before 2.13 has no other call
        wide: Tensor = torch._scaled_mm(
            left, right, left_scale, right_scale, out_dtype=torch.bfloat16, use_fast_accum=fast
        )
        return wide.to(dtype)
    kind: Any = F.ScalingType.RowWise
    out: Tensor = F.scaled_mm(left, right, left_scale, kind, right_scale, kind, output_dtype=dtype)
    return out


def fp8_product(
    x_TI: Tensor, weight_OI: Tensor, scale: Fp8Scale, bias_O: Tensor | None = None, rows: Rows8 | None = None
) -> Tensor:
    """`linear(x, weight, bias)` with the weight's bytes as uint8; in x's dtype. `rows`: x in FP8, where it is known."""
    x8_TI, x_scale = rows or quantize_rows(x_TI)
    weight8_IO = weight_OI.view(torch.float8_e4m3fn).t()
    out_TO = _scaled_mm(x8_TI, weight8_IO, x_scale, scale.rows_O[None], x_TI.dtype, fast=True)
    return out_TO if bias_O is None else out_TO.add_(bias_O)


def fp8_grad_input(grad_TO: Tensor, weight_OI: Tensor, scale: Fp8Scale, rows: Rows8 | None = None) -> Tensor:
    """The gradient of x, in the gradient's dtype. `rows`: the gradient · the weight's row scales in FP8."""
    grad8_TO, grad_scale = rows or quantize_rows(grad_TO.float() * scale.rows_O)
    # the right side of scaled_mm lies column by column: the bytes are turned for this product, unless kept so
    turned_IO = weight_OI.t().contiguous() if scale.turned_IO is None else scale.turned_IO
    columns = turned_IO.t().view(torch.float8_e4m3fn)
    ones = torch.ones(1, weight_OI.shape[1], device=grad_TO.device)
    return _scaled_mm(grad8_TO, columns, grad_scale, ones, grad_TO.dtype)


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, rows_O: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI, rows_O)
        return fp8_product(x_TI, weight_OI, Fp8Scale(rows_O), bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, None, None, None]:
        weight_OI, rows_O = ctx.saved_tensors
        return fp8_grad_input(grad_TO.contiguous(), weight_OI, Fp8Scale(rows_O)), None, None, None


class Fp8Linear(nn.Module):
    """A frozen linear whose weight is kept in FP8. As uint8, so that no cast of a model's dtype reaches it."""

    weight: nn.Parameter
    rows_O: Tensor
    turned_IO: Tensor | None

    def __init__(self, linear: nn.Linear, *, turned: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight8_OI, scale_O1 = quantize_rows(linear.weight.detach())
        self.weight = nn.Parameter(weight8_OI.view(torch.uint8), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("rows_O", scale_O1[:, 0], persistent=False)
        bytes_IO = weight8_OI.view(torch.uint8).t().contiguous() if turned else None
        self.register_buffer("turned_IO", bytes_IO, persistent=False)

    @property
    def scale(self) -> Fp8Scale:
        return Fp8Scale(self.rows_O, self.turned_IO)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) gives (..., O), under autocast in its dtype."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        flat_TI = x.reshape(-1, self.in_features)
        out_TO: Tensor = _Fp8Product.apply(flat_TI, self.weight, self.rows_O, self.bias)  # type: ignore[no-untyped-call]
        return out_TO.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, e4m3"


def _why_not(layer: LoraLayer) -> str:
    base = layer.base_layer
    if type(layer) is not PeftLinear or type(base) is not nn.Linear:
        return f"PEFT's {type(layer).__name__} over a {type(base).__name__}"
    if layer.lora_variant:
        return "a LoRA variant reads the weight"
    if any(p.requires_grad for p in base.parameters()):
        return "the base trains too"
    return _why_not_sizes(base)


def _why_not_sizes(linear: nn.Linear) -> str:
    if linear.in_features % ALIGNED or linear.out_features % ALIGNED:
        return f"{linear.in_features} × {linear.out_features} are not multiples of {ALIGNED}"
    return ""


def put_into_fp8(causal_lm: nn.Module, name: str) -> None:
    """Put the plain frozen linear of that name into FP8, without a LoRA layer around it, if its sizes allow it."""
    linear = causal_lm.get_submodule(name)
    assert type(linear) is nn.Linear, name
    if not _why_not_sizes(linear):
        above, _, last = name.rpartition(".")
        setattr(causal_lm.get_submodule(above), last, Fp8Linear(linear))


def use_fp8(model: nn.Module, *, turned: bool = False) -> tuple[int, dict[str, int]]:
    """Put the frozen linears under `model`'s LoRA layers into FP8: how many, and the reasons of those that stay.

    After adapters are added. A weight that is taken is freed as soon as its FP8 form exists. `turned`: keep its bytes
    along the other side too, for the product in backward, which else turns them each time.
    """
    kept: Counter[str] = Counter()
    taken = 0
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        why = _why_not(layer)
        if why:
            kept[why] += 1
            continue
        layer.base_layer = Fp8Linear(layer.base_layer, turned=turned)
        taken += 1
    return taken, dict(kept)
