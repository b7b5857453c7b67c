"""Whoever takes NF4 wants to save memory: what to say where a run file makes it take more than LoRA would."""

from __future__ import annotations

from collections.abc import Sequence

from phi3_dist.config.schema import RunConfig
from phi3_dist.family.variants import Shape
from phi3_dist.planning.facts import LaunchFacts, MachineFacts
from phi3_dist.planning.memory import Term, Workload, total_gib
from phi3_dist.planning.workload import account

__all__ = ["larger_than_lora"]


def larger_than_lora(
    cfg: RunConfig,
    machine: MachineFacts,
    launch: LaunchFacts,
    shape: Shape,
    *,
    terms: Sequence[Term],
    load: Workload,
) -> str:
    """The end of a sentence that names the key, for an NF4 plan with kept weights; empty where NF4 saves memory."""
    if not load.kept_layers:
        return ""
    whole = cfg.model_copy(update={"model": cfg.model.model_copy(update={"quantization": "none"})})
    _, other, _ = account(whole, machine, launch, shape, precision=load.precision, kernels=load.kernels)
    place = "host" if load.device == "cpu" else "device"
    ours, theirs = total_gib(terms, place), total_gib(other, place)
    if ours <= theirs:
        return ""
    return f"; so NF4 takes {ours:.1f} GiB and LoRA without it {theirs:.1f}: model.dequantized_layers=0 keeps none"
