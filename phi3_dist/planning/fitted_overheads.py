"""What finished runs on a card took beside what was planned: its context, its allocator's rounding, its step's time.

The plan counts tensors. What a card gives out beyond them is fitted here from runs that ended on it: the context is
what the device held beyond the allocator, the allocator's share what it held beyond tensors, and a step's time a factor
on the planned one. Where no run says it, a tenth of the card stays free and times are the data sheet's, as before.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from phi3_dist.planning.memory import Term, fits, total_gib
from phi3_dist.planning.timing import Rates

__all__ = ["RESERVE", "FinishedRun", "Overheads", "fit_overheads"]

RESERVE = 0.1
"""Of a card, where nothing was learned: its CUDA context, communication buffers and the allocator's rounding."""


@dataclass(frozen=True)
class FinishedRun:
    """One run on a card, of its worst rank. GiB; None where the run does not say it. `step_s` is of full packs."""

    folder: str
    device: str
    planned_gib: float | None = None
    tensors_gib: float | None = None
    reserved_gib: float | None = None
    device_used_gib: float | None = None
    planned_step_s: float | None = None
    step_s: float | None = None


@dataclass(frozen=True)
class Overheads:
    """What was learned of a card. `allocator` is a share of the tensors, `step_time` a factor."""

    device: str
    runs: int
    learned_at: str
    context_gib: float | None = None
    allocator: float | None = None
    step_time: float | None = None
    step_time_spread: float | None = None
    """The largest over the smallest factor of the runs."""
    tensors: float | None = None
    """The largest of tensors measured over planned; told, and not applied: the data may have supervised less."""

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def of(cls, values: Any) -> Overheads | None:
        """From a file that may hold anything; None where it is not one of these."""
        if not isinstance(values, dict) or not isinstance(values.get("device"), str):
            return None
        known = {field.name for field in fields(cls)} - {"device", "learned_at"}
        numbers: dict[str, Any] = {
            key: value
            for key, value in values.items()
            if key in known and isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e6
        }
        if "runs" not in numbers or not isinstance(values.get("learned_at"), str):
            return None
        numbers["runs"] = int(numbers["runs"])
        return cls(device=values["device"], learned_at=values["learned_at"], **numbers)

    def leaves_room(self, terms: Sequence[Term], memory_gib: float) -> bool:
        """Whether tensors, allocator and context fit. Without both figures a tenth is kept free, as ever."""
        if self.context_gib is None or self.allocator is None:
            return fits(terms, memory_gib, RESERVE)
        return total_gib(terms) * (1 + self.allocator) + self.context_gib <= memory_gib

    def slower(self, rates: Rates) -> Rates:
        """The rates with which a step takes as long as the runs say."""
        factor = self.step_time
        if factor is None or factor <= 0:
            return rates
        return replace(
            rates,
            flops=rates.flops / factor,
            memory=rates.memory / factor,
            network=rates.network / factor,
            between=rates.between / factor,
            host_layer_s={by: each * factor for by, each in rates.host_layer_s.items()},
        )

    @property
    def words(self) -> str:
        """One clause of the plan's first line."""
        clauses = []
        if self.context_gib is not None:
            clauses.append(f"context {self.context_gib:.1f} GiB")
        if self.allocator is not None:
            clauses.append(f"allocator {self.allocator:.0%} of the tensors")
        if self.step_time is not None:
            clauses.append(f"step time × {self.step_time:.2f}")
        ran = "1 run" if self.runs == 1 else f"{self.runs} runs"
        return f"learned from {ran} on {self.learned_at}: {', '.join(clauses)}"


def fit_overheads(runs: Sequence[FinishedRun], today: str) -> Overheads:
    """The overheads of one card: the worst of memory, so that what fits does; the median of time."""
    contexts, shares, tensors, factors = list[float](), list[float](), list[float](), list[float]()
    for run in runs:
        if run.device_used_gib and run.reserved_gib:
            contexts.append(max(0.0, run.device_used_gib - run.reserved_gib))
        if run.reserved_gib and run.tensors_gib:
            shares.append(max(0.0, run.reserved_gib / run.tensors_gib - 1))
        if run.tensors_gib and run.planned_gib:
            tensors.append(run.tensors_gib / run.planned_gib)
        if run.step_s and run.planned_step_s:
            factors.append(run.step_s / run.planned_step_s)

    def worst(values: list[float]) -> float | None:
        return round(max(values), 4) if values else None

    return Overheads(
        device=runs[0].device,
        runs=len(runs),
        learned_at=today,
        context_gib=worst(contexts),
        allocator=worst(shares),
        step_time=round(statistics.median(factors), 4) if factors else None,
        step_time_spread=round(max(factors) / min(factors), 4) if factors else None,
        tensors=worst(tensors),
    )
