"""From rows to the batch of a step.

Three things are laid out once and never change during a run: the rows as one long array of tokens (`TokenRows`), the
packs they stand in (`Packs`), and the endless stream of packs that steps are cut from (`Order`). With them the batch
of step n is a pure function of (data fingerprint, seed, global batch, n): no rank, world size or history goes in.
Shapes: T tokens of a joined batch, S predicted supervised positions in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from phi3_dist.data.pack.packs import Packs

__all__ = [
    "Order",
    "PackedBatch",
    "assemble",
]


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


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Packs joined into one ragged row without padding. The loss of position predict_S[i] has target target_S[i]."""

    ids_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    """Position in the own document: restarts at 0 with each."""
    cu_seqlens: NDArray[np.int32]
    """Document boundaries, shape (documents + 1,); document d is [cu_seqlens[d], cu_seqlens[d+1])."""
    max_length: int
    """Tokens of the longest document."""
    predict_S: NDArray[np.int64]
    """The positions whose next token is supervised and in the same document, ascending."""
    target_S: NDArray[np.int64]
    """That next token's id."""
    places: tuple[str, ...]
    """Where each document was read."""


def assemble(packs: Packs, which: Sequence[int]) -> PackedBatch:
    """Join the packs `which`, in that order."""
    rows = packs.rows
    documents = [row for pack in which for row in packs.packs[pack]]
    if not documents:
        raise ValueError("a batch needs at least one pack")
    slices = [slice(int(rows.offsets[i]), int(rows.offsets[i + 1])) for i in documents]
    lengths = rows.lengths[documents]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    ids_T = np.concatenate([rows.ids[s] for s in slices]).astype(np.int64)
    learned_T = np.concatenate([rows.supervised[s] for s in slices])
    learned_T[starts] = False  # nothing of the same document comes before it
    target_at_S = np.flatnonzero(learned_T)
    return PackedBatch(
        ids_T=ids_T,
        positions_T=np.arange(len(ids_T), dtype=np.int64) - np.repeat(starts, lengths),
        cu_seqlens=np.concatenate([np.zeros(1, np.int64), ends]).astype(np.int32),
        max_length=int(lengths.max()),
        predict_S=target_at_S - 1,
        target_S=ids_T[target_at_S],
        places=tuple(rows.places[i] for i in documents),
    )
