"""One process, or the several that a launcher has started: each computes its share, rank 0 has the whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Ranks", "joined"]

_WAIT = timedelta(hours=2)
"""Ranks may end their answers at very different times."""


@dataclass(frozen=True)
class Ranks:
    """Who this process is among the others."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum over ranks, on each. Collective."""
        if self.world == 1:
            return values
        tensor = torch.from_numpy(values.copy())
        if torch.distributed.get_backend() == "nccl":
            tensor = tensor.cuda()
        torch.distributed.all_reduce(tensor)
        return np.asarray(tensor.cpu().numpy(), dtype=np.float64)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in their order, on each. Collective."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, value)
        return found


@contextmanager
def joined(device: str | None = None) -> Iterator[Ranks]:
    """The ranks of this launch, while the block runs; of a process group that is there already, its ranks.

    Without a launcher's RANK and WORLD_SIZE: one process.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.distributed.is_initialized():
        yield Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return
    if "RANK" not in os.environ or world == 1:
        yield Ranks()
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=_WAIT)
    try:
        yield Ranks(int(os.environ["RANK"]), world)
    finally:
        torch.distributed.destroy_process_group()
