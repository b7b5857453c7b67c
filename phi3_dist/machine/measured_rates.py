"""How fast this machine's device, memory and network are, as `phi3-dist doctor --bandwidth` measured them here.

One JSON file for each device, in the user's cache. No torch: `phi3-dist plan` reads it on a login node.

    {"device": "NVIDIA H200", "measured_at": "2026-11-28", "torch": "2.13.0",
     "matrix_bf16_tflops": 754.8, "matrix_fp32_tflops": 51.2, "memory_gbps": 4200.0,
     "network_gbps": 310.0, "all_gather_gbps": 310.0, "reduce_scatter_gbps": 322.0, "collective_s": 3e-05,
     "network_ranks": 8, "network_nodes": 1, "network_backend": "nccl", "network_measured_at": "2026-11-28"}

Rates in 10¹² operations and 10⁹ bytes a second: of the whole device for `matrix_…`, reads and writes together for
`memory_gbps`, what one rank sends in a ring of all ranks for `…_gbps` of the network. `network_gbps` is the slower of
its two collectives. What was not measured is absent.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from phi3_dist.config.json_text import parse_json
from phi3_dist.errors import MachineError
from phi3_dist.machine.card_measurements import file_name_of
from phi3_dist.machine.storage import cache_folder

__all__ = ["MeasuredRates", "keep_rates", "rates_file", "rates_measured_here"]


@dataclass(frozen=True)
class MeasuredRates:
    """What one measurement found; None where it was not measured."""

    device: str
    measured_at: str
    """Day, as 2026-11-28."""
    torch: str = ""
    matrix_bf16_tflops: float | None = None
    matrix_fp32_tflops: float | None = None
    memory_gbps: float | None = None
    network_gbps: float | None = None
    all_gather_gbps: float | None = None
    reduce_scatter_gbps: float | None = None
    collective_s: float | None = None
    """Seconds of a collective over a few bytes."""
    network_ranks: int | None = None
    network_nodes: int | None = None
    network_backend: str | None = None
    network_measured_at: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


_TEXTS = ("device", "measured_at", "torch", "network_backend", "network_measured_at")


def _folder() -> Path:
    """In the cache; for a user without a home, one of the machine's temporary folders that is theirs alone."""
    try:
        return cache_folder() / "rates"
    except MachineError:
        return Path(tempfile.gettempdir()) / f"phi3_dist_{os.getuid()}" / "rates"


def rates_file(device: str) -> Path:
    """Where the rates of a device of this name are kept."""
    return _folder() / file_name_of(device)


def rates_measured_here(device: str) -> MeasuredRates | None:
    """What was measured here on a device of this name; None where nothing was, or what is there is no such file.

    A file of another user's is left alone: where there is no home, anybody may write beside it.
    """
    file = rates_file(device)
    try:
        if file.stat().st_uid not in (os.getuid(), 0):
            return None
        found = parse_json(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return _of(found) if isinstance(found, dict) else None


def _of(found: Mapping[str, Any]) -> MeasuredRates | None:
    """The known keys with values of their kind; None where the device or the day is missing."""
    known: dict[str, Any] = {}
    for name in (field.name for field in fields(MeasuredRates)):
        value = found.get(name)
        if name in _TEXTS:
            if isinstance(value, str):
                known[name] = value
        elif isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"):
            known[name] = value
    return MeasuredRates(**known) if {"device", "measured_at"} <= known.keys() else None


def keep_rates(rates: MeasuredRates) -> Path:
    """Write the rates for this machine's plans. A measurement without a network leaves the network's last one.

    Raises OSError where there is no room, or no right to write.
    """
    before = rates_measured_here(rates.device)
    values = rates.to_dict()
    if rates.network_gbps is None and before is not None:
        network = ("network_", "all_gather", "reduce_scatter", "collective")
        values |= {key: value for key, value in before.to_dict().items() if key.startswith(network)}
    file = rates_file(rates.device)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)
    return file
