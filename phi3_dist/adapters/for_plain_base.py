"""An adapter that was trained beside a changed base, as one for the plain base.

PiSSA trains W - s·B₀A₀ + s·BA. Of the plain W that is the update s·(BA - B₀A₀), an adapter of twice the rank with
A' = [A; A₀] and B' = [B, -B₀]. PEFT's conversion does this with a second adapter in the model; here it is done on the
gathered tensors, at the cost of the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["MOVED_BASE", "on_plain_base"]

MOVED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts of PEFT (`init_lora_weights`) that change the base: what is saved under them does not fit the plain one."""


def on_plain_base(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], initial: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of the doubled adapter. `initial`: A₀ and B₀ under the same names, float32.

    Scales stay as they are, of single modules too: alpha grows with the rank, or with its root under rsLoRA.
    """
    grown = dict(tensors)
    for name, first in initial.items():
        ours = tensors[name].float()
        grown[name] = torch.cat((ours, first), 0) if ".lora_A." in name else torch.cat((ours, -first), 1)
    factor = math.sqrt(2) if config.get("use_rslora") else 2
    return grown, {
        **config,
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {key: 2 * rank for key, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in (config.get("alpha_pattern") or {}).items()},
    }
