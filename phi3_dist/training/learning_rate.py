"""The learning rate of each step: a linear warm-up, then the schedule."""

from __future__ import annotations

import math

from phi3_dist.config.schema import OptimConfig

__all__ = ["learning_rate"]


def learning_rate(step: int, total: int, cfg: OptimConfig) -> float:
    """The learning rate of step `step` (from 0) of `total`. Warm-up is linear and its last step reaches the peak."""
    warmup = round(cfg.warmup * total) if cfg.warmup < 1 else min(round(cfg.warmup), total)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    if cfg.schedule == "constant":
        return cfg.lr
    share = (step - warmup) / max(total - warmup, 1)
    return cfg.lr * (1 - share if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share)))
