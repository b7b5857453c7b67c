"""What each rank does in test_sweep_ranks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phi3_dist.bench.load import start
from phi3_dist.modeling.base import find_base
from phi3_dist.sweep.base import load_shared
from phi3_dist.sweep.loop import _agreed
from phi3_dist.sweep.memory import Sizing


def held(strategy: str, folder: str) -> tuple[int, int]:
    """Bytes of the base's weights that this rank holds before any pass, and those of the whole base."""
    cfg, runtime = start(strategy, Path(folder))
    joint, _ = load_shared(cfg, find_base(folder), runtime, longest_row=64, tokens=0)
    here = whole = 0
    for param in joint.parameters():
        shard: Any = getattr(param, "ds_tensor", None)
        shard = shard if shard is not None else param.to_local() if hasattr(param, "to_local") else param
        here += shard.numel() * shard.element_size()
        whole += getattr(param, "ds_numel", param.numel()) * param.element_size()
    return here, whole


def sized() -> tuple[int, int, str]:
    """What ranks agree on that had room for different counts."""
    _, runtime = start("ddp", Path("microsoft/Phi-3-mini-4k-instruct"))
    own = Sizing(5 - runtime.rank, 2 + runtime.rank, f"by rank {runtime.rank}", None)
    found = _agreed(own, runtime)
    return found.at_once, found.a_pass, found.why
