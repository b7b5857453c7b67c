"""The state of training in one form for every strategy: full float32 weights and Adam moments of what is trained.

Each engine shards these differently. In this form a checkpoint of any strategy and world size goes on under any
other. Names are the trained parameters' own, from `base_model.` on.

bitsandbytes' 8-bit moments are kept as they are, bytes and the maximum of each block, since dequantised and quantised
again some would differ. Its 32-bit ones are AdamW's under other names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from phi3_dist.adapters.select import choose
from phi3_dist.errors import Problem, TrainingError
from phi3_dist.training.checkpoints.files import Checkpoint, read_state
from phi3_dist.training.engines.backward_and_update import DeepSpeedEngine, Engine
from phi3_dist.training.engines.optimizer import trained
from phi3_dist.training.engines.zero_state import (
    MOMENTS,
    export_tensor,
    link_moments,
    new_moments,
    set_tensors,
    step_count,
)

__all__ = ["BLOCKS", "export_state", "import_state", "restore", "unrounded_adapter"]

BLOCKS = ("state1", "absmax1", "state2", "absmax2")
"""An 8-bit moment of bitsandbytes: a byte for each value, and the float32 maximum of each block. The table that gives
the bytes their values is a constant of the library."""
WEIGHT = "weight"


def _whole(tensor: Tensor) -> Tensor:
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()


def _on_host(full: Tensor) -> Tensor:
    dtype = full.dtype if full.dtype == torch.uint8 else torch.float32
    return full.to(device="cpu", dtype=dtype, copy=True).contiguous()


def export_state(engine: Engine, *, keep: bool) -> dict[str, Tensor]:
    """Full float32 CPU tensors `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` where `keep`, else nothing.

    8-bit moments are `BLOCKS` in place of the last two. Collective under ZeRO and FSDP2: every rank calls it, and holds
    one tensor at a time.
    """
    state: dict[str, Tensor] = {}
    if isinstance(engine, DeepSpeedEngine):
        link_moments(engine.optimizer)
    for module in engine.model.modules():
        # after an evaluation FSDP2's outermost group is still whole, in parameters that the optimizer doesn't know
        if isinstance(module, FSDPModule):
            module.reshard()
    for name, param in trained(engine.model):
        for kind, full in _export_one(engine, param):
            if keep:
                state[f"{kind}/{name}"] = _on_host(full)
    return state


def _export_one(engine: Engine, param: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """The weight and its moments, one at a time."""
    if isinstance(engine, DeepSpeedEngine):
        for kind in (WEIGHT, *MOMENTS):
            yield kind, export_tensor(param, kind)
        return
    yield WEIGHT, _whole(param)
    state = engine.optimizer.state[param]
    for kind, name in _kept_as(state):
        yield kind, _whole(state[name])


def _kept_as(state: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What a parameter's moments are called in a checkpoint and in its optimizer's state (torch's or bitsandbytes')."""
    if "state1" not in state:
        return tuple((kind, kind) for kind in MOMENTS)
    if "absmax1" in state:
        return tuple((kind, kind) for kind in BLOCKS)
    return tuple(zip(MOMENTS, ("state1", "state2"), strict=True))


def unrounded_adapter(engine: Engine, *, keep: bool) -> dict[str, Tensor]:
    """The adapter's tensors in float32 by saved name, where `keep`, if the model's own are rounded copies of them.

    That is under ZeRO in bf16; else, and of what ZeRO does not train, nothing. Collective.
    """
    found: dict[str, Tensor] = {}
    if not isinstance(engine, DeepSpeedEngine):
        return found
    keys = {id(chosen.tensor): chosen.key for chosen in choose(engine.model, None, "default")}
    for _, param in trained(engine.model):
        if param.dtype != torch.float32 and id(param) in keys:
            full = export_tensor(param, WEIGHT)
            if keep:
                found[keys[id(param)]] = _on_host(full)
    return found


