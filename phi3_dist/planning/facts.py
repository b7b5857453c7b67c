"""What the plan is made from, as plain values, and what it decides: a value with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["MachineFacts", "LaunchFacts", "Choice"]


@dataclass(frozen=True)
class MachineFacts:
    """What this node is. Memory in GiB; `packages` maps a distribution to its version, absent where not installed.

    `capability` is the CUDA compute capability; None on a CPU, and where it isn't known. `no_compiler` is the reason
    why torch can compile nothing here; empty where it can. `varlen_arguments` are the names that torch's `varlen_attn`
    takes here; None where that was not looked up. `measured` is what was measured on a card of this name
    (machine/card_measurements.py); empty where nothing was.
    """

    device: str
    device_name: str
    devices_per_node: int
    device_memory_gib: float
    host_memory_gib: float
    cpu_count: int
    fast_bf16: bool
    fast_bf16_reason: str
    packages: Mapping[str, str] = field(default_factory=dict)
    capability: tuple[int, int] | None = None
    no_compiler: str = ""
    varlen_arguments: frozenset[str] | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LaunchFacts:
    """What the launcher set up, as the environment tells it, and what it was asked for, as its command line does.

    `rank` is this process's, over all nodes. `strategy` is one of `STRATEGIES`; `zero_settings` is the DeepSpeed JSON
    as read, empty without DeepSpeed; `asked_world_size` is None where no launcher was found; `use_cpu`: a CPU was
    asked for.
    """

    world_size: int = 1
    nodes: int = 1
    strategy: str = "single"
    asked_world_size: int | None = None
    asked_by: str = ""
    zero_settings: Mapping[str, Any] = field(default_factory=dict)
    use_cpu: bool = False
    rank: int = 0

    @property
    def ranks_per_node(self) -> int:
        """At least 1, also for facts that the plan is about to refuse."""
        return max(1, self.world_size // self.nodes)


@dataclass(frozen=True)
class Choice:
    """A decision and its reason, shown once at start and kept in the run folder."""

    name: str
    value: str
    why: str
