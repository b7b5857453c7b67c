"""A computed `lora.init`: made once, kept in the run folder, equal on every rank and after a resume."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from phi3_dist.adapters.durable_files import write_tensors
from phi3_dist.config.schema import RunConfig
from phi3_dist.data.pack.packs import Packs
from phi3_dist.errors import Problem, RunFolderError, TrainingError
from phi3_dist.modeling.base import Base
from phi3_dist.modeling.lora import Adapted, adapted, peft_config
from phi3_dist.modeling.lora_init import eva_init, loftq_init, pissa_init, saved_names
from phi3_dist.modeling.loss import PackedLoss
from phi3_dist.training.runtime import Runtime
from phi3_dist.training.train_step import to_device

__all__ = ["LORA_INIT_FILE", "computed_lora_init"]

LORA_INIT_FILE = "start.safetensors"
"""In the run folder: A and B as they started, float32, under PEFT's saved names. PiSSA needs it to save its adapter."""


def computed_lora_init(
    cfg: RunConfig, causal_lm: Any, base: Base, runtime: Runtime, *, packs: Packs, folder: Path, resumed: bool
) -> dict[str, Tensor]:
    """The tensors that `lora.init` sets, on the CPU of every rank; empty for the default start. Collective.

    `causal_lm` is the base before LoRA. A resumed run reads what the first one has written, since another machine may
    decompose a matrix into other vectors. Raises TrainingError where that file is missing or damaged.
    """
    if cfg.lora.init == "default" or cfg.model.adapter is not None:
        return {}
    path = folder / LORA_INIT_FILE
    if resumed:
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            what = f"cannot be read, and the run continues from how it started: {error}"
            raise TrainingError(Problem(str(path), what, "put it back, or start over with --overwrite")) from error
    modules = adapted(causal_lm, peft_config(causal_lm, cfg.lora, base.source))
    if cfg.lora.init == "eva":
        tensors = _agree(runtime, _eva(cfg, causal_lm, modules, runtime, packs), {})
    else:
        tensors = _decompose(cfg, causal_lm, base, runtime, modules)
    if runtime.is_main:
        _keep(path, tensors)
    return tensors


def _keep(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_tensors(partial, tensors)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        what = f"cannot be written, and a resumed run reads it: {error.strerror or error}"
        raise RunFolderError(Problem(str(path), what, "make room")) from error


def _agree(runtime: Runtime, ours: dict[str, Tensor], owner: dict[str, int]) -> dict[str, Tensor]:
    """Each tensor as its owner (rank 0 where none is named) has it. Every rank has a tensor of the right shape."""
    agreed = {}
    for name, tensor in ours.items():
        tensor = tensor.to(runtime.device, torch.float32).contiguous()  # noqa: PLW2901
        if runtime.world > 1:
            torch.distributed.broadcast(tensor, src=owner.get(name, 0))
        agreed[name] = tensor.cpu()
    return agreed


def _decompose(
    cfg: RunConfig, causal_lm: Any, base: Base, runtime: Runtime, modules: list[Adapted]
) -> dict[str, Tensor]:
    """Ranks share the modules out among themselves: a decomposition is the long part."""
    ours: dict[str, Tensor] = {}
    owner: dict[str, int] = {}
    for number, module in enumerate(modules):
        names, mine = saved_names(module), number % runtime.world
        owner |= dict.fromkeys(names, mine)
        weight = base.weights.whole(f"{module.name}.weight")
        rows, columns = weight.shape
        if mine != runtime.rank:
            pair = torch.empty(module.r, columns), torch.empty(rows, module.r)
        elif cfg.lora.init == "loftq":
            pair = loftq_init(weight.to(runtime.device), _dequantized(causal_lm, module), module)
        else:
            _, _, niter = cfg.lora.init.partition("_niter_")
            on_device = weight.to(device=runtime.device, dtype=runtime.dtype)
            pair = pissa_init(on_device, module, int(niter) if niter else None, cfg.train.seed)
        ours |= zip(names, pair, strict=True)
    base.weights.close()
    return _agree(runtime, ours, owner)


def _dequantized(causal_lm: Any, module: Adapted) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight = causal_lm.get_submodule(module.name).weight
    plain: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return plain


def _eva(cfg: RunConfig, causal_lm: Any, modules: list[Adapted], runtime: Runtime, packs: Packs) -> dict[str, Tensor]:
    """Every rank sees the same packs, in an order of the seed, and comes to the same directions."""
    loss = PackedLoss(causal_lm)
    order = np.random.default_rng(cfg.train.seed).permutation(len(packs.packs))

    def batches() -> Iterator[tuple[Any, Tensor]]:
        for pack in order:
            batch = to_device(packs, [int(pack)], runtime.device)
            positions = batch["predict_S"]
            assert isinstance(positions, Tensor)
            yield batch, positions

    return eva_init(causal_lm, modules, batches, lambda batch: loss(**batch))
