"""Where DeepSpeed's ZeRO keeps the float32 weights and Adam's moments of what trains, and how to read and set them.

Written against deepspeed 0.19.8, whose three optimizers lay them out in three ways: stages 1 and 2
(`DeepSpeedZeroOptimizer`), stage 1 in bf16 with gradients in float32 (`BF16_Optimizer`), and stage 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MOMENTS", "export_tensor", "flat_masters", "link_moments", "new_moments", "set_tensors", "step_count"]

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"


def step_count(optimizer: Any, target: Tensor, steps: int) -> Tensor:
    """Adam's count as torch keeps it: on the device only where the update runs there as one kernel."""
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return torch.tensor(float(steps), device=target.device if on_device else torch.device("cpu"))


def flat_masters(zero: Any) -> list[Tensor]:
    """The flat float32 partitions of this rank, which ZeRO's inner optimizer steps."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(zero, name):
            flats: list[Tensor] = getattr(zero, name)
            return flats
    raise AssertionError(f"{type(zero).__name__} keeps its float32 weights somewhere else")


def link_moments(zero: Any) -> None:
    """Let stages 1 and 2 find the moments of every parameter group.

    DeepSpeed links them once, after the step of the first group, when those of the others are not yet made.
    """
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def new_moments(zero: Any, steps: int) -> None:
    """Make Adam's state of every flat partition, which else is born in the first step, with moments of zero."""
    for flat in flat_masters(zero):
        zero.optimizer.state[flat] = {"step": step_count(zero.optimizer, flat, steps)}
        zero.optimizer.state[flat] |= {kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS}
    link_moments(zero)


def export_tensor(param: nn.Parameter, kind: str) -> Tensor:
    """The whole float32 `weight`, `exp_avg` or `exp_avg_sq` of a parameter. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = safe_get_full_fp32_param(param) if kind == WEIGHT else safe_get_full_optimizer_state(param, kind)
    assert found is not None, kind
    full: Tensor = found
    return full


def set_tensors(zero: Any, param: nn.Parameter, tensors: Mapping[str, Tensor]) -> None:
    """Set the float32 weight and moments that `tensors` holds whole; the model's own weight follows, in its dtype.

    Every rank gives them and takes its own part. Moments have to exist: see `new_moments`.
    """
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        _set_stage3(param, tensors)
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    for kind, whole in tensors.items():
        value = whole.to(param.device)
        if kind != WEIGHT:
            safe_set_full_optimizer_state(param, value, kind)
            continue
        safe_set_full_fp32_param(param, value)
        with torch.no_grad():
            param.copy_(value)


def _set_stage3(param: Any, tensors: Mapping[str, Tensor]) -> None:
    """This rank's slice of each flat tensor, padded with zeros where the last rank's ends early."""
    from deepspeed import comm
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = int(param.ds_tensor.ds_numel)
    start = comm.get_rank(group=param.ds_process_group) * size
    for kind, value in tensors.items():
        piece = torch.zeros(size)
        mine = value.flatten()[start : start + size]
        piece[: mine.numel()].copy_(mine)
        piece = piece.to(param.ds_tensor.device)
        if kind == WEIGHT:
            safe_set_local_fp32_param(param, piece)
            param.ds_tensor.data.view(-1)[:size].copy_(piece)
        else:
            safe_set_local_optimizer_state(param, piece, kind)
