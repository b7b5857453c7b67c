"""Base, tokenizer and plan of a real start, their mistakes in one report, with the room that is free for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi3_dist.config.schema import RunConfig
from phi3_dist.family.variants import Shape
from phi3_dist.machine.incomplete_launch import whole_number
from phi3_dist.modeling.base import Base
from phi3_dist.planning.facts import LaunchFacts, MachineFacts
from phi3_dist.planning.plan import RunPlan, make_plan
from phi3_dist.training.inputs import find_model
from phi3_dist.training.preflight.collect import Collected
from phi3_dist.training.preflight.launcher_settings import not_read
from phi3_dist.training.preflight.room import refuse_no_room

__all__ = ["model_and_plan", "model_or_problems"]

Model = tuple[Base, Any, list[int]]


def model_or_problems(
    cfg: RunConfig, machine: MachineFacts, launch: LaunchFacts, found: Collected
) -> tuple[Model | None, RunPlan | None]:
    """Base, tokenizer and ids of new tokens, and the plan; None for what `found` has the problems of."""
    model = found.ask(lambda: find_model(cfg))
    shape = None if model is None else model[0].config.to_dict()
    return model, found.ask(lambda: make_plan(cfg, machine, launch, family_or_shape=shape))


def model_and_plan(
    cfg: RunConfig, machine: MachineFacts, launch: LaunchFacts, environ: Mapping[str, str]
) -> tuple[Model, RunPlan, list[str]]:
    """With the lines that rank 0 says. Raises ModelError or PlanError with the mistakes of both; MachineError."""
    found = Collected()
    model, plan = model_or_problems(cfg, machine, launch, found)
    found.raise_all()
    assert model is not None
    assert plan is not None
    shape = Shape.of(model[0].config.to_dict())
    local_rank = whole_number(environ, "LOCAL_RANK", 0)
    lines = refuse_no_room(cfg, plan, launch, environ, shape, local_rank=local_rank)
    return model, plan, [*not_read(cfg, environ, plan), *lines]
