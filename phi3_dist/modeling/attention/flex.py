"""flex attention over packed documents, from their boundaries alone. One of `packed_kernels.KERNELS`.

Shapes: T tokens of a pack, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phi3_dist.modeling.attention.kernel_interface import Documents, Settings

__all__ = ["block_mask", "flex"]

_BLOCK = 128


@lru_cache(maxsize=8)
def block_mask(lengths: tuple[int, ...], window: int | None, device: torch.device) -> Any:
    """Documents, causality and window as flex attention's `BlockMask`, from the boundaries alone.

    torch's `create_block_mask` evaluates the whole T × T mask first. Here all follows from one number for each
    query, the first key that it sees, which never decreases: a block of queries sees one run of blocks of keys.
    Cached: every layer of a pack asks for the same one.
    """
    from torch.nn.attention.flex_attention import BlockMask

    total = sum(lengths)
    starts = np.repeat(np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    first = starts if window is None else np.maximum(starts, np.arange(total) - window + 1)
    count = -(-total // _BLOCK)
    first = np.concatenate([first, np.full(count * _BLOCK - total, total - 1)])
    last_rows = np.minimum(np.arange(1, count + 1) * _BLOCK, total) - 1
    blocks = np.arange(count)
    lowest = first[::_BLOCK] // _BLOCK
    lowest_full = np.maximum(-(-first[last_rows] // _BLOCK), lowest)
    seen = (blocks >= lowest[:, None]) & (blocks <= blocks[:, None])
    full = (blocks >= lowest_full[:, None]) & (blocks < blocks[:, None])
    first_T = torch.tensor(first, device=device)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first_T[query])

    def lists(mask: np.ndarray) -> tuple[Tensor, Tensor]:
        """For each row the number of blocks, and their indices first."""
        order = np.argsort(~mask, axis=1, kind="stable")
        numbers = (mask.sum(1)[None, None], order[None, None])
        counts, indices = (torch.tensor(n, dtype=torch.int32, device=device) for n in numbers)
        return counts, indices

    return BlockMask.from_kv_blocks(
        *lists(seen & ~full), *lists(full), BLOCK_SIZE=_BLOCK, mask_mod=mask_mod, seq_lengths=(total, total)
    )


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex(query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, documents: Documents, settings: Settings) -> Tensor:
    """flex attention, compiled on CUDA. On a CPU it has no backward and runs uncompiled: for checks only."""
    from torch.nn.attention.flex_attention import flex_attention

    device = query_TND.device
    window = settings.window if settings.window is not None and settings.window < documents.longest else None
    call = _compiled_flex() if device.type == "cuda" else flex_attention
    heads_first = (t.transpose(0, 1)[None].to(value_TKD.dtype) for t in (query_TND, key_TKD, value_TKD))
    out_1NTD = call(
        *heads_first,
        block_mask=block_mask(documents.lengths, window, device),
        scale=settings.scale,
        enable_gqa=query_TND.shape[1] != key_TKD.shape[1],
    )
    out_TND: Tensor = out_1NTD[0].transpose(0, 1)
    return out_TND.to(query_TND.dtype)
