"""One pass over the base for several adapters: their packs are one ragged row, each LoRA sees its own part of it.

The base's linears get a forward that makes one product over all tokens and adds each candidate's update to its own
rows; DoRA's rows, and LoRA's over an int8 base, are computed as PEFT computes them (`peft_rows.py`). Norms, attention
and the loss treat rows and documents alone, so that no number of one candidate reaches another. Dropout is drawn for
each candidate from a generator of its own, seeded as its run alone would seed the global one.

Shapes: T tokens of the joined row, I inputs, O outputs, R a candidate's rank, S supervised positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from phi3_dist.modeling.dequantize import base_grad_input, base_product, quant_state_of
from phi3_dist.modeling.fp8 import Fp8Linear
from phi3_dist.modeling.fused_lora import dropped_positions
from phi3_dist.modeling.loss import HeadLoss, Kernel, PackedLoss
from phi3_dist.sweep.peft_rows import Update, dora_rows, lora_rows, noise_of

__all__ = ["JointLoss", "Part", "Present", "install_updates", "is_int8", "joined"]


@dataclass(frozen=True)
class Part:
    """One candidate's share of a forward pass: the arguments of `PackedLoss.forward`, and the seed of its dropout."""

    candidate: int
    batch: Mapping[str, Any]
    seed: int | None = None


