"""What `phi3-dist plan` says of a sweep: candidates at once, rounds, memory and time. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import PlanError, Problem
from phi3_dist.planning.advice_table import seconds
from phi3_dist.planning.facts import LaunchFacts, MachineFacts
from phi3_dist.planning.plan import RunPlan, make_plan
from phi3_dist.planning.planned_step import planned_step
from phi3_dist.sweep.file import Sweep
from phi3_dist.sweep.memory import Room, rooms_of, size_sweep

__all__ = ["Forecast", "forecast", "plans_of"]


@dataclass(frozen=True)
class Forecast:
    """A sweep before it starts. `rooms`: as the largest candidate needs them; `steps_s`: of all steps, or None."""

    count: int
    at_once: int
    a_pass: int
    why: str
    rooms: tuple[Room, ...]
    steps: int | None
    steps_s: float | None
    source: str

    @property
    def rounds(self) -> int:
        return -(-self.count // self.at_once)

    def lines(self) -> Iterator[str]:
        times = "in one round" if self.rounds == 1 else f"in {self.rounds} rounds"
        in_pass = min(self.a_pass, self.at_once)
        yield f"sweep: {self.count} candidates, {self.at_once} at once, {times}, {in_pass} in a pass ({self.why})"
        for room in self.rooms:
            gib = room.gib(self.at_once, self.a_pass)
            fits = "" if room.holds(self.at_once, self.a_pass) else "; more than there is room for"
            yield f"memory: {gib:.2f} of {room.have:.1f} GiB on the {room.place} with {self.at_once} at once{fits}"
        if self.steps is None:
            yield "time: not planned: give --tokens, or set train.max_steps for all candidates"
        elif self.steps_s is None:
            yield f"time: {self.steps:,} steps of all candidates; --gpu names the card to plan their time for"
        else:
            yield f"time: at most {seconds(self.steps_s)} for {self.steps:,} steps of all candidates ({self.source})"


def _refused(cfg: RunConfig, plan: RunPlan) -> Iterator[Problem]:
    """What no sweep runs under, with the nearest that it does."""
    if cfg.model.quantization == "nf4" and plan.strategy.startswith("zero3"):
        what = "is nf4: under zero3 a sweep keeps no 4-bit shards"
        yield Problem("model.quantization", what, "nearest: fsdp2")
    if cfg.train.sequence_parallel > 1:
        what = f"is {cfg.train.sequence_parallel}: candidates are joined over whole packs"
        yield Problem("train.sequence_parallel", what, "nearest: 1, or phi3-dist train")


def plans_of(sweep: Sweep, machine: MachineFacts, launch: LaunchFacts, shape: Any) -> dict[str, RunPlan]:
    """Every candidate's plan by its name. Raises PlanError with all problems."""
    plans: dict[str, RunPlan] = {}
    problems: dict[tuple[str, str], Problem] = {}
    for one in sweep.candidates:
        try:
            plans[one.name] = plan = make_plan(one.cfg, machine, launch, family_or_shape=shape)
            problems |= {(problem.where, problem.what): problem for problem in _refused(one.cfg, plan)}
        except PlanError as error:
            problems |= {(problem.where, problem.what): problem for problem in error.problems}
    if problems:
        raise PlanError(*list(problems.values())[:20])
    return plans


def _steps(cfg: RunConfig, tokens: int | None) -> int | None:
    """The steps of a run: what the file says, or as many as these tokens of rows fill."""
    if cfg.train.max_steps is not None or tokens is None:
        return cfg.train.max_steps
    return math.ceil((cfg.train.epochs or 1) * tokens / (cfg.data.pack_length * cfg.train.global_batch))


def forecast(
    sweep: Sweep,
    plans: Mapping[str, RunPlan],
    machine: MachineFacts,
    launch: LaunchFacts,
    shape: Any,
    *,
    tokens: int | None = None,
) -> Forecast:
    """`plans`: of every candidate, by its name; `shape`: the base's, where it is known, for the time.

    `tokens`: of the training rows, for candidates without train.max_steps.
    """
    ranks, count = launch.ranks_per_node, len(sweep.candidates)
    sizing = size_sweep(sweep, plans, count, machine, ranks)
    steps = [found for one in sweep.candidates if (found := _steps(one.cfg, tokens)) is not None]
    known = sum(steps) if len(steps) == count else None
    steps_s, source = None, ""
    if known is not None and shape is not None:
        each = [planned_step(one.cfg, machine, launch, plans[one.name], shape) for one in sweep.candidates]
        timed = [step for step in each if step is not None]
        if len(timed) == count:
            steps_s = sum(number * step_s for number, (step_s, _) in zip(steps, timed, strict=True))
            source = f"{timed[0][1]}, as if they ran one after the other; loading is not counted"
    rooms = rooms_of(sizing.memory, machine, ranks)
    return Forecast(count, sizing.at_once, sizing.a_pass, sizing.why, rooms, known, steps_s, source)
