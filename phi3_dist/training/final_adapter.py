"""The adapter at the end of a run: gathered, written with its card, and told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_dist.adapters.files import AdapterReceipt, save_adapter
from phi3_dist.adapters.front_matter import said_of_hub
from phi3_dist.adapters.loading import rows_fact, trained_fact
from phi3_dist.adapters.model_card import adapter_card
from phi3_dist.config.schema import RunConfig
from phi3_dist.modeling.base import Base
from phi3_dist.training.build import Built
from phi3_dist.training.checkpoints.state import unrounded_adapter
from phi3_dist.training.context import RunContext
from phi3_dist.training.held_out_loss import HeldOut
from phi3_dist.training.inputs import RunInputs
from phi3_dist.training.run_folder import versions

__all__ = ["card_contents", "of_base_and_data", "save_final_adapter"]


def save_final_adapter(
    ctx: RunContext, inputs: RunInputs, built: Built, held_out: HeldOut | None, steps: int
) -> AdapterReceipt | None:
    """Write the adapter; one of PiSSA, whose start was taken out of the base, as one for the plain base. Collective."""
    if moved := ctx.folder.moved():
        ctx.metrics.say(moved)
    cfg, regime = ctx.cfg, built.longrope
    with ctx.folder.by_name():
        receipt = save_adapter(
            ctx.engine.model,
            ctx.folder.held / "adapter",
            tokenizer=inputs.tokenizer,
            card=adapter_card(card_contents(ctx, inputs.base, held_out, regime, steps)),
            base_hint={"revision": cfg.model.revision} if cfg.model.revision else None,
            taken_out=built.lora_init if cfg.lora.init.startswith("pissa") else None,
            unrounded=unrounded_adapter(ctx.engine, keep=ctx.runtime.is_main),
            metadata={**({"longrope": regime} if regime else {}), **rows_fact(inputs.base), **trained_fact(cfg)},
        )
    if receipt is not None:
        size = f"{receipt.bytes / 2**20:.1f} MiB, {receipt.tensors} tensors"
        ctx.metrics.say(f"adapter: {ctx.folder.adapter} ({size})")
    return receipt


def of_base_and_data(cfg: RunConfig, base: Base) -> dict[str, Any]:
    """What a card tells of the base's context and of data sets on the hub."""
    rope, sources = base.config.rope_parameters, cfg.data.train
    names = [sources] if isinstance(sources, str) else [s if isinstance(s, str) else s.path for s in sources]
    return {
        "datasets": [name for name in names if said_of_hub(name)],
        "original_context": rope.get("original_max_position_embeddings", base.config.max_position_embeddings),
        "window": base.config.sliding_window,
        "taught_tokens": len(cfg.model.new_tokens),
    }


def card_contents(
    ctx: RunContext, base: Base, held_out: HeldOut | None, regime: str | None, steps: int
) -> Mapping[str, Any]:
    """What the adapter's card tells: see adapters/model_card.py."""
    return {
        "name": ctx.cfg.name,
        "base": base.source,
        "base_is_local": base.folder is not None and Path(base.source).is_dir(),
        "revision": ctx.cfg.model.revision,
        **of_base_and_data(ctx.cfg, base),
        "lora": ctx.cfg.lora.model_dump(),
        "optim": ctx.cfg.optim.model_dump(),
        "steps": steps,
        "global_batch": ctx.order.global_batch,
        "pack_length": ctx.cfg.data.pack_length,
        "rows": len(ctx.train.rows.lengths),
        "supervised_tokens": int(ctx.train.targets.sum()),
        "data_fingerprint": ctx.identity["data"],
        "longrope": regime,
        "base_rows": base.enlarged_rows,
        "quantization": None if ctx.cfg.model.quantization == "none" else ctx.cfg.model.quantization,
        "precision": ctx.runtime.plan.precision,
        "strategy": ctx.runtime.plan.strategy,
        "world_size": ctx.runtime.world,
        "heldout_loss": held_out.loss if held_out else None,
        "heldout_perplexity": held_out.perplexity if held_out else None,
        "versions": versions(),
    }
