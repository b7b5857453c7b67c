"""From rows to the batch of a step.

Three things are laid out once and never change during a run: the rows as one long array of tokens (`TokenRows`), the
packs that they are in (`Packs`), and the endless stream of packs that steps are cut from (pack_order.py). So the batch
of step n is a pure function of (data fingerprint, seed, global batch, n): no rank, world size or history goes in.
Shapes: T tokens of a joined batch, S predicted supervised positions in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phi3_dist.data.pack.packs import Packs

__all__ = [
    "PackedBatch",
    "assemble",
]


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
