"""How many candidates train at once, out of the memory plan of one run. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from phi3_dist.planning.facts import MachineFacts
from phi3_dist.planning.memory import Term

__all__ = ["candidates_at_once", "sweep_line"]

_SHARED = ("base", "quantisation", "dequantised", "gathered", "logits")
"""How the terms begin that a sweep has once, however many candidates there are."""
RESERVE = 0.1
"""The share of a device's memory that the memory plan leaves free."""


def candidates_at_once(
    together: int | Literal["auto"], count: int, memory: Sequence[Term] | None, machine: MachineFacts, ranks: int
) -> tuple[int, str]:
    """How many of `count` candidates train together, and why. `memory`: the terms of one run; `ranks`: of this node.

    A further candidate adds what one run has beside the base and its logits, which exist for one candidate at a time.
    """
    if isinstance(together, int):
        return min(count, together), "as the sweep file says"
    on_cpu = machine.device == "cpu"
    have_gib = machine.host_memory_gib / ranks if on_cpu else machine.device_memory_gib
    if memory is None or not have_gib:
        return count, "the memory of this device is not planned"
    terms = [term for term in memory if on_cpu or term.place == "device"]
    shared = sum(term.gib for term in terms if term.name.startswith(_SHARED))
    own = sum(term.gib for term in terms) - shared
    room = have_gib * (1 - RESERVE) - shared
    fitting = max(1, min(count, int(room / own) if own > 0 else count))
    return fitting, f"{shared:.2f} GiB shared and {own:.2f} GiB a candidate, of {have_gib:.1f} GiB"


def sweep_line(
    together: int | Literal["auto"], count: int, memory: Sequence[Term] | None, machine: MachineFacts, ranks: int
) -> str:
    """What `phi3-dist plan` adds for a sweep file: how many candidates train at once, and in how many rounds."""
    at_once, why = candidates_at_once(together, count, memory, machine, ranks)
    rounds = -(-count // at_once)
    times = "in one round" if rounds == 1 else f"in {rounds} rounds"
    return f"sweep: {count} candidates, {at_once} at once, {times} ({why})"
