"""One optimizer step as a pure function of its number: which packs, which randomness, which learning rate.

Shapes: T tokens of a pack, S supervised positions in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phi3_dist.data.batch import assemble
from phi3_dist.data.pack.packs import Packs
from phi3_dist.data.pack_order import Order
from phi3_dist.modeling.attention.sequence_parallel import Share
from phi3_dist.training.engines.backward_and_update import Engine
from phi3_dist.training.runtime import Runtime
from phi3_dist.training.sequence_parallel import Cut, cut_batch

__all__ = [
    "StepResult",
    "micro_batch_seed",
    "seed_micro_batch",
    "share_of_step",
    "to_device",
    "tokens_in",
    "train_step",
]


@dataclass(frozen=True)
class StepResult:
    """What a step did. `nll`, this rank's summed negative log likelihood, and `grad_norm` are still on the device."""

    nll: Tensor
    supervised_tokens: int
    tokens: int
    grad_norm: Tensor
    lr: float
    packs: tuple[int, ...]
    seconds: Callable[[], Mapping[str, float]] | None = None
    """Gives the seconds of the step's parts once it has been read, where they were timed."""


def micro_batch_seed(seed: int, step: int, slot: int) -> int:
    """Dropout's seed from the global position of the micro batch: no rank, world size or resume changes it."""
    state = np.random.SeedSequence((seed, step, slot)).generate_state(2, np.uint32)
    return int(state[0]) << 31 | int(state[1]) >> 1


def seed_micro_batch(seed: int, step: int, slot: int) -> None:
    """Seed the global generator with `micro_batch_seed`."""
    torch.manual_seed(micro_batch_seed(seed, step, slot))


def to_device(packs: Packs, which: Sequence[int], device: torch.device, cut: Cut | None = None) -> dict[str, Any]:
    """The arguments of `PackedLoss.forward` for some packs joined into one ragged row, or this rank's part of it."""
    batch = assemble(packs, which)
    lengths = tuple(int(n) for n in np.diff(batch.cu_seqlens))
    tokens = supervised = slice(None)
    shared: dict[str, Share] = {}
    if cut is not None:
        tokens, supervised, share = cut_batch(batch, cut)
        shared = {"share": share}

    def move(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        # from pinned memory the copy waits for nothing; torch keeps that memory until it is done
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    return {
        "ids_T": move(batch.ids_T[tokens]),
        "positions_T": move(batch.positions_T[tokens]),
        "predict_S": move(batch.predict_S[supervised] - (tokens.start or 0)),
        "target_S": move(batch.target_S[supervised]),
        "cu_seqlens": move(batch.cu_seqlens),
        "lengths": lengths,
        **shared,
    }


def share_of_step(loss: Tensor, supervised_tokens: int) -> Tensor:
    """What a micro batch's summed loss adds to the loss of its step, which has so many supervised tokens.

    The gradients of a loss that is not a number are all nan, so that it shows on every rank.
    """
    sound = 1 + (loss.detach() - loss.detach())
    return loss / supervised_tokens * sound


def tokens_in(packs: Packs, which: Iterable[int]) -> int:
    """Tokens of the packs `which`."""
    return int(sum(packs.rows.lengths[row] for pack in which for row in packs.packs[pack]))


def train_step(
    engine: Engine, runtime: Runtime, packs: Packs, order: Order, step: int, *, lr: float, seed: int
) -> StepResult:
    """Forward and backward over this rank's micro batches of step `step`, then one update. Collective.

    The loss is divided by the supervised tokens of the whole global batch, known from the layout: no communication.
    """
    plan = runtime.plan
    everyone = order.packs_of_step(step)
    denominator = int(packs.targets[everyone].sum())
    nll = torch.zeros((), device=runtime.device)
    slots = order.slots(step, runtime.data_rank, runtime.data_ranks, plan.micro_batch)
    for number, which in enumerate(slots):
        seed_micro_batch(seed, step, number * runtime.data_ranks + runtime.data_rank)
        engine.start_micro_batch(last=number == len(slots) - 1)
        loss = engine.model(**to_device(packs, which, runtime.device, runtime.cut))
        engine.backward(share_of_step(loss, denominator))
        nll += loss.detach()
    return StepResult(
        nll=nll,
        supervised_tokens=denominator,
        tokens=tokens_in(packs, everyone),
        grad_norm=engine.update(lr),
        lr=lr,
        packs=tuple(int(p) for p in everyone),
    )
