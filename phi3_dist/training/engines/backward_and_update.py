"""The engines: how a model is wrapped or sharded, and what one backward and one update mean there.

Each holds one contract: `backward` takes the loss of a micro batch, already divided by the global count of
supervised tokens; `update` applies the *sum* of those losses' gradients over ranks and micro batches, clipped, and
gives back their global norm before clipping. Where that norm is not finite no update is made, on any rank.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from phi3_dist.config.schema import OptimConfig
from phi3_dist.errors import Problem, TrainingError
from phi3_dist.modeling.loss import PackedLoss
from phi3_dist.training.engines.optimizer import make_optimizer, set_lr, trained
from phi3_dist.training.engines.zero_state import set_tensors
from phi3_dist.training.runtime import Runtime, is_deepspeed, is_fsdp

__all__ = ["DeepSpeedEngine", "Engine", "TorchEngine", "make_engine"]


class Engine(Protocol):
    """What a step needs of a strategy."""

    model: nn.Module
    optimizer: Any

    def start_micro_batch(self, *, last: bool) -> None:
        """Before the forward pass of each micro batch: gradients are exchanged after the `last` of a step alone."""

    def backward(self, loss: Tensor) -> None: ...

    def update(self, lr: float) -> Tensor: ...


class TorchEngine:
    """One process, DDP, or FSDP2: gradients live in `param.grad`, the optimizer is torch's own."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, world: int, max_grad_norm: float) -> None:
        self.model, self.optimizer, self.max_grad_norm = model, optimizer, max_grad_norm
        # DDP and FSDP2 average over ranks; the loss is already divided by the global count
        self.scale = float(world)
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.fused = all(group.get("fused") for group in optimizer.param_groups)

    def start_micro_batch(self, *, last: bool) -> None:
        model: Any = self.model
        if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
            model.set_requires_gradient_sync(last)
        elif hasattr(model, "require_backward_grad_sync"):  # DDP looks at it in forward and in backward
            model.require_backward_grad_sync = last

    def backward(self, loss: Tensor) -> None:
        (loss * self.scale).backward()  # type: ignore[no-untyped-call]

    def update(self, lr: float) -> Tensor:
        norm: Any = torch.nn.utils.clip_grad_norm_(self.params, self.max_grad_norm or float("inf"))
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        set_lr(self.optimizer, lr)
        # the norm is the same on every rank: gradients are summed before they are measured
        if self.fused:  # the kernel itself leaves all as it was, and the host needn't wait for the norm
            optimizer: Any = self.optimizer
            optimizer.found_inf = torch.isfinite(norm).logical_not().float()
            optimizer.step()
        elif math.isfinite(float(norm)):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        grad_norm: Tensor = norm.detach()
        return grad_norm


class DeepSpeedEngine:
    """ZeRO-1/2/3: DeepSpeed averages over ranks and divides by the accumulation steps, clips and updates by itself."""

    def __init__(self, engine: Any, optimizer: Any, world: int, accumulation: int) -> None:
        self.model, self.optimizer = engine, optimizer
        self.scale = float(world * accumulation)

    def start_micro_batch(self, *, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss * self.scale)

    def update(self, lr: float) -> Tensor:
        set_lr(self.optimizer, lr)
        self.model.step()
        norm = self.model.get_global_grad_norm()
        value = float(norm) if norm is not None else float("nan")
        # deepspeed 0.19.8 drops a step of non-finite norm by itself, in fp32 too: its norm is then infinity
        if not math.isfinite(value) and self.model.was_step_applied():
            what = f"the gradient norm is {value}, and DeepSpeed has made the update all the same"
            raise TrainingError(Problem("optimizer", what, "continue from the last checkpoint with --resume"))
        return torch.tensor(value, dtype=torch.float64)


def _wrap_ddp(model: nn.Module, runtime: Runtime) -> nn.Module:
    """DDP over the trained tensors alone: the frozen base, equal on every rank by construction, is not broadcast."""
    from torch.nn.parallel import DistributedDataParallel

    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    frozen += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)  # type: ignore[no-untyped-call]
    # it is where it should be: placing it again would copy a base that is mapped from its file
    wrapped: nn.Module = runtime.accelerator.prepare_model(model, device_placement=False)
    return wrapped


def _with_deepspeed(model: PackedLoss, optimizer: Any, runtime: Runtime) -> DeepSpeedEngine:
    """In bf16 DeepSpeed rounds the whole model: its float32 weights get back what the adapter started with."""
    unrounded = {
        name: param.detach().to("cpu", copy=True)
        for name, param in trained(model)
        if param.dtype == torch.float32 and not hasattr(param, "ds_id")  # ZeRO-3 has sharded what came of the base
    }
    engine, wrapped = runtime.accelerator.prepare(model, optimizer)
    made = DeepSpeedEngine(engine, wrapped.optimizer, runtime.world, runtime.plan.accumulation)
    for name, param in trained(engine):
        if name in unrounded and param.dtype != torch.float32:
            set_tensors(wrapped.optimizer, param, {"weight": unrounded[name]})
    return made


def make_engine(model: PackedLoss, runtime: Runtime, cfg: OptimConfig, plus_ratio: float = 1.0) -> Engine:
    """Wrap the model for the plan's strategy. An FSDP2 model comes in sharded already. Collective."""
    optimizer = make_optimizer(model, cfg, runtime.device, plus_ratio)
    if is_deepspeed(runtime.plan.strategy):
        return _with_deepspeed(model, optimizer, runtime)
    if not is_fsdp(runtime.plan.strategy):
        wrapped_model = _wrap_ddp(model, runtime)
        return TorchEngine(wrapped_model, optimizer, runtime.world, cfg.max_grad_norm)
    return TorchEngine(model, optimizer, runtime.world, cfg.max_grad_norm)
