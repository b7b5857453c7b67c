"""The proof that what was built is what was planned, down to the dtype of every tensor.

A library that computes in another precision than it was told still trains, and its losses look right: ZeRO-3 in bf16
under a plan of float32 showed in nothing but the fifth digit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from phi3_dist.errors import PlanError, Problem
from phi3_dist.training.engines.backward_and_update import DeepSpeedEngine, Engine
from phi3_dist.training.engines.optimizer import trained
from phi3_dist.training.engines.zero_state import flat_masters
from phi3_dist.training.runtime import Runtime

__all__ = ["prove_built_dtypes", "prove_frozen", "prove_updated_dtypes"]

SHOWN = 5


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse(found: Iterator[tuple[str, Tensor | torch.dtype, torch.dtype]]) -> None:
    """Raises PlanError with the first tensors whose dtype is not the planned one, and the number of all."""
    wrong = []
    for where, have, planned in found:
        dtype = have.dtype if isinstance(have, Tensor) else have
        if dtype != planned:
            wrong.append((where, f"is {_name(dtype)}, and {_name(planned)} was planned"))
    if wrong:
        fix = "report it with environment.json: a library chose another precision than the one asked for"
        more = f" ({len(wrong)} tensors like it)" if len(wrong) > 1 else ""
        raise PlanError(*(Problem(f"dtype of {where}", what + more, fix) for where, what in wrong[:SHOWN]))


def _stored_as_numbers(param: nn.Parameter) -> bool:
    """Whether a frozen weight is its numbers: bitsandbytes' and FP8's are bytes, or blocks in some storage dtype."""
    return param.is_floating_point() and not hasattr(param, "quant_state") and type(param).__name__ != "Int8Params"


def _weights(engine: Engine, runtime: Runtime) -> Iterator[tuple[str, Tensor | torch.dtype, torch.dtype]]:
    zero = isinstance(engine, DeepSpeedEngine)
    for name, param in engine.model.named_parameters():
        shard: Any = getattr(param, "ds_tensor", param)
        if param.requires_grad:
            # under ZeRO in bf16 it may be a rounded copy of the optimizer's: stages 1 and 2 round, stage 3 does not
            yield name, shard, runtime.dtype if zero and shard.dtype == runtime.dtype else torch.float32
        elif _stored_as_numbers(param) and ".lora_" not in name:
            yield name, shard, runtime.dtype
    if zero:
        for number, flat in enumerate(flat_masters(engine.optimizer)):
            yield f"the optimizer's weights, group {number}", flat, torch.float32


def prove_built_dtypes(engine: Engine, runtime: Runtime) -> None:
    """Every frozen weight in the plan's precision, every trained one in float32 where the optimizer holds it.

    Raises PlanError on each rank that holds another.
    """
    _refuse(_weights(engine, runtime))


def prove_frozen(model: nn.Module, runtime: Runtime) -> None:
    """Nothing of `model` trains, and every weight that is its numbers is in the plan's precision. Raises PlanError."""
    assert not any(param.requires_grad for param in model.parameters())
    _refuse(
        (name, getattr(param, "ds_tensor", param), runtime.dtype)
        for name, param in model.named_parameters()
        if _stored_as_numbers(param)
    )


def _of_update(engine: Engine) -> Iterator[tuple[str, Tensor | torch.dtype, torch.dtype]]:
    if isinstance(engine, DeepSpeedEngine):
        zero = engine.optimizer
        sums = getattr(zero, "gradient_accumulation_dtype", None) or zero.grad_acc_dtype
        yield "the sums of gradients", sums, torch.float32
        states: Any = {f"group {i}": zero.optimizer.state[flat] for i, flat in enumerate(flat_masters(zero))}
    else:
        states = {name: engine.optimizer.state[param] for name, param in trained(engine.model)}
    for name, state in states.items():
        for kind, value in state.items():
            if isinstance(value, Tensor) and value.dtype != torch.uint8:  # bytes are an 8-bit optimizer's
                yield f"{kind} of {name}", value, torch.float32


def prove_updated_dtypes(engine: Engine) -> None:
    """Gradients are added up in float32, and every moment is float32 or an 8-bit optimizer's bytes.

    After the first update. torch itself holds that a gradient has its parameter's dtype. Raises PlanError.
    """
    _refuse(_of_update(engine))
