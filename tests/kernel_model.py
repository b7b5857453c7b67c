"""Triton's kernels by themselves, and a small Phi-3 on them beside the same by hand. Run with TRITON_INTERPRET=1.

A line of JSON for each check of a kernel (`phi3_dist.bench.kernels`), and one for the model: one process, since imports
are a third of the time.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch
from torch import Tensor

from phi3_dist.bench.kernels import main as check_kernels
from phi3_dist.config.schema import LoraConfig
from phi3_dist.modeling.attention.backend import use_backend
from phi3_dist.modeling.fused_layers import install_fused_layers, select_in_last_layer
from phi3_dist.modeling.fused_lora import install_fused
from phi3_dist.modeling.lora import add_lora, fill_adapter
from phi3_dist.modeling.loss import PackedLoss
from phi3_dist.modeling.passes import BY_HAND, kernel_passes
from tests.small_models import small_phi3

LENGTHS = (5, 1, 7)
CHECKS = "^(?!linear (o|gate_up))"  # the same kernels as of qkv and down, at other shapes


def _model(*, kernels: bool, dropout: float = 0.0, checkpointing: bool = False) -> PackedLoss:
    causal_lm: Any = small_phi3(sliding_window=4)
    causal_lm.name_or_path = "x"
    use_backend(causal_lm, "sdpa")
    if checkpointing:
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    model = PackedLoss(add_lora(causal_lm, LoraConfig(r=4, dropout=dropout), "x"))
    fill_adapter(model, 0)
    for number, (name, param) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.1, generator=torch.Generator().manual_seed(number))
    install_fused(model, kernels=kernels)
    install_fused_layers(model, kernel_passes() if kernels else BY_HAND)
    select_in_last_layer(model)
    return model.train()


def _loss(model: PackedLoss, seed: int = 0) -> Tensor:
    total = sum(LENGTHS)
    ids = torch.randint(0, 97, (total + 1,), generator=torch.Generator().manual_seed(1))
    predict = torch.arange(0, total, 2)
    torch.manual_seed(seed)
    loss: Tensor = model(
        ids_T=ids[:-1],
        positions_T=torch.cat([torch.arange(n) for n in LENGTHS]),
        predict_S=predict,
        target_S=ids[predict + 1],
        cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        lengths=LENGTHS,
    )
    return loss


def _trained(model: PackedLoss) -> tuple[Tensor, dict[str, Tensor]]:
    loss = _loss(model)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _apart(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    return max(float((got[name] - grad).norm() / grad.norm().clamp_min(1e-12)) for name, grad in want.items())


def main() -> None:
    """Check the kernels, train one step of each model and print how far they are apart."""
    check_kernels(["--toy", "--here", "--dtype", "fp32", "--groups", "passes,lora", "--checks", CHECKS])
    warnings.simplefilter("ignore", FutureWarning)
    loss, grads = _trained(_model(kernels=False))
    kernel_loss, kernel_grads = _trained(_model(kernels=True))
    dropped, dropped_grads = _trained(_model(kernels=True, dropout=0.25))
    _, again_grads = _trained(_model(kernels=True, dropout=0.25, checkpointing=True))
    other = _loss(_model(kernels=True, dropout=0.25), seed=1)
    row = {
        "check": "model",
        "loss": float((kernel_loss - loss).abs() / loss),
        "grads": _apart(kernel_grads, grads),
        "same_names": set(kernel_grads) == set(grads),
        "recomputed_grads": _apart(again_grads, dropped_grads),
        "other_seed": not torch.equal(other, dropped),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