@dataclass
class Present:
    """Who is in the pass that runs now, in the order of their rows."""

    candidates: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    generators: list[torch.Generator | None] = field(default_factory=list)

    def sizes(self, rows: int) -> list[int]:
        """Rows of each candidate, of `rows` in all: those of every token, or in the last layer of supervised ones."""
        for sizes in (self.tokens, self.supervised):
            if sum(sizes) == rows:
                return sizes
        raise AssertionError(f"{rows} rows are neither all of {self.tokens} nor of {self.supervised}")

    def set(self, parts: Sequence[Part], device: torch.device) -> None:
        self.candidates = [part.candidate for part in parts]
        self.tokens = [int(part.batch["ids_T"].shape[0]) for part in parts]
        self.supervised = [int(part.batch["predict_S"].shape[0]) for part in parts]
        self.generators = [
            None if part.seed is None else torch.Generator(device).manual_seed(part.seed) for part in parts
        ]

    def recomputed(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """For activation checkpointing: the second forward of a layer draws what its first one drew."""
        states: list[Tensor] = []

        @contextlib.contextmanager
        def first() -> Iterator[None]:
            states.extend(g.get_state() for g in self.generators if g is not None)
            yield

        @contextlib.contextmanager
        def again() -> Iterator[None]:
            generators = [g for g in self.generators if g is not None]
            now = [g.get_state() for g in generators]
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            yield
            for generator, state in zip(generators, now, strict=True):
                generator.set_state(state)

        return first(), again()


@dataclass(frozen=True)
class _Rows:
    """One candidate's rows [start, stop) at one linear; no `scaling` where it has no LoRA there."""

    start: int
    stop: int
    scaling: float
    dropped_TI: Tensor | None


class _JointLinear(torch.autograd.Function):
    """`x Wᵀ + bias`, and for each candidate's rows `scaling · (x where not dropped) Aᵀ Bᵀ`, for a frozen W.

    `pairs` are A and B of each entry of `rows`, in turn.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 -- autograd functions get no keywords
        ctx: Any, x_TI: Tensor, weight: Tensor, bias_O: Tensor | None, state: Any, rows: Sequence[_Rows], *pairs: Tensor
    ) -> Tensor:
        out_TO = base_product(x_TI, weight, state, bias_O)
        down = []
        for one, a_RI, b_OR in zip(rows, pairs[::2], pairs[1::2], strict=True):
            lora_x = x_TI[one.start : one.stop]
            if one.dropped_TI is not None:
                lora_x = lora_x.masked_fill(one.dropped_TI, 0)
            down.append(lora_x @ a_RI.T)
            out_TO[one.start : one.stop].addmm_(down[-1], b_OR.T, alpha=one.scaling)
        masks = [one.dropped_TI for one in rows]
        ctx.save_for_backward(x_TI, weight, *pairs, *down, *(mask for mask in masks if mask is not None))
        ctx.state, ctx.rows = state, [(r.start, r.stop, r.scaling, r.dropped_TI is not None) for r in rows]
        return out_TO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight, *saved = ctx.saved_tensors
        count = len(ctx.rows)
        pairs, down, masks = saved[: 2 * count], saved[2 * count : 3 * count], iter(saved[3 * count :])
        grad_TO = grad_TO.contiguous()
        grad_x = base_grad_input(grad_TO, weight, ctx.state) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = []
        for number, (start, stop, scaling, masked) in enumerate(ctx.rows):
            a_RI, b_OR, rows = pairs[2 * number], pairs[2 * number + 1], slice(start, stop)
            mask = next(masks) if masked else None
            grad_down = (grad_TO[rows] @ b_OR).mul_(scaling)
            wants_a, wants_b = ctx.needs_input_grad[5 + 2 * number : 7 + 2 * number]
            lora_x = x_TI[rows]
            if wants_a and mask is not None:
                lora_x = lora_x.masked_fill(mask, 0)
            grads.append(grad_down.T @ lora_x if wants_a else None)
            grads.append((grad_TO[rows].T @ down[number]).mul_(scaling) if wants_b else None)
            if grad_x is None:
                continue
            if mask is None:
                grad_x[rows].addmm_(grad_down, a_RI)
            else:
                grad_x[rows] += (grad_down @ a_RI).masked_fill_(mask, 0)
        return grad_x, None, None, None, None, *grads


_UPDATES, _PRESENT = "_joint_updates", "_joint_present"


@dataclass(frozen=True)
class _Share:
    """One candidate's rows [start, stop) at one linear, and what it has there."""

    start: int
    stop: int
    update: Update | None
    generator: torch.Generator | None

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


def _shares(linear: Any, rows: int) -> Iterator[_Share]:
    present: Present = vars(linear)[_PRESENT]
    updates: Mapping[int, Update] = vars(linear)[_UPDATES]
    start = 0
    for candidate, size, generator in zip(present.candidates, present.sizes(rows), present.generators, strict=True):
        drawing = generator if linear.training else None
        yield _Share(start, start + size, updates.get(candidate) if size else None, drawing)
        start += size


def _joint_product(linear: Any, x_TI: Tensor, shares: Sequence[_Share]) -> Tensor:
    """The base for all rows, and plain LoRA for those of `shares`."""
    weight, bias, state = linear.weight, linear.bias, quant_state_of(linear)
    dtype = torch.get_autocast_dtype(x_TI.device.type) if torch.is_autocast_enabled(x_TI.device.type) else x_TI.dtype
    x_TI = x_TI.to(dtype)
    weight = weight if state is not None else weight.to(dtype)
    rows, pairs = [], []
    for share in shares:
        update = share.update
        assert update is not None
        drop = update.dropout if share.generator is not None else 0.0
        mask = dropped_positions(x_TI[share.rows], drop, share.generator) if drop else None
        rows.append(_Rows(share.start, share.stop, update.scaling / (1.0 - drop), mask))
        pairs += [one.to(device=x_TI.device, dtype=dtype) for one in (update.a_RI, update.b_OR)]
    bias = None if bias is None else bias.to(dtype)
    out_TO: Tensor = _JointLinear.apply(x_TI, weight, bias, state, rows, *pairs)  # type: ignore[no-untyped-call]
    return out_TO


def _by_peft(linear: Any, x_TI: Tensor, base_TO: Tensor, share: _Share) -> Tensor:
    """The rows of one candidate, where `_joint_product` has not finished them."""
    update = share.update
    if update is None:
        return base_TO
    if update.magnitude_O is None and not is_int8(linear):
        return base_TO
    noise_TI = noise_of(x_TI, update, share.generator)
    rows_of = lora_rows if update.magnitude_O is None else dora_rows
    return rows_of(x_TI, base_TO, linear, update, noise_TI)


def is_int8(linear: nn.Module) -> bool:
    """By name: the class does not exist where bitsandbytes does not."""
    return type(linear).__name__ == "Linear8bitLt"


def _joint_forward(linear: Any, x: Tensor) -> Tensor:
    """In place of the linear's own `forward`: the base for all rows, each candidate's update for its own."""
    x_TI = x.reshape(-1, x.shape[-1])
    shares = list(_shares(linear, x_TI.shape[0]))
    whole = is_int8(linear)
    if whole:
        assert len(shares) == 1, "the columns that an int8 product keeps in 16 bits are those of all its rows"
        out_TO = type(linear).forward(linear, x).reshape(x_TI.shape[0], -1)
    else:
        plain = [share for share in shares if share.update is not None and share.update.magnitude_O is None]
        out_TO = _joint_product(linear, x_TI, plain)
    if whole or any(share.update is not None and share.update.magnitude_O is not None for share in shares):
        out_TO = torch.cat([_by_peft(linear, x_TI[share.rows], out_TO[share.rows], share) for share in shares])
    shaped_TO: Tensor = out_TO.view(*x.shape[:-1], out_TO.shape[-1])
    return shaped_TO


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Fp8Linear)


