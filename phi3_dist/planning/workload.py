"""From a run file and a launch to what decides its memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from phi3_dist.config.schema import RunConfig
from phi3_dist.family.variants import Shape
from phi3_dist.planning.dequantized_layers import choose_kept_layers, stored_as
from phi3_dist.planning.facts import LaunchFacts, MachineFacts
from phi3_dist.planning.memory import SHIPPED_ZERO, Term, Workload, adapter_parameters, memory_terms

__all__ = ["account", "adapter_counts", "workload_of"]


def adapter_counts(cfg: RunConfig, shape: Shape) -> tuple[int, int]:
    """Parameters of the adapter that train, and those that only lie there."""
    lora = cfg.lora
    trainable, everything = (
        adapter_parameters(
            shape,
            lora.r,
            lora.targets,
            dora=lora.dora,
            modules_to_save=lora.modules_to_save,
            rank_pattern=lora.rank_pattern,
            layers=lora.layers,
            freeze_a=freeze_a,
            new_tokens=len(cfg.model.new_tokens),
        )
        for freeze_a in (lora.freeze_a, False)
    )
    return trainable, everything - trainable


def workload_of(
    cfg: RunConfig, machine: MachineFacts, launch: LaunchFacts, *, precision: str, kernels: str
) -> Workload:
    """What decides one rank's memory, before anything is known of kept weights."""
    lora, zero = cfg.lora, launch.zero_settings.get("zero_optimization")
    return Workload(
        strategy=launch.strategy,
        world_size=launch.world_size,
        precision=precision,
        quantization=stored_as(cfg.model.quantization, precision, kernels, fp8=cfg.model.fp8),
        pack_length=cfg.data.pack_length,
        micro_batch=cfg.train.micro_batch,
        activation_checkpointing=cfg.model.activation_checkpointing,
        dropout=lora.dropout,
        optimizer=cfg.optim.name,
        device=machine.device,
        fused=cfg.model.fused_lora and cfg.model.fused_layers and not lora.dora,
        chunked="lm_head" not in lora.targets,
        kernels=kernels,
        rank=max([lora.r, *lora.rank_pattern.values()]),
        accumulation=max(
            1, cfg.train.global_batch * cfg.train.sequence_parallel // (cfg.train.micro_batch * launch.world_size)
        ),
        sequence_parallel=cfg.train.sequence_parallel,
        fp8=cfg.model.fp8,
        zero=zero if isinstance(zero, Mapping) else SHIPPED_ZERO,
    )


def account(
    cfg: RunConfig, machine: MachineFacts, launch: LaunchFacts, shape: Shape, **chosen: Any
) -> tuple[Workload, tuple[Term, ...], str]:
    """The workload with its kept weights, the account of one rank, and for NF4 why so many are kept.

    `chosen`: precision and kernels.
    """
    trainable, frozen = adapter_counts(cfg, shape)
    load = workload_of(cfg, machine, launch, **chosen)
    terms = memory_terms(shape, trainable, load, frozen)
    if load.quantization != "nf4":
        return load, terms, ""
    host_gib = machine.host_memory_gib / launch.ranks_per_node
    have = host_gib if machine.device == "cpu" else machine.device_memory_gib
    fused = cfg.model.fused_lora and not cfg.lora.dora
    kept, why = choose_kept_layers(cfg.model.dequantized_layers, shape, load, terms, have, fused=fused)
    load = replace(load, kept_layers=kept)
    return load, memory_terms(shape, trainable, load, frozen), why
