"""What trains, and the optimizer over it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from phi3_dist.config.schema import OptimConfig
from phi3_dist.errors import MachineError, Problem

__all__ = ["make_optimizer", "plain_name", "set_lr", "trained"]


def plain_name(name: str) -> str:
    """A parameter's name as no wrapper changes it."""
    return "base_model." + name.split("base_model.", 1)[1] if "base_model." in name else name


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters, by the name that no wrapper changes."""
    for name, param in model.named_parameters():
        if param.requires_grad:
            yield plain_name(name), param


def make_optimizer(
    model: nn.Module, cfg: OptimConfig, device: torch.device, plus_ratio: float = 1.0
) -> torch.optim.Optimizer:
    """AdamW over the trainable tensors, fused where the device has it. Vectors (biases, magnitudes) do not decay.

    LoRA+: B is a group of its own, whose learning rate is always `plus_ratio` times the others'.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    trainable = [p for _, p in named]
    faster = [p for name, p in named if ".lora_B." in name] if plus_ratio != 1 else []
    apart = {id(p) for p in faster}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim > 1 and id(p) not in apart], "weight_decay": cfg.weight_decay},
        {"params": faster, "weight_decay": cfg.weight_decay, "lr_ratio": plus_ratio},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    options: dict[str, Any] = {"lr": cfg.lr, "betas": cfg.betas, "eps": cfg.eps}
    if cfg.name == "adamw":
        fused = all(p.device.type == device.type == "cuda" for p in trainable)  # FSDP2's offload keeps them on the host
        return torch.optim.AdamW(groups, fused=fused, **options)
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise MachineError(
            Problem("optim.name", f"{cfg.name} is bitsandbytes', which is not installed", "pip install bitsandbytes")
        ) from error
    kinds = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    }
    optimizer: torch.optim.Optimizer = kinds[cfg.name](groups, **options)
    return optimizer


def set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
