"""The state of training in one form for every strategy: full float32 weights and Adam moments of what is trained.

Each engine shards these differently. In this form a checkpoint of any strategy and world size goes on under any
other. Names are the trained parameters' own, from `base_model.` on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from phi3_dist.errors import Problem, TrainingError
from phi3_dist.training.strategy import DeepSpeedEngine, Engine

__all__ = ["MOMENTS", "export_state", "import_state", "trained"]

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters, by the name that no wrapper changes."""
    for name, param in model.named_parameters():
        if param.requires_grad:
            yield ("base_model." + name.split("base_model.", 1)[1] if "base_model." in name else name), param


def _whole(tensor: Tensor) -> Tensor:
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()


def export_state(engine: Engine, *, keep: bool) -> dict[str, Tensor]:
    """Full float32 CPU tensors `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` where `keep`, else nothing.

    Collective under ZeRO and FSDP2: every rank calls it, and holds one tensor at a time.
    """
    state: dict[str, Tensor] = {}
    if isinstance(engine, DeepSpeedEngine):
        _link_moments(engine.optimizer)
    for module in engine.model.modules():
        # after an evaluation FSDP2's outermost group is still whole, in parameters that the optimizer doesn't know
        if isinstance(module, FSDPModule):
            module.reshard()
    for name, param in trained(engine.model):
        for kind in (WEIGHT, *MOMENTS):
            full = _export_one(engine, param, kind)
            if keep:
                state[f"{kind}/{name}"] = full.to(device="cpu", dtype=torch.float32, copy=True).contiguous()
    return state


def _link_moments(zero: Any) -> None:
    """Let ZeRO-1/2 find the moments of every parameter group.

    deepspeed 0.19.8 links them once, after the step of the first group, when those of the others are not yet made.
    """
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _export_one(engine: Engine, param: nn.Parameter, kind: str) -> Tensor:
    if isinstance(engine, DeepSpeedEngine):
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found = safe_get_full_fp32_param(param) if kind == WEIGHT else safe_get_full_optimizer_state(param, kind)
        assert found is not None, kind
        full: Tensor = found
        return full
    if kind == WEIGHT:
        return _whole(param)
    return _whole(engine.optimizer.state[param][kind])


def import_state(engine: Engine, state: Mapping[str, Tensor], steps: int) -> None:
    """Set weights, moments and Adam's step count. Every rank gives the whole `state` and takes its own part.

    Raises TrainingError where names or shapes differ from what this run trains.
    """
    problems = []
    params = dict(trained(engine.model))
    for name, param in params.items():
        shape = tuple(getattr(param, "ds_shape", param.shape))
        for kind in (WEIGHT, *MOMENTS):
            found = state.get(f"{kind}/{name}")
            if found is None or tuple(found.shape) != shape:
                have = "nothing" if found is None else str(tuple(found.shape))
                problems.append(Problem("checkpoint", f"{kind}/{name} holds {have}, this run trains {shape}"))
    if problems:
        raise TrainingError(*problems[:10])
    if isinstance(engine, DeepSpeedEngine):
        _import_deepspeed(engine, state, steps)
    else:
        for name, param in params.items():
            _import_torch(engine.optimizer, param, {k: state[f"{k}/{name}"] for k in (WEIGHT, *MOMENTS)}, steps)


def _copy_part(target: Tensor, value: Tensor) -> None:
    """Copy the whole `value` into `target`, or into this rank's rows of an FSDP2 shard."""
    from torch.distributed.tensor import DTensor

    from phi3_dist.modeling.base import own_rows

    with torch.no_grad():
        if isinstance(target, DTensor):
            target.to_local().copy_(value[own_rows(target)])
        else:
            target.copy_(value)


def _import_torch(optimizer: Any, param: nn.Parameter, parts: Mapping[str, Tensor], steps: int) -> None:
    _copy_part(param, parts[WEIGHT])
    group = next(g for g in optimizer.param_groups if any(p is param for p in g["params"]))
    # torch's AdamW keeps its step count on the device only where the update runs there as one kernel
    device = param.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
    optimizer.state[param] = {"step": torch.tensor(float(steps), device=device)}
    for kind in MOMENTS:
        optimizer.state[param][kind] = torch.zeros_like(param)
        _copy_part(optimizer.state[param][kind], parts[kind])


def _import_deepspeed(engine: DeepSpeedEngine, state: Mapping[str, Tensor], steps: int) -> None:
    """ZeRO keeps flat float32 partitions. Adam's state of a flat partition is born in the first step: it is made here.

    deepspeed 0.19.8: `single_partition_of_fp32_groups` (stages 1, 2) and `fp32_partitioned_groups_flat` (stage 3).
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    zero = engine.optimizer
    third = hasattr(zero, "fp32_partitioned_groups_flat")
    flats = zero.fp32_partitioned_groups_flat if third else zero.single_partition_of_fp32_groups
    for flat in flats:
        zero.optimizer.state[flat] = {"step": torch.tensor(float(steps))}
        zero.optimizer.state[flat] |= {kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS}
    _link_moments(zero)
    for name, param in trained(engine.model):
        weight = state[f"{WEIGHT}/{name}"].to(engine.model.device)
        if third:
            _import_zero3(zero, param, {k: state[f"{k}/{name}"] for k in (WEIGHT, *MOMENTS)})
        else:
            safe_set_full_fp32_param(param, weight)
            for kind in MOMENTS:
                safe_set_full_optimizer_state(param, state[f"{kind}/{name}"].to(engine.model.device), kind)
            with torch.no_grad():
                param.copy_(weight)


def _import_zero3(zero: Any, param: Any, parts: Mapping[str, Tensor]) -> None:
    """This rank's slice of each flat tensor, padded with zeros where the last rank's ends early."""
    from deepspeed import comm
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = int(param.ds_tensor.ds_numel)
    start = comm.get_rank(group=param.ds_process_group) * size
    for kind, value in parts.items():
        piece = torch.zeros(size)
        mine = value.flatten()[start : start + size]
        piece[: mine.numel()].copy_(mine)
        piece = piece.to(param.ds_tensor.device)
        if kind == WEIGHT:
            safe_set_local_fp32_param(param, piece)
            param.ds_tensor.data.view(-1)[:size].copy_(piece)
        else:
            safe_set_local_optimizer_state(param, piece, kind)
