"""Changes of a run file that take less memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from phi3_dist.config.schema import RunConfig
from phi3_dist.planning.facts import LaunchFacts

__all__ = ["smaller"]


def smaller(cfg: RunConfig, launch: LaunchFacts) -> Iterator[tuple[str, RunConfig, LaunchFacts]]:
    """Changes that take less memory, as they are written on the command line, the cheapest first."""

    def changed(**sections: Mapping[str, Any]) -> RunConfig:
        new = {name: getattr(cfg, name).model_copy(update=dict(keys)) for name, keys in sections.items()}
        return cfg.model_copy(update=new)

    if cfg.train.micro_batch > 1:
        yield "train.micro_batch=1", changed(train={"micro_batch": 1}), launch
    if not cfg.model.activation_checkpointing:
        yield "model.activation_checkpointing=true", changed(model={"activation_checkpointing": True}), launch
    if cfg.model.quantization == "none" and not cfg.model.fp8:
        yield "model.quantization=nf4", changed(model={"quantization": "nf4"}), launch
        both = {"quantization": "nf4", "activation_checkpointing": True}
        yield "model.quantization=nf4 model.activation_checkpointing=true", changed(model=both), launch
    for parts in (2, 4, 8):
        if parts > cfg.train.sequence_parallel and launch.world_size % parts == 0:
            name, shared = f"train.sequence_parallel={parts}", {"sequence_parallel": parts}
            name += "" if cfg.model.activation_checkpointing else " model.activation_checkpointing=true"
            yield name, changed(train=shared, model={"activation_checkpointing": True}), launch
    for length in (2048, 1024, 512):
        if length < cfg.data.pack_length:
            yield f"data.pack_length={length}", changed(data={"pack_length": length}), launch
    if launch.strategy == "ddp":
        yield "configs/accelerate/zero3.yaml", cfg, replace(launch, strategy="zero3")
