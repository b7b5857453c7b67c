"""Greedy answers of a model that trains: no cache, every strategy, through the very forward pass of a step.

Each new token costs a pass over all prompts and what has been answered so far: for a few rows at an evaluation. Answers
at leisure are made by inference/engine.py.

Shapes: T tokens of the rows under way, joined; B such rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

__all__ = ["packed_answers"]


@torch.no_grad()
def packed_answers(
    model: Any,
    prompts: Sequence[list[int]],
    stops: Collection[int],
    *,
    max_new_tokens: int,
    device: torch.device,
    agree: Callable[[bool], tuple[bool, int]],
) -> tuple[list[list[int]] | None, int]:
    """The new ids of each prompt without the one that ended it, or None and the signal that broke it off. Collective.

    `model` is a PackedLoss, whatever wraps it. `agree` is told whether this rank has rows under way, and says whether
    any rank has, and the stop signal that any has got: every rank makes the same number of passes, since under ZeRO-3
    and FSDP2 each is a collective. A rank needs one prompt at least. The model's mode is left as it is.
    """
    rows = [list(prompt) for prompt in prompts]
    new: list[list[int]] = [[] for _ in prompts]
    under_way = list(range(len(rows)))
    for _ in range(max_new_tokens):
        anyone, stop = agree(bool(under_way))
        if stop:
            return None, stop
        if not anyone:
            break
        asked = under_way or [0]  # whose own are done goes along
        chosen = _next_tokens(model, [rows[i] for i in asked], device)
        still = []
        for i, token in zip(under_way, chosen, strict=False):
            if token not in stops:
                rows[i].append(token)
                new[i].append(token)
                still.append(i)
        under_way = still
    return new, 0


def _next_tokens(model: Any, rows: Sequence[list[int]], device: torch.device) -> list[int]:
    """The likeliest next token of each row, all of them in one pass of joined documents."""
    lengths = tuple(len(row) for row in rows)
    ends_B = torch.tensor(lengths, device=device).cumsum(0)
    tokens = model(
        ids_T=torch.tensor([token for row in rows for token in row], device=device),
        positions_T=torch.tensor([i for length in lengths for i in range(length)], device=device),
        predict_S=ends_B - 1,
        target_S=None,
        cu_seqlens=torch.nn.functional.pad(ends_B, (1, 0)).to(torch.int32),
        lengths=lengths,
    )
    return [int(token) for token in tokens.tolist()]
