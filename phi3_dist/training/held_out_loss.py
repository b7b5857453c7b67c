"""Held-out loss over the same packs and the same loss function as training, without gradients."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from phi3_dist.data.pack.packs import Packs
from phi3_dist.modeling.loss import PackedLoss, plain_head
from phi3_dist.training.engines.backward_and_update import Engine
from phi3_dist.training.runtime import Runtime
from phi3_dist.training.signals import StopFlag
from phi3_dist.training.train_step import to_device

__all__ = ["HeldOut", "held_out_loss", "joined_packs"]

JOINED, ENOUGH_TOKENS = 4, 16384
"""Forward passes of training whose tokens make one of an evaluation. Without gradients one layer's intermediates are
all that exists at a time: this many take no more memory than a training step, checkpointed or not. Where they would be
more than `ENOUGH_TOKENS`, which keep any device busy, fewer are joined."""
_BEHIND = {"cpu": 0, "cuda": 1}
"""Rounds that a GPU may be ahead of the stop signals that are read: it never waits for one."""


@dataclass(frozen=True)
class HeldOut:
    """Mean negative log likelihood per supervised token, in nats."""

    loss: float
    supervised_tokens: int
    seconds: float

    @classmethod
    def of_checkpoint(cls, loss: float) -> HeldOut:
        """A loss that was measured before this start."""
        return cls(loss, 0, 0.0)

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.loss, dtype=torch.float64).exp())


def joined_packs(packs: Packs, tokens: int) -> list[list[int]]:
    """Neighbouring packs, joined as long as they hold no more than `tokens` together; each at least alone."""
    groups: list[list[int]] = []
    room = 0
    for pack, rows in enumerate(packs.packs):
        size = int(packs.rows.lengths[list(rows)].sum())
        if not groups or size > room:
            groups.append([])
            room = tokens
        groups[-1].append(pack)
        room -= size
    return groups


def _tokens_at_once(engine: Engine, runtime: Runtime, packs: Packs) -> int:
    """As many as `JOINED` forward passes of training; as one where all logits exist at once."""
    loss = next((module for module in engine.model.modules() if isinstance(module, PackedLoss)), None)
    in_chunks = loss is not None and plain_head(loss.causal_lm.lm_head)[0] is not None
    one = runtime.plan.micro_batch * packs.pack_length
    return max(one, min(JOINED * one, ENOUGH_TOKENS)) if in_chunks else one


def _signals(runtime: Runtime, flag: StopFlag) -> Tensor:
    """The largest stop signal that any rank has got, on the device. Collective."""
    signal = torch.full((), float(flag.signal), device=runtime.device)
    if runtime.world > 1:
        torch.distributed.all_reduce(signal, torch.distributed.ReduceOp.MAX)
    return signal


@torch.no_grad()
def held_out_loss(
    engine: Engine, runtime: Runtime, packs: Packs, flag: StopFlag, progress: Callable[[int, int], None]
) -> tuple[HeldOut | None, int]:
    """The held-out loss on every rank, or None and the signal that broke it off. Collective.

    Packs are joined for speed. Rank r takes groups r, r + w, …; all ranks make the same number of forward passes, since
    under ZeRO-3 and FSDP2 a forward pass is a collective: who has none left repeats its first group and does not count
    it. Ranks that share packs take the same groups, and each counts its part. `progress` gets the groups done and
    all of them, after each round. Before each, the ranks agree whether to stop.
    """
    start_s = time.perf_counter()
    total = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    groups = joined_packs(packs, _tokens_at_once(engine, runtime, packs))
    signals: deque[Tensor] = deque()
    stop = 0
    was_training = engine.model.training
    engine.model.eval()
    for first in range(0, len(groups), runtime.data_ranks):
        signals.append(_signals(runtime, flag))
        if len(signals) > _BEHIND[runtime.device.type] and (stop := int(signals.popleft())):
            break
        mine = first + runtime.data_rank
        counted = mine < len(groups)
        group = groups[mine if counted else 0]
        batch = to_device(packs, group, runtime.device, runtime.cut)
        nll = engine.model(**batch)
        if counted:
            targets = float(len(batch["target_S"]))
            total += torch.stack((nll.double(), torch.full_like(nll, targets, dtype=torch.float64)))
        progress(min(first + runtime.data_ranks, len(groups)), len(groups))
    engine.model.train(was_training)
    if stop:
        return None, stop
    nll_sum, tokens = runtime.sum(total).tolist()
    return HeldOut(nll_sum / tokens if tokens else math.nan, int(tokens), time.perf_counter() - start_s), 0
