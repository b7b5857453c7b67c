"""Held-out loss over the same packs and the same loss function as training, without gradients."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from phi3_dist.data.batches import Packs
from phi3_dist.training.runtime import Runtime
from phi3_dist.training.step import to_device
from phi3_dist.training.strategy import Engine

__all__ = ["HeldOut", "held_out_loss"]


@dataclass(frozen=True)
class HeldOut:
    """Mean negative log likelihood per supervised token, in nats."""

    loss: float
    supervised_tokens: int
    seconds: float

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.loss, dtype=torch.float64).exp())


@torch.no_grad()
def held_out_loss(engine: Engine, runtime: Runtime, packs: Packs) -> HeldOut:
    """The held-out loss on every rank. Collective.

    Rank r takes packs r, r + w, …; all ranks make the same number of forward passes, since under ZeRO-3 and FSDP2
    a forward pass is a collective: who has none left repeats its first pack and does not count it.
    """
    start = time.perf_counter()
    total = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    was_training = engine.model.training
    engine.model.eval()
    for first in range(0, len(packs.packs), runtime.world):
        mine = first + runtime.rank
        counted = mine < len(packs.packs)
        nll = engine.model(**to_device(packs, [mine if counted else 0], runtime.device))
        if counted:
            total += torch.stack((nll.double(), torch.full_like(nll, float(packs.targets[mine]), dtype=torch.float64)))
    engine.model.train(was_training)
    nll_sum, tokens = runtime.sum(total).tolist()
    return HeldOut(nll_sum / tokens, int(tokens), time.perf_counter() - start)
