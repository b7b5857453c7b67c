"""Packs that several ranks share: who shares with whom, and the part of a joined batch that one of them gets.

Ranks [g·P, (g + 1)·P) of the launch share their packs, each a run of neighbouring tokens; the groups are to packs what
ranks are without sharing (`train.sequence_parallel`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from phi3_dist.data.batch import PackedBatch
from phi3_dist.data.pack.packs import Packs
from phi3_dist.errors import DataError, Problem
from phi3_dist.modeling.attention.sequence_parallel import Rows, Share, equal_parts

__all__ = ["Cut", "check_packs", "cut_batch", "join_group"]


@dataclass(frozen=True, eq=False)
class Cut:
    """Part `part` of `degree`, which the ranks of `group` have between them."""

    part: int
    degree: int
    group: Any


def join_group(rank: int, world: int, degree: int) -> Cut | None:
    """This rank's group of neighbours; None where nobody shares. Collective: every rank joins in making all groups.

    A group of its own even where it is everyone: on a GPU its exchanges then don't queue behind gradients.
    """
    if degree == 1:
        return None
    groups = [dist.new_group(list(range(first, first + degree))) for first in range(0, world, degree)]
    return Cut(rank % degree, degree, groups[rank // degree])


def check_packs(degree: int, *packs: Packs | None) -> None:
    """Raises DataError for a pack with fewer tokens than the ranks that should share it."""
    for one in packs:
        if one is None or degree == 1:
            continue
        sizes = [int(one.rows.lengths[list(rows)].sum()) for rows in one.packs]
        fewest = min(sizes)
        if fewest < degree:
            place = one.rows.places[one.packs[sizes.index(fewest)][0]]
            what = f"is {degree}, and the pack of {place} has {fewest} tokens to share"
            raise DataError(Problem("train.sequence_parallel", what, "leave that row out, or nearest: 1"))


def cut_batch(batch: PackedBatch, cut: Cut) -> tuple[slice, slice, Share]:
    """Which tokens of the batch and which of its supervised positions are this rank's, and its share.

    What is predicted goes with the position that predicts it: the token behind a border is known to the rank before it.
    A rank may have no supervised position, never no token: see `check_packs`.
    """
    counts = equal_parts(len(batch.ids_T), cut.degree)
    ends = np.cumsum((0, *counts))
    start, stop = int(ends[cut.part]), int(ends[cut.part + 1])
    first, last = (int(n) for n in np.searchsorted(batch.predict_S, (start, stop)))
    tokens, supervised = Rows(start, stop, len(batch.ids_T)), Rows(first, last, len(batch.predict_S))
    return slice(start, stop), slice(first, last), Share(cut.group, counts, tokens, supervised)
