"""How many candidates train at once, out of the memory plan of one run. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from phi3_dist.planning.facts import MachineFacts
from phi3_dist.planning.memory import Term

__all__ = ["candidates_a_pass", "candidates_at_once", "sweep_line"]

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
    on_cpu = machine.device == "cpu"
    have_gib = machine.host_memory_gib / ranks if on_cpu else machine.device_memory_gib
    if memory is None or not have_gib:
        return count, "the memory of this device is not planned"
    terms = [term for term in memory if on_cpu or term.place == "device"]
    shared = sum(term.gib for term in terms if term.name.startswith(_SHARED))
    passing = sum(term.gib for term in terms if term.name.startswith(_OF_A_PASS))
    own = sum(term.gib for term in terms) - shared - passing
    room = have_gib * (1 - RESERVE) - shared
    fitting = next((n for n in range(count, 1, -1) if own * n + passing * min(n, a_pass) <= room), 1)
    why = f"{shared:.2f} GiB shared, {own:.2f} GiB a candidate and {passing:.2f} GiB for each in a pass"
    return fitting, f"{why}, of {have_gib:.1f} GiB"


def sweep_line(
    together: int | Literal["auto"],
    count: int,
    memory: Sequence[Term] | None,
    machine: MachineFacts,
    *,
    ranks: int,
    a_pass: int,
) -> str:
    """What `phi3-dist plan` adds for a sweep file: how many candidates train at once, and in how many rounds."""
    at_once, why = candidates_at_once(together, count, memory, machine, ranks=ranks, a_pass=a_pass)
    rounds = -(-count // at_once)
    times = "in one round" if rounds == 1 else f"in {rounds} rounds"
    return f"sweep: {count} candidates, {at_once} at once, {times}, {min(a_pass, at_once)} in a pass ({why})"
