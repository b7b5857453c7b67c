"""The ranks of a launch in one group, for verbs that ask all of them and train nothing."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from phi3_dist.errors import MachineError, Problem
from phi3_dist.machine.incomplete_launch import refuse_half_a_launch, whole_number

__all__ = ["Ranks", "joined"]

WAIT_S = 120.0
"""Until the last rank has come. Importing torch takes a cold node half a minute."""


@dataclass(frozen=True)
class Ranks:
    """Who this process is among the others. `device` is `cuda` where they also meet over NCCL."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    node: int = 0
    nodes: int = 1
    device: str = "cpu"

    @property
    def per_node(self) -> int:
        return max(1, self.world // self.nodes)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank. Collective."""
        if self.world == 1:
            return [value]
        import torch

        gathered: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        self.gather(None)


def _ranks(device: str) -> Ranks:
    environ = os.environ
    refuse_half_a_launch(environ)
    world = whole_number(environ, "WORLD_SIZE", 1)
    per_node = max(1, whole_number(environ, "LOCAL_WORLD_SIZE", world))
    return Ranks(
        rank=whole_number(environ, "RANK", 0),
        world=world,
        local_rank=whole_number(environ, "LOCAL_RANK", 0),
        node=whole_number(environ, "GROUP_RANK", 0),
        nodes=whole_number(environ, "GROUP_WORLD_SIZE", 0) or max(1, world // per_node),
        device=device,
    )


@contextlib.contextmanager
def joined(device: str = "cpu") -> Iterator[Ranks]:
    """Meet the other ranks of the launch that the environment describes; alone without one.

    Values go over gloo, and tensors on a GPU over NCCL where `device` is `cuda`. Raises PlanError for half a launch,
    MachineError where the others don't come.
    """
    ranks = _ranks(device)
    if ranks.world == 1:
        yield ranks
        return
    import torch

    backend: str = "gloo"
    options: dict[str, Any] = {}
    if device == "cuda":
        torch.cuda.set_device(ranks.local_rank)
        backend, options = "cpu:gloo,cuda:nccl", {"device_id": torch.device("cuda", ranks.local_rank)}
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        torch.distributed.init_process_group(backend, timeout=timedelta(seconds=WAIT_S), **options)
    except (RuntimeError, ValueError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        what = f"rank {ranks.rank} of {ranks.world} on {socket.gethostname()} did not meet the others: {said}"
        raise MachineError(Problem(where, what, "start every node, and let them reach this port")) from error
    try:
        yield ranks
    finally:
        torch.distributed.destroy_process_group()
