"""Ranks agree before step 1: a rank with another config, data or library trains nonsense without a word."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from phi3_dist.errors import PlanError, Problem
from phi3_dist.training.runtime import Runtime

__all__ = ["check_same_on_all_ranks", "differences"]


def differences(by_rank: list[Mapping[str, str]]) -> list[Problem]:
    """Each fact in which a rank differs from rank 0, with both values."""
    reference = by_rank[0]
    found = []
    for rank, facts in enumerate(by_rank):
        for name in sorted({*reference, *facts}):
            ours, theirs = reference.get(name, "missing"), facts.get(name, "missing")
            if ours != theirs:
                found.append(
                    Problem(f"rank {rank}", f"{name} is {theirs}, on rank 0 it is {ours}", "make the nodes equal")
                )
    return found


def check_same_on_all_ranks(runtime: Runtime, facts: Mapping[str, str]) -> None:
    """Compare `facts`, the world size and the strategy over all ranks. Collective; raises PlanError on every rank."""
    plan = runtime.plan
    # not the whole plan: nodes may differ in memory, not in what they compute
    mine = {**facts, "world size": str(runtime.world), "strategy": plan.strategy}
    mine |= {name: str(getattr(plan, name)) for name in ("device", "precision", "attention", "accumulation")}
    if runtime.world == 1:
        return
    gathered: list[Mapping[str, str]] = [{} for _ in range(runtime.world)]
    torch.distributed.all_gather_object(gathered, mine)
    problems = differences(gathered)
    if problems:
        raise PlanError(*problems)
