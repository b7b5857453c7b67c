"""How many candidates train at once, out of the memory plan of one run. Imports no torch. GiB throughout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from phi3_dist.planning.facts import MachineFacts
from phi3_dist.planning.memory import Term, is_sharded
from phi3_dist.planning.plan import RunPlan
from phi3_dist.sweep.file import Sweep

__all__ = ["Room", "Sizing", "candidates_a_pass", "candidates_at_once", "largest_of", "rooms_of", "size_sweep"]

_SHARED = ("base", "quantisation", "dequantised", "gathered", "logits")
"""How the terms begin that a sweep has once, however many candidates there are."""
_OF_A_PASS = ("activations", "backward's own")
"""Those that a forward pass has for each candidate in it."""
_PASS_TOKENS = {"cpu": 512, "cuda": 8192}
RESERVE = 0.1
"""The share of a device's memory that the memory plan leaves free."""


def candidates_a_pass(
    pass_tokens: int | Literal["auto"], pack_tokens: int, device: str, quantization: str = "none"
) -> int:
    """How many candidates share a forward pass. `pack_tokens`: what one brings at most, pack length × micro batch.

    The same on every rank, whatever its packs hold: ranks that shard the base must make the same passes. One over an
    int8 base: LLM.int8() keeps those columns in 16 bits that have an outlier in any row of the product, so that the
    rows of one candidate would change the numbers of another.
    """
    if quantization == "int8":
        return 1
    tokens = _PASS_TOKENS[device] if pass_tokens == "auto" else pass_tokens
    return max(1, tokens // pack_tokens)


@dataclass(frozen=True)
class Room:
    """One place's memory, in GiB: what a sweep has there once, for each candidate, and for each of a forward pass."""

    place: str
    shared: float
    own: float
    passing: float
    have: float

    def gib(self, count: int, a_pass: int) -> float:
        """What `count` candidates take that train together."""
        return self.shared + self.own * count + self.passing * min(count, a_pass)

    def holds(self, count: int, a_pass: int) -> bool:
        return self.gib(count, a_pass) <= self.have * (1 - RESERVE)


def rooms_of(memory: Sequence[Term] | None, machine: MachineFacts, ranks: int) -> tuple[Room, ...]:
    """Where a sweep needs memory; none where that is not planned. `memory`: of one run; `ranks`: of this node."""
    host_gib = machine.host_memory_gib / ranks
    on_cpu = machine.device == "cpu"
    places = {"host": host_gib} if on_cpu else {"device": machine.device_memory_gib, "host": host_gib}
    found = []
    for place, have in places.items():
        terms = [term for term in memory or () if on_cpu or term.place == place]
        if not have or not terms:
            continue
        shared = sum(term.gib for term in terms if term.name.startswith(_SHARED))
        passing = sum(term.gib for term in terms if term.name.startswith(_OF_A_PASS))
        found.append(Room(place, shared, sum(term.gib for term in terms) - shared - passing, passing, have))
    return tuple(found)


def largest_of(plans: Mapping[str, RunPlan]) -> str:
    """The candidate that takes most memory: what is counted for it holds for all. The first where none is planned."""
    return max(plans, key=lambda name: sum(term.gib for term in plans[name].memory or ()))


def candidates_at_once(
    together: int | Literal["auto"],
    count: int,
    memory: Sequence[Term] | None,
    machine: MachineFacts,
    *,
    ranks: int,
    a_pass: int,
) -> tuple[int, str]:
    """How many of `count` candidates train together, and why. `memory`: the terms of one run; `ranks`: of this node.

    A further candidate adds its adapter, gradients and moments; activations exist for the `a_pass` candidates of one
    pass, the logits for one candidate at a time, the base once.
    """
    if isinstance(together, int):
        return min(count, together), "as the sweep file says"
    rooms = rooms_of(memory, machine, ranks)
    if not rooms:
        return count, "the memory of this device is not planned"
    tightest = min(rooms, key=lambda room: _most(room, count, a_pass))
    return _most(tightest, count, a_pass), (
        f"on the {tightest.place} {tightest.shared:.2f} GiB shared, {tightest.own:.2f} GiB a candidate and "
        f"{tightest.passing:.2f} GiB for each in a pass, of {tightest.have:.1f} GiB"
    )


@dataclass(frozen=True)
class Sizing:
    """How a sweep's candidates train: so many at once, so many of them in a forward pass, and why."""

    at_once: int
    a_pass: int
    why: str
    memory: Sequence[Term] | None
    """Of the candidate that takes most."""


def size_sweep(sweep: Sweep, plans: Mapping[str, RunPlan], count: int, machine: MachineFacts, ranks: int) -> Sizing:
    """For `count` of its candidates, by the plans of all; `ranks`: of this node.

    A base in shards is gathered in each pass, whatever the pass holds: `pass_tokens: auto` then takes as many
    candidates as memory holds.
    """
    plan, memory = next(iter(plans.values())), plans[largest_of(plans)].memory
    pack_tokens = sweep.cfg.data.pack_length * plan.micro_batch
    quantization = sweep.cfg.model.quantization
    a_pass = candidates_a_pass(sweep.pass_tokens, pack_tokens, plan.device, quantization)
    at_once, why = candidates_at_once(sweep.together, count, memory, machine, ranks=ranks, a_pass=a_pass)
    gathered = plan.world_size > 1 and is_sharded(plan.strategy)
    if gathered and sweep.pass_tokens == "auto" and quantization != "int8":
        rooms = rooms_of(memory, machine, ranks)
        wider = [n for n in range(a_pass + 1, at_once + 1) if rooms and all(room.holds(at_once, n) for room in rooms)]
        if wider:
            a_pass, why = wider[-1], f"{why}; each pass gathers the base, so that one takes all that memory holds"
    return Sizing(at_once, a_pass, why, memory)


def _most(room: Room, count: int, a_pass: int) -> int:
    return next((n for n in range(count, 1, -1) if room.holds(n, a_pass)), 1)
