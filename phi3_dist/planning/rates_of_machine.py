"""The rates that a plan counts with: a card's data sheet, and in its place what was measured on this machine.

`found` is what `phi3-dist doctor --bandwidth` kept (machine/measured_rates.py), as plain values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from phi3_dist.planning.timing import Rates

__all__ = ["with_measured"]


def with_measured(rates: Rates, found: Mapping[str, Any], *, precision: str = "bf16", nodes: int = 1) -> Rates:
    """`rates` with each that was measured on this machine in its place, and a source that says so.

    The network is one rank's share inside a node, or, where ranks of several nodes were measured, between them; a
    measurement inside one node says nothing about what lies between two.
    """
    changed: dict[str, Any] = {}
    words = []
    flops, memory = found.get(f"matrix_{precision}_tflops"), found.get("memory_gbps")
    if flops:
        changed["flops"] = flops * 1e12
        words.append(f"{flops:,.4g} TFLOP/s in {precision}")
    if memory:
        changed["memory"] = memory * 1e9
        words.append(f"memory {memory:,.4g} GB/s")
    network, ranks = found.get("network_gbps"), int(found.get("network_ranks") or 1)
    measured_nodes = int(found.get("network_nodes") or 1)
    if network and ranks > 1:
        # a ring's one link between two nodes carries what a single rank sends
        if measured_nodes > 1:
            changed["between"] = network * 1e9
        else:
            changed["network"] = network * 1e9
        where = f"{measured_nodes} nodes" if measured_nodes > 1 else "one node"
        words.append(f"network {network:,.4g} GB/s a rank, {ranks} ranks on {where}")
    if not changed:
        return rates
    rest = [name for name in ("flops", "memory") if name not in changed]
    if "network" not in changed or (nodes > 1 and "between" not in changed):
        rest.append("network")
    words_of_rest = f"; {' and '.join(rest)} from {rates.source}" if rest else ""
    source = f"measured here on {found['measured_at']}: {', '.join(words)}{words_of_rest}"
    return replace(rates, **changed, source=source)
