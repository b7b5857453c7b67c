"""What a run says about itself before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from phi3_dist.data.prepare import Prepared
from phi3_dist.modeling.lora import Counts
from phi3_dist.planning.facts import Choice
from phi3_dist.planning.plan import RunPlan
from phi3_dist.training.context import RunContext
from phi3_dist.training.monitor.metrics import Metrics
from phi3_dist.training.monitor.step_phases import run_description

__all__ = ["announce", "record_start"]


def announce(
    metrics: Metrics, plan: RunPlan, prepared: Prepared, counts: Counts, total: int, *, of_model: Sequence[Choice] = ()
) -> None:
    """The choices with their reasons, the data, the model and the batch arithmetic, once, on rank 0."""
    for choice in (*plan.choices, *of_model):
        metrics.say(f"{choice.name}: {choice.value} ({choice.why})")
    packs = prepared.train
    metrics.say(
        f"data: {len(packs.rows.lengths):,} rows in {len(packs.packs):,} packs, "
        f"{int(packs.targets.sum()):,} supervised of {len(packs.rows.ids):,} tokens"
    )
    for bad in prepared.skipped:
        metrics.say(f"skipped {bad.place}: {bad.reason}")
    for place in prepared.dropped:
        metrics.say(f"dropped {place}: longer than data.pack_length")
    for notice in prepared.notices:
        metrics.say(f"note: {notice}")
    if len(packs.packs) < plan.global_batch:
        metrics.say(
            f"note: a step takes {plan.global_batch} packs and there are {len(packs.packs)}: "
            "each step sees some rows more than once (a smaller train.global_batch or data.pack_length helps)"
        )
    metrics.say(f"model: {counts}")
    metrics.say(
        f"batch: {plan.global_batch} packs a step = {plan.micro_batch} a forward pass "
        f"x {plan.accumulation} accumulation x {_ranks(plan)}; {total} steps"
    )


def _ranks(plan: RunPlan) -> str:
    shared = plan.sequence_parallel
    return (
        f"{plan.world_size} rank{'s' * (plan.world_size != 1)}"
        if shared == 1
        else f"{plan.world_size // shared} groups of {shared} ranks"
    )


def record_start(ctx: RunContext, of_model: Sequence[Choice], first: int) -> None:
    """plan.json, environment.json and a heartbeat of a run that makes its steps from `first` on. On rank 0 alone."""
    plan = replace(ctx.runtime.plan, steps=ctx.total, choices=(*ctx.runtime.plan.choices, *of_model))
    ctx.folder.write_json("plan.json", {**plan.to_dict(), "identity": dict(ctx.identity), **run_description(ctx)})
    ctx.folder.record_environment()
    ctx.folder.forget_exit()
    ctx.folder.heartbeat(first)
