"""What every attention kernel gets: where the documents of a pack lie, and what all heads of a layer share.

Shapes: T tokens of a pack, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Documents", "Kernel", "Settings"]


@dataclass(frozen=True)
class Documents:
    """Where the documents of a pack lie: their lengths in tokens, and the running sum from 0 (int32, on the device)."""

    lengths: tuple[int, ...]
    cu_seqlens: Tensor | None = None

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def cumulative(self, device: torch.device) -> Tensor:
        if self.cu_seqlens is not None:
            return self.cu_seqlens
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        return torch.tensor(ends, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Settings:
    """What all heads of a layer share. `window` in positions that a query sees, itself included; None: all."""

    scale: float
    window: int | None = None
    dropout: float = 0.0
    deterministic: bool = False


Kernel = Callable[[Tensor, Tensor, Tensor, Documents, Settings], Tensor]
"""query (T, N, D), key and value (T, K, D), documents, settings → (T, N, D)."""
