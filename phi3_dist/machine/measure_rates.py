"""The rates of this machine, measured in under 30 s: matrix products, memory, and what the ranks send each other.

`phi3-dist doctor --bandwidth` measures alone, or on every rank of a launch; measured_rates.py keeps what it found.
Ranks that share a CPU measure at the same time, and what they reach together is the CPU's rate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import date
from statistics import median
from typing import Any

from phi3_dist.machine.measured_rates import MeasuredRates
from phi3_dist.machine.process_group import Ranks

__all__ = ["measure_rates"]

BUDGET_S = 2.0
"""Of each of the six measurements; of one whose call takes longer, two calls."""
SIZES: Mapping[str, Mapping[str, int]] = {
    "cuda": {"bf16": 8192, "fp32": 4096, "copy": 2**30, "network": 2**28},
    "cpu": {"bf16": 1024, "fp32": 1024, "copy": 2**28, "network": 2**24},
}
"""Side of a square matrix; bytes that are copied; bytes that all ranks hold after a gather."""


def measure_rates(
    ranks: Ranks, device_name: str, *, budget_s: float = BUDGET_S, sizes: Mapping[str, int] | None = None
) -> MeasuredRates:
    """What this device reaches, and the slowest rank's share of the network. Collective; the same on every rank."""
    import torch

    sizes = sizes or SIZES[ranks.device]
    device = torch.device("cuda", ranks.local_rank) if ranks.device == "cuda" else torch.device("cpu")
    mine: dict[str, float] = {}
    with torch.inference_mode():
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            ranks.barrier()
            mine[f"matrix_{name}_tflops"] = _matrix_tflops(device, dtype, sizes[name], budget_s)
        ranks.barrier()
        mine["memory_gbps"] = _memory_gbps(device, _room(device, sizes["copy"], ranks), budget_s)
        network = _network(ranks, device, sizes["network"], budget_s) if ranks.world > 1 else {}
    every = ranks.gather((ranks.node, mine))
    # a GPU is one rank's own, and the slowest decides; a CPU's ranks share it
    nodes = {node for node, _ in every}
    values = {
        key: min(found[key] for _, found in every)
        if ranks.device == "cuda"
        else min(sum(found[key] for of, found in every if of == node) for node in nodes)
        for key in mine
    }
    return MeasuredRates(
        device=device_name, measured_at=date.today().isoformat(), torch=str(torch.__version__), **values, **network
    )


def _median_s(call: Callable[[], Any], device: Any, budget_s: float) -> float:
    """Median seconds of a call, after one that warms up: as many as the budget has room for, one at least."""
    import torch

    def timed() -> float:
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    timed()  # takes memory, and makes pages
    seconds: list[float] = []
    until = time.perf_counter() + budget_s
    while len(seconds) < 1000 and (not seconds or time.perf_counter() < until):
        seconds.append(timed())
    return median(seconds)


def _matrix_tflops(device: Any, dtype: Any, side: int, budget_s: float) -> float:
    import torch

    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(one)
    return 2 * side**3 / _median_s(lambda: torch.mm(one, other, out=out), device, budget_s) / 1e12


def _room(device: Any, size: int, ranks: Ranks) -> int:
    """Bytes to copy: no more than an eighth of what is free for this rank."""
    import psutil
    import torch

    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available // ranks.per_node
    return int(max(2**20, min(size, free // 8)))


def _memory_gbps(device: Any, size: int, budget_s: float) -> float:
    import torch

    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _median_s(lambda: target.copy_(source), device, budget_s) / 1e9


def _network(ranks: Ranks, device: Any, size: int, budget_s: float) -> dict[str, Any]:
    """All-gather and reduce-scatter over all ranks. The slowest rank's, the same on every rank. Collective."""
    import torch

    share = size // 4 // ranks.world
    small, whole = torch.ones(share, device=device), torch.ones(share * ranks.world, device=device)
    few, many = torch.ones(1, device=device), torch.ones(ranks.world, device=device)
    group: Any = torch.distributed
    # the newer names are those of torch 2.13
    gather = getattr(group, "all_gather_single", None) or group.all_gather_into_tensor
    scatter = getattr(group, "reduce_scatter_single", None) or group.reduce_scatter_tensor
    collectives = {
        "all_gather": lambda: gather(whole, small),
        "reduce_scatter": lambda: scatter(small, whole),
        "few": lambda: gather(many, few),
    }
    seconds = {name: _together_s(ranks, call, device, budget_s) for name, call in collectives.items()}
    sent = share * 4 * (ranks.world - 1) / 1e9
    rates = {f"{name}_gbps": sent / seconds[name] for name in ("all_gather", "reduce_scatter")}
    return {
        **rates,
        "network_gbps": min(rates.values()),
        "collective_s": seconds["few"],
        "network_ranks": ranks.world,
        "network_nodes": ranks.nodes,
        "network_backend": "nccl" if device.type == "cuda" else "gloo",
        "network_measured_at": date.today().isoformat(),
    }


def _together_s(ranks: Ranks, call: Callable[[], Any], device: Any, budget_s: float) -> float:
    """Seconds of a collective on the slowest rank: every rank calls it as often as the others. Collective."""
    import torch

    def timed(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / times

    timed(1)  # connections are made by the first
    slowest = float(max(ranks.gather(timed(1))))
    times = min(1000, int(budget_s / max(slowest, 1e-9)))
    return float(max(ranks.gather(timed(times)))) if times > 1 else slowest
