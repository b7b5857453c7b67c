"""`phi3-dist doctor`: this machine, or every node of a launch, as one list of findings on rank 0."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

from phi3_dist.errors import Phi3DistError
from phi3_dist.machine.doctor import diagnose
from phi3_dist.machine.findings import Finding, merged, of_error
from phi3_dist.machine.measure_rates import measure_rates
from phi3_dist.machine.measured_rates import MeasuredRates, keep_rates
from phi3_dist.machine.nodes import NodeView, clock_findings, differing, node_facts
from phi3_dist.machine.probe import probe
from phi3_dist.machine.process_group import Ranks, joined
from phi3_dist.machine.storage import CACHE_FIX, storage_fault

__all__ = ["Examined", "examine"]


@dataclass(frozen=True)
class Examined:
    """What was found, the same on every rank that met the others; `speaks`: this one prints it."""

    findings: tuple[Finding, ...]
    speaks: bool


def examine(*, bandwidth: bool = False) -> Examined:
    """Look at this machine and, in a launch, at the others; with `bandwidth`, measure and keep their rates."""
    mine = diagnose()
    if any(one.level == "bad" and one.check in ("launch", "torch") for one in mine):
        return Examined(tuple(mine), speaks=True)
    machine = probe()
    device = "cuda" if bandwidth and machine.device == "cuda" else "cpu"
    try:
        with joined(device) as ranks:
            found = merged(ranks.gather(mine))
            if ranks.world > 1:
                found += differing(ranks.gather(node_facts(machine, ranks)))
                ranks.barrier()
                found += clock_findings(ranks.gather(NodeView(ranks.node, socket.gethostname(), time.time())))
            if bandwidth:
                found += _rates(measure_rates(ranks, machine.device_name), ranks)
            return Examined(tuple(found), speaks=ranks.rank == 0)
    except Phi3DistError as error:
        return Examined((*mine, *of_error("launch", error)), speaks=True)


def _rates(rates: MeasuredRates, ranks: Ranks) -> Iterator[Finding]:
    """What was measured, and where rank 0 has kept it."""
    if ranks.rank:
        return
    units = (
        ("matrix_bf16_tflops", "TFLOP/s of matrix products in bf16"),
        ("matrix_fp32_tflops", "TFLOP/s of matrix products in fp32"),
        ("memory_gbps", "GB/s of memory, read and written"),
        ("all_gather_gbps", f"GB/s that a rank sends in an all-gather of {ranks.world}"),
        ("reduce_scatter_gbps", f"GB/s that a rank sends in a reduce-scatter of {ranks.world}"),
    )
    values = rates.to_dict()
    for name, unit in units:
        if name in values:
            yield Finding("ok", f"{values[name]:,.4g} {unit}", check="bandwidth")
    if rates.collective_s is not None:
        yield Finding("ok", f"{rates.collective_s * 1e6:,.0f} µs for a collective of a few bytes", check="bandwidth")
    if ranks.world == 1:
        fix = "accelerate launch … -m phi3_dist doctor --bandwidth measures it too"
        yield Finding("ok", "the network was not measured: one process", fix, "bandwidth")
    try:
        yield Finding("ok", f"kept for the plans of this machine in {keep_rates(rates)}", check="bandwidth")
    except OSError as error:
        what, fix = storage_fault(error, CACHE_FIX)
        yield Finding("warn", f"not kept: {what}", fix, "bandwidth")
