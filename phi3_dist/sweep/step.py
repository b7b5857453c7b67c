"""One step of every candidate that waits for one: joint forward and backward passes, then an update each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from phi3_dist.sweep.candidate import CandidateRun, Given
from phi3_dist.sweep.joint import Part, joined
from phi3_dist.training.learning_rate import learning_rate
from phi3_dist.training.train_step import (
    StepResult,
    micro_batch_seed,
    share_of_step,
    to_device,
    tokens_in,
)

__all__ = ["joint_step"]


def _passes(slots: Sequence[Sequence[Any]], a_pass: int) -> Iterator[tuple[int, list[int]]]:
    """Each forward pass: its slot, and which candidates (by index) bring a micro batch. The same on every rank."""
    for slot in range(max(map(len, slots))):
        here = [index for index, own in enumerate(slots) if slot < len(own)]
        for first in range(0, len(here), a_pass):
            yield slot, here[first : first + a_pass]


def joint_step(waiting: Sequence[CandidateRun], given: Given) -> list[StepResult]:
    """The results of one step of each candidate, in their order. Collective.

    Each candidate's loss is divided by the supervised tokens of its own global batch, as in a run of its own.
    """
    runtime, joint = given.runtime, given.joint
    steps = [int(run.next_step or 0) for run in waiting]
    everyone = [run.order.packs_of_step(step) for run, step in zip(waiting, steps, strict=True)]
    supervised = [int(run.prepared.train.targets[packs].sum()) for run, packs in zip(waiting, everyone, strict=True)]
    slots = [
        run.order.slots(step, runtime.rank, runtime.world, run.plan.micro_batch)
        for run, step in zip(waiting, steps, strict=True)
    ]
    nlls = [torch.zeros((), device=runtime.device) for _ in waiting]
    for slot, here in _passes(slots, given.a_pass):
        parts = []
        for index in here:
            run = waiting[index]
            seed = micro_batch_seed(run.cfg.train.seed, steps[index], slot * runtime.world + runtime.rank)
            batch = to_device(run.prepared.train, slots[index][slot], runtime.device)
            parts.append(Part(run.number, batch, seed))
        joint.present.set(parts, runtime.device)
        with runtime.accelerator.autocast():
            losses = joint(**joined(parts))
        total = torch.zeros((), device=runtime.device)
        for index, loss in zip(here, losses, strict=True):
            total = total + share_of_step(loss.float(), supervised[index])
            nlls[index] += loss.detach()
        total.backward()  # type: ignore[no-untyped-call]
    results = []
    for index, run in enumerate(waiting):
        lr = learning_rate(steps[index], run.total, run.cfg.optim)
        results.append(
            StepResult(
                nll=nlls[index],
                supervised_tokens=supervised[index],
                tokens=tokens_in(run.prepared.train, everyone[index]),
                grad_norm=run.proof.update(lr),
                lr=lr,
                packs=tuple(int(pack) for pack in everyone[index]),
            )
        )
    return results