def install_updates(causal_lm: nn.Module, present: Present, updates: Mapping[str, Mapping[int, Update]]) -> int:
    """Give the linears named in `updates` (module name, then candidate) the joint forward; how many there are."""
    count = 0
    for name, module in causal_lm.named_modules():
        if name not in updates:
            continue
        assert _is_linear(module), f"{name} is a {type(module).__name__}"
        vars(module)[_PRESENT], vars(module)[_UPDATES] = present, updates[name]
        module.forward = MethodType(_joint_forward, module)
        count += 1
    assert count == len(updates), "an update has no linear"
    return count


def joined(parts: Sequence[Part]) -> dict[str, Any]:
    """The arguments of one forward pass over all parts."""
    batches = [part.batch for part in parts]
    if len(batches) == 1:
        return dict(batches[0])
    starts, total = [], 0
    for batch in batches:
        starts.append(total)
        total += int(batch["ids_T"].shape[0])
    ends = [batch["cu_seqlens"][1:] + start for batch, start in zip(batches, starts, strict=True)]
    return {
        **{key: torch.cat([batch[key] for batch in batches]) for key in ("ids_T", "positions_T", "target_S")},
        "predict_S": torch.cat([batch["predict_S"] + start for batch, start in zip(batches, starts, strict=True)]),
        "cu_seqlens": torch.cat([batches[0]["cu_seqlens"][:1], *ends]),
        "lengths": tuple(length for batch in batches for length in batch["lengths"]),
    }


class _LossOfEach(HeadLoss):
    """One call for all candidates, with one input and one output.

    ZeRO-3 gathers the head's weight for each call of a module, and in backward again for each input and output.
    """

    sizes: list[int]
    """Rows of each candidate in the next call."""

    def forward(self, hidden_SH: Tensor, target_S: Tensor | None, head: nn.Module) -> Tensor:
        """A float32 value for each candidate."""
        assert target_S is not None
        each = zip(torch.split(hidden_SH, self.sizes), torch.split(target_S, self.sizes), strict=True)
        return torch.stack([HeadLoss.forward(self, hidden, target, head) for hidden, target in each])


class JointLoss(PackedLoss):
    """The base whose forward gives each present candidate's summed negative log likelihood, in their order."""

    def __init__(self, model: nn.Module, kernel: Kernel = "chunked") -> None:
        super().__init__(model, kernel=kernel)
        self.head_loss: _LossOfEach = _LossOfEach(kernel=kernel)
        self.present = Present()

    def forward(self, **batch: Any) -> Any:
        """A float32 scalar for each candidate of `present`."""
        causal_lm, predict_S = self.causal_lm, batch["predict_S"]
        hidden_TH = causal_lm.model(
            input_ids=batch["ids_T"][None],
            position_ids=batch["positions_T"][None],
            use_cache=False,
            cu_seqlens=batch["cu_seqlens"],
            lengths=tuple(batch["lengths"]),
            **({"predict_S": predict_S} if self.last_layer_selects else {}),
        ).last_hidden_state.squeeze(0)
        hidden_SH = hidden_TH if self.last_layer_selects else hidden_TH.index_select(0, predict_S)
        self.head_loss.sizes = self.present.supervised
        return self.head_loss(hidden_SH, batch["target_S"], causal_lm.lm_head).unbind()
