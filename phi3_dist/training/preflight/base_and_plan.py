"""Base, tokenizer, fields that are `auto` and plan of a real start: their mistakes in one report, and the free room."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_dist.config.schema import RunConfig
from phi3_dist.family.variants import Shape
from phi3_dist.machine.incomplete_launch import whole_number
from phi3_dist.modeling.base import Base
from phi3_dist.planning.auto_fields import auto_fields, plan_with_auto
from phi3_dist.planning.facts import LaunchFacts, MachineFacts
from phi3_dist.planning.plan import RunPlan
from phi3_dist.training.auto_values import AutoValues
from phi3_dist.training.inputs import find_model
from phi3_dist.training.preflight.collect import Collected
from phi3_dist.training.preflight.launcher_settings import not_read
from phi3_dist.training.preflight.memory_and_disk import refuse_no_room

__all__ = ["Planned", "model_or_problems", "plan_start"]

Model = tuple[Base, Any, list[int]]


def model_or_problems(
    cfg: RunConfig, machine: MachineFacts, launch: LaunchFacts, found: Collected
) -> tuple[Model | None, RunPlan | None]:
    """Base, tokenizer and ids of new tokens, and the plan; None for what `found` has the problems of."""
    model = found.ask(lambda: find_model(cfg))
    shape = None if model is None else model[0].config.to_dict()
    planned = found.ask(lambda: plan_with_auto(cfg, machine, launch, shape))
    return model, None if planned is None else planned[1]


@dataclass(frozen=True)
class Planned:
    """A run with a value in each field, what it loads, its plan, and what rank 0 prints."""

    cfg: RunConfig
    model: Model
    plan: RunPlan
    auto: AutoValues
    lines: list[str]


def plan_start(  # noqa: PLR0917 -- called in one place
    cfg: RunConfig,
    machine: MachineFacts,
    launch: LaunchFacts,
    environ: Mapping[str, str],
    cache: Path,
    resumed: Path | None,
) -> Planned:
    """`resumed`: the folder to continue in. Raises ModelError or PlanError with the mistakes of both; MachineError."""
    found = Collected()
    model, plan = model_or_problems(cfg, machine, launch, found)
    found.raise_all()
    assert model is not None
    assert plan is not None
    base, tokenizer, _ = model
    auto = AutoValues(cfg, machine, launch, base.config.to_dict(), resumed=resumed)
    if auto_fields(cfg):
        auto.count_rows(tokenizer, cache)
        cfg, plan = auto.plan()
    shape = Shape.of(base.config.to_dict())
    local_rank = whole_number(environ, "LOCAL_RANK", 0)
    lines = refuse_no_room(cfg, plan, launch, environ, shape, local_rank=local_rank)
    return Planned(cfg, model, plan, auto, [*not_read(cfg, environ, plan), *lines])