def import_state(engine: Engine, state: Mapping[str, Tensor], steps: int) -> None:
    """Set weights, moments and Adam's step count. Every rank gives the whole `state` and takes its own part.

    Raises TrainingError where names or shapes differ from what this run trains.
    """
    problems = []
    params = dict(trained(engine.model))
    shapes = {name: _shapes(engine, param) for name, param in params.items()}
    for name, wanted in shapes.items():
        for kind, shape in wanted.items():
            found = state.get(f"{kind}/{name}")
            if found is None or tuple(found.shape) != shape:
                have = "nothing" if found is None else str(tuple(found.shape))
                problems.append(Problem("checkpoint", f"{kind}/{name} holds {have}, this run trains {shape}"))
    if problems:
        raise TrainingError(*problems[:10])
    if isinstance(engine, DeepSpeedEngine):
        new_moments(engine.optimizer, steps)
    for name, param in params.items():
        tensors = {kind: state[f"{kind}/{name}"] for kind in shapes[name]}
        if isinstance(engine, DeepSpeedEngine):
            set_tensors(engine.optimizer, param, tensors)
        elif _is_bitsandbytes(engine.optimizer):
            _import_blocks(engine.optimizer, param, tensors, steps)
        else:
            _import_torch(engine.optimizer, param, tensors, steps)


def restore(engine: Engine, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's state into the engine. A skipped step is none of Adam's. Collective."""
    skipped = int(checkpoint.trainer.get("health", {}).get("skipped", 0))
    import_state(engine, read_state(checkpoint), checkpoint.step - skipped)


def _shapes(engine: Engine, param: nn.Parameter) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that a checkpoint must hold for a parameter."""
    shape = tuple(getattr(param, "ds_shape", param.shape))
    moments = dict.fromkeys(MOMENTS, shape)
    if not isinstance(engine, DeepSpeedEngine) and _is_bitsandbytes(engine.optimizer):
        state = _new_blocks(engine.optimizer, param)
        moments = {kind: tuple(state[name].shape) for kind, name in _kept_as(state)}
    return {WEIGHT: shape, **moments}


def _copy_part(target: Tensor, value: Tensor) -> None:
    """Copy the whole `value` into `target`, or into this rank's rows of an FSDP2 shard."""
    from torch.distributed.tensor import DTensor

    from phi3_dist.modeling.base import own_rows

    with torch.no_grad():
        if isinstance(target, DTensor):
            target.to_local().copy_(value[own_rows(target)])
        else:
            target.copy_(value)


def _import_torch(optimizer: Any, param: nn.Parameter, tensors: Mapping[str, Tensor], steps: int) -> None:
    _copy_part(param, tensors[WEIGHT])
    optimizer.state[param] = {"step": step_count(optimizer, param, steps)}
    for kind in MOMENTS:
        optimizer.state[param][kind] = torch.zeros_like(param)
        _copy_part(optimizer.state[param][kind], tensors[kind])


def _is_bitsandbytes(optimizer: Any) -> bool:
    return type(optimizer).__module__.startswith("bitsandbytes.")


def _new_blocks(optimizer: Any, param: nn.Parameter) -> dict[str, Any]:
    """bitsandbytes' own empty state of a parameter: in 8 bits from 4,096 values on, paged where it pages."""
    for number, group in enumerate(optimizer.param_groups):
        for index, one in enumerate(group["params"]):
            if one is param:
                optimizer.init_state(group, param, number, index)
    state: dict[str, Any] = optimizer.state[param]
    return state


def _import_blocks(optimizer: Any, param: nn.Parameter, tensors: Mapping[str, Tensor], steps: int) -> None:
    state = optimizer.state[param]
    if param.device.type == "cuda":
        torch.cuda.synchronize(param.device)  # paged memory, which the host writes below, was zeroed on the device
    state["step"] = steps
    with torch.no_grad():
        param.copy_(tensors[WEIGHT])
        for kind, name in _kept_as(state):
            state[name].copy_(tensors[kind])
