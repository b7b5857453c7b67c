"""Everything that the steps of a run need, and what the run says about itself before the first."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_dist.adapters.front_matter import said_of_hub
from phi3_dist.config.schema import RunConfig
from phi3_dist.data.batch import Order
from phi3_dist.data.pack.packs import Packs
from phi3_dist.data.prepare import Prepared
from phi3_dist.modeling.base import Base
from phi3_dist.modeling.lora import Counts
from phi3_dist.planning.facts import Choice
from phi3_dist.planning.plan import RunPlan
from phi3_dist.training.engines.engine import Engine
from phi3_dist.training.evaluate import HeldOut
from phi3_dist.training.monitor.metrics import Metrics
from phi3_dist.training.monitor.profiling import StepProfile
from phi3_dist.training.monitor.start_clock import StartClock
from phi3_dist.training.monitor.time_left import TimeLeft
from phi3_dist.training.run_folder import RunFolder, versions
from phi3_dist.training.runtime import Runtime
from phi3_dist.training.signals import StopFlag

__all__ = [
    "Stage",
    "announce",
    "card_contents",
    "longest_row",
    "measured",
    "of_base_and_data",
    "steps_of_an_evaluation",
    "tokens_of_rank",
]


@dataclass(frozen=True)
class Stage:
    """What the steps share. `facts` is the identity that a checkpoint carries (training/checkpoints/identity.py)."""

    cfg: RunConfig
    runtime: Runtime
    engine: Engine
    train: Packs
    validation: Packs | None
    order: Order
    total: int
    metrics: Metrics
    folder: RunFolder
    facts: Mapping[str, Any]
    clock: StartClock
    profile: StepProfile
    flag: StopFlag
    time_left: TimeLeft


def longest_row(prepared: Prepared) -> int:
    """Tokens of the longest row that is trained on or measured: LongRoPE's one regime has to serve both."""
    parts = (prepared.train, *((prepared.held_out,) if prepared.held_out else ()))
    return max(int(packs.rows.lengths.max()) for packs in parts)


def tokens_of_rank(packs: Packs, taken: int, world: int) -> int:
    """Tokens that one rank of `world` trains on while all take so many packs, on average."""
    return len(packs.rows.ids) * taken // (len(packs.packs) * world)


def measured(stage: Stage, step: int) -> bool:
    """Whether metrics.jsonl holds the held-out loss after `step`, as rank 0 sees it. Collective."""
    found = False
    if stage.runtime.is_main:
        with contextlib.suppress(OSError):
            lines = stage.folder.metrics.read_text("utf-8", errors="replace").splitlines()
            rows = (json.loads(line) for line in lines if '"kind": "eval"' in line)  # torn lines are cut by now
            found = any(row.get("step") == step for row in rows)
    return bool(stage.runtime.broadcast("yes" if found else ""))


def steps_of_an_evaluation(train: Packs, held_out: Packs | None, order: Order) -> float:
    """Tokens of all held-out rows over those of a step, on average."""
    if held_out is None:
        return 0.0
    return len(held_out.rows.ids) / (len(train.rows.ids) / len(train.packs) * order.global_batch)


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
        f"x {plan.accumulation} accumulation x {plan.world_size} ranks; {total} steps"
    )


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


def card_contents(stage: Stage, base: Base, held_out: HeldOut | None, regime: str | None) -> Mapping[str, Any]:
    """What the adapter's card tells: see adapters/card.py."""
    return {
        "name": stage.cfg.name,
        "base": base.source,
        "base_is_local": base.folder is not None and Path(base.source).is_dir(),
        "revision": stage.cfg.model.revision,
        **of_base_and_data(stage.cfg, base),
        "lora": stage.cfg.lora.model_dump(),
        "optim": stage.cfg.optim.model_dump(),
        "steps": stage.total,
        "global_batch": stage.order.global_batch,
        "pack_length": stage.cfg.data.pack_length,
        "rows": len(stage.train.rows.lengths),
        "supervised_tokens": int(stage.train.targets.sum()),
        "data_fingerprint": stage.facts["data"],
        "longrope": regime,
        "base_rows": base.enlarged_rows,
        "quantization": None if stage.cfg.model.quantization == "none" else stage.cfg.model.quantization,
        "precision": stage.runtime.plan.precision,
        "strategy": stage.runtime.plan.strategy,
        "world_size": stage.runtime.world,
        "heldout_loss": held_out.loss if held_out else None,
        "heldout_perplexity": held_out.perplexity if held_out else None,
        "versions": versions(),
    }
