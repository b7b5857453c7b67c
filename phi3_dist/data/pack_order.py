"""Which packs each step takes: the order of an epoch, shuffled from the seed, and what of it each rank gets.

The endless stream of packs is laid out once and never changes during a run, and the packs of step n are a pure function
of (number of packs, seed, global batch, n): no rank, world size or history goes in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["Order"]


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of n packs in one epoch.

    Drawn from PCG64's raw 64-bit stream, which numpy promises to keep, and not by `Generator.permutation`, which it
    does not (NEP 19): a run resumed under another numpy sees the same order.
    """
    stream = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    order = np.argsort(stream.random_raw(n), kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


@dataclass(frozen=True)
class Order:
    """Which packs each step, rank and accumulation slot gets.

    Epochs laid end to end make one endless stream of packs; step n (from 0) is its positions
    n*global_batch … (n+1)*global_batch - 1. Invariants:
    - every pack appears exactly once in each epoch, whatever the global batch; a step may span two epochs;
    - the packs of a step depend on (n_packs, seed, shuffle, global_batch, step) alone;
    - the slots of all ranks hold each position of the step exactly once, and slot a of rank r of w is the positions
      [(a*w + r)*micro_batch, + micro_batch): as many slots, of the same size, for every rank.
    """

    n_packs: int
    global_batch: int
    seed: int
    shuffle: bool

    def __post_init__(self) -> None:
        if self.n_packs < 1 or self.global_batch < 1 or self.seed < 0:
            raise ValueError(f"not an order of packs: {self}")

    def packs_of_step(self, step: int) -> NDArray[np.int64]:
        """The packs of a step, in stream order; shape (global_batch,)."""
        if step < 0:
            raise ValueError(f"steps count from 0, not {step}")
        positions = np.arange(step * self.global_batch, (step + 1) * self.global_batch, dtype=np.int64)
        epochs, within = np.divmod(positions, self.n_packs)
        if not self.shuffle:
            return within
        found = np.empty_like(within)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            found[here] = _permutation(self.n_packs, self.seed, epoch)[within[here]]
        return found

    def slots(self, step: int, rank: int, world: int, micro_batch: int) -> list[list[int]]:
        """What one rank does in a step: for each accumulation slot, the packs of its forward pass.

        Raises ValueError where global_batch is not a multiple of world * micro_batch.
        """
        if not 0 <= rank < world or micro_batch < 1:
            raise ValueError(f"no such rank or micro batch: rank {rank} of {world}, micro batch {micro_batch}")
        if self.global_batch % (world * micro_batch):
            raise ValueError(
                f"global batch {self.global_batch} is not a multiple of {world} ranks × micro batch {micro_batch}"
            )
        packs = self.packs_of_step(step).reshape(-1, world, micro_batch)
        return [[int(pack) for pack in slot] for slot in packs[:, rank]]

    def steps(self, epochs: float) -> int:
        """Steps that `epochs` passes take, the last one filled up from the next epoch."""
        # the written decimal is meant: 1.1 epochs of 10 packs are 11, not ceil(11.000000000000002)
        return math.ceil(Fraction(str(epochs)) * self.n_packs / self.global_batch)
