"""Starts of A and B that are computed from the base or the data, in float32 and under PEFT's saved names.

PEFT computes these while it wraps a module, on every rank, from weights that must be whole and writable. Here the
weight is read from the base's file, which may be mapped and shared, and each module is one rank's work
(training/shared_init.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from phi3_dist.errors import DataError, Problem
from phi3_dist.modeling.lora import Adapted, named_seed

__all__ = ["eva_init", "loftq_init", "pissa_init", "saved_names", "subtract_from_base"]

_EVA_SETTLED = 0.99
"""Cosine between a component before and after a batch from which it counts as settled; PEFT's default `tau`."""
_EVA_PASSES = 10


def saved_names(module: Adapted) -> tuple[str, str]:
    """The names that PEFT saves A and B of a module under."""
    return tuple(f"base_model.model.{module.name}.lora_{letter}.weight" for letter in "AB")  # type: ignore[return-value]


def pissa_init(weight: Tensor, module: Adapted, niter: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """A (r, inputs) and B (outputs, r) with scale·B·A the best rank-r approximation of `weight` (outputs, inputs).

    PiSSA, arXiv 2404.02948. `niter`: iterations of the randomised decomposition; None: the exact one.
    """
    return _split(weight.float(), module, niter, seed)


def loftq_init(weight: Tensor, quantized: Tensor, module: Adapted) -> tuple[Tensor, Tensor]:
    """A and B with scale·B·A the best rank-r approximation of what quantisation lost: LoftQ's first step.

    LoftQ, arXiv 2310.08659, alternates this with quantising the rest anew. One step leaves the base as every loader
    quantises it, so that the adapter needs no base of its own.
    """
    return _split(weight.float() - quantized.to(weight.device).float(), module, None, 0)


def _split(matrix: Tensor, module: Adapted, niter: int | None, seed: int) -> tuple[Tensor, Tensor]:
    if niter is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(named_seed(seed, module.name))
            left, values, right = torch.svd_lowrank(matrix, module.r, niter=niter)
        right = right.mT
    root = (values[: module.r] / module.scale).sqrt()
    return root[:, None] * right[: module.r], left[:, : module.r] * root


@torch.no_grad()
def subtract_from_base(model: nn.Module, modules: Sequence[Adapted], start: Mapping[str, Tensor]) -> None:
    """Subtract scale·B·A from each adapted weight of the base, so that the model starts as the plain base does.

    A whole weight is replaced, never written to: it may be the mapped file. Of a shard of FSDP2 each rank changes its
    rows; of ZeRO-3's, rank 0 changes the whole and hands it back. Collective under ZeRO-3.
    """
    from torch.distributed.tensor import DTensor

    from phi3_dist.modeling.base import own_rows

    weights = {n.split("base_model.model.", 1)[-1]: p for n, p in model.named_parameters() if "base_layer" in n}
    for module in modules:
        weight: Any = weights[f"{module.name}.base_layer.weight"]
        a, b = (start[name] for name in saved_names(module))

        def rest(rows: Tensor, b: Tensor, a: Tensor = a, scale: float = module.scale) -> Tensor:
            return (rows.float() - scale * b.to(rows.device) @ a.to(rows.device)).to(rows.dtype)

        if isinstance(weight, DTensor):
            local = weight.to_local()
            local.copy_(rest(local, b[own_rows(weight)]))
        elif hasattr(weight, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                if torch.distributed.get_rank() == 0:
                    weight.copy_(rest(weight, b))
        else:
            weight.data = rest(weight, b)


@torch.no_grad()
def eva_init(
    model: nn.Module,
    modules: Sequence[Adapted],
    batches: Callable[[], Iterable[tuple[Any, Tensor]]],
    forward: Callable[[Any], object],
) -> dict[str, Tensor]:
    """A's rows are the first r principal directions of each module's inputs; B is left to start at 0.

    EVA, arXiv 2410.07170, with equal ranks (rho 1) and PEFT's incremental decomposition. `batches()` gives, in an order
    that is the same each time, what `forward` takes and the positions (S,) whose inputs count. Stops when all
    directions have settled, or after ten passes. Raises DataError where no batch has as many positions as a rank.
    """
    from peft.utils.incremental_pca import IncrementalPCA

    found = {m.name: IncrementalPCA(n_components=m.r, copy=True, lowrank=True, lowrank_seed=42) for m in modules}
    where: list[Tensor] = []

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, inputs: Any) -> None:
            pca = found[name]
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])[where[0]].float()
            if len(rows) < pca.n_components:
                return
            before = getattr(pca, "components_", None)
            before = None if before is None else before.clone()
            pca.partial_fit(rows)
            if before is not None:
                settled = nn.functional.cosine_similarity(pca.components_, before) >= _EVA_SETTLED
                if bool(settled.all()):
                    handles.pop(name).remove()

        return hook

    handles = {m.name: model.get_submodule(m.name).register_forward_pre_hook(watch(m.name)) for m in modules}
    was_training = model.training
    model.eval()
    for _ in range(_EVA_PASSES):
        for batch, positions in batches():
            where[:] = [positions]
            forward(batch)
            if not handles:
                break
    for handle in handles.values():
        handle.remove()
    model.train(was_training)
    short = [m for m in modules if not hasattr(found[m.name], "components_")]
    if short:
        what = f"is eva, which needs {short[0].r} supervised tokens in one pack for rank {short[0].r}; none has them"
        raise DataError(Problem("lora.init", what, "use a smaller lora.r, longer packs (data.pack_length), or default"))
    return {saved_names(m)[0]: found[m.name].components_[: m.r].float() for m in modules}
