"""How long a step of one launch should take on the machine that it runs on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import PlanError
from phi3_dist.family.variants import Family
from phi3_dist.planning.advice import Cluster, time_of_plan
from phi3_dist.planning.facts import LaunchFacts, MachineFacts
from phi3_dist.planning.gpus import find_gpu
from phi3_dist.planning.plan import RunPlan
from phi3_dist.planning.timing import rates_of_gpu

__all__ = ["planned_step"]


def planned_step(
    cfg: RunConfig, machine: MachineFacts, launch: LaunchFacts, plan: RunPlan, model: Family | Mapping[str, Any]
) -> tuple[float, str] | None:
    """Seconds of a step of full packs, and what the figures come from; None on a CPU and a card without a data sheet.

    `model` is the base's config.json, or its family.
    """
    if machine.device == "cpu":
        return None
    try:
        gpu = find_gpu(machine.device_name)
    except PlanError:
        return None
    rates = rates_of_gpu(gpu)
    have = (machine.device_memory_gib, machine.host_memory_gib)
    cluster = Cluster(launch.nodes, launch.ranks_per_node, *have, rates, gpu, measured=machine.measured)
    return time_of_plan(cfg, cluster, launch, plan, model).total_s, rates.source
