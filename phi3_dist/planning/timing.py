"""How long a step takes, and what it waits for: arithmetic, memory, launches, or the network. An estimate.

The shares of data-sheet rates and the host's seconds were measured on one H200 (docs/gpu.md): products at 0.78 of the
data sheet's rate; Triton's kernels give out a layer's forward and backward in 4.5 ms of the host's time and torch's
operations in 6.3, and a layer's passes between products move about 7 and 12 times what autograd keeps of them. Network
shares and waits are assumptions: no run over several GPUs was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from phi3_dist.family.variants import Shape
from phi3_dist.planning.gpus import Gpu
from phi3_dist.planning.traffic import Traffic

__all__ = ["Rates", "StepTime", "rates_of_gpu", "step_flops", "step_time"]

OF_TFLOPS, OF_MEMORY, OF_NETWORK = 0.78, 0.8, 0.75
LAYER_HOST_S = {"triton": 4.5e-3, "torch": 6.3e-3, "library": 9.0e-3}
RECOMPUTED = 4 / 3
"""Of the host's work for a layer, with its forward a second time."""
PASSES = {"triton": 7.0, "torch": 12.0, "library": 20.0}
_STEP_S = 4e-3
_RING_S, _HOP_S = 2e-5, 3e-6
"""A collective's start, and for each node that a ring goes through."""
_PCIE_GBS = 25.0


@dataclass(frozen=True)
class Rates:
    """What one rank reaches: floating-point operations and bytes a second, and where the figures come from.

    `network` is one rank's share inside a node, `between` what a whole node sends to others.
    """

    flops: float
    memory: float
    network: float
    between: float
    host_layer_s: Mapping[str, float] = field(default_factory=lambda: LAYER_HOST_S)
    source: str = ""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by what they are spent on; they overlap, so `total_s` is less than their sum."""

    arithmetic_s: float
    memory_s: float
    launches_s: float
    network_s: float
    host_s: float
    total_s: float
    binds: str

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def rates_of_gpu(gpu: Gpu, *, network_gbit: float | None = None) -> Rates:
    """From a data sheet; `network_gbit`: what a node sends to others, Gbit/s."""
    between = (network_gbit if network_gbit is not None else gpu.network_gbit) / 8 * 1e9
    # a data sheet counts both directions of a link
    return Rates(
        flops=gpu.tflops * 1e12 * OF_TFLOPS,
        memory=gpu.memory_gbs * 1e9 * OF_MEMORY,
        network=gpu.link_gbs / 2 * 1e9 * OF_NETWORK,
        between=between * OF_NETWORK,
        source=f"{gpu.name}'s {gpu.source}, of which {OF_TFLOPS:.0%} of the arithmetic as measured on an H200",
    )


def step_flops(shape: Shape, trainable: int, *, tokens: int, length: int, supervised: float, recompute: bool) -> float:
    """Operations of one micro batch of `tokens` in packs of `length`: forward, and the gradients of inputs and adapter.

    Attention is counted over packs of one document, causally.
    """
    linear = 2 * shape.linear_parameters * (3 if recompute else 2)
    attention = 2 * shape.layers * shape.q_out * length * (1 + 2.5 + (1 if recompute else 0))
    head = 2 * 2 * shape.vocab * shape.hidden * supervised
    return tokens * (linear + attention + head + 6 * trainable + (2 * trainable if recompute else 0))


def step_time(
    shape: Shape,
    rates: Rates,
    traffic: Traffic,
    *,
    flops: float,
    saved_bytes: float,
    accumulation: int,
    by: str,
    recompute: bool,
    dequantized_bytes: float,
    nodes: int,
    on_gpu: bool,
    shared_inside: bool = True,
) -> StepTime:
    """`flops`, `saved_bytes` (what autograd keeps without recomputing) and `dequantized_bytes` are a micro batch's.

    `shared_inside`: ranks that share packs are in one node.
    """
    again = RECOMPUTED if recompute else 1.0
    arithmetic = accumulation * flops / rates.flops
    memory = accumulation * (saved_bytes * PASSES[by] * again + dequantized_bytes) / rates.memory
    launches = accumulation * shape.layers * rates.host_layer_s[by] * again + _STEP_S if on_gpu else 0.0
    rate = rates.network if nodes == 1 else min(rates.network, rates.between)
    waits = traffic.collectives * (_RING_S + nodes * _HOP_S)
    gathered = traffic.gathered / rate + waits
    reduced = traffic.reduced / rate + traffic.exchanged / (rates.network if shared_inside else rate)
    host = traffic.host / (_PCIE_GBS * 1e9)
    device = arithmetic + memory
    total = max(device, launches, gathered) + reduced + host
    if device >= max(launches, gathered):
        binds = "arithmetic" if arithmetic >= memory else "memory"
    else:
        binds = "launches" if launches >= gathered else "network"
    if reduced + host > total / 2:
        binds = "network" if reduced >= host else "host memory"
    return StepTime(arithmetic, memory, launches, gathered + reduced, host, total, binds)
