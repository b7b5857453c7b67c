"""`--as combine`: several adapters of one base into one, by PEFT's own `add_weighted_adapter`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from phi3_dist.adapters.gather import gather_adapter
from phi3_dist.adapters.loading import load_adapter
from phi3_dist.errors import AdapterError, Problem
from phi3_dist.exports.drift import Rows, compute_dtype, logits_of, plain_model, without_adapter
from phi3_dist.exports.open_adapter import Opened
from phi3_dist.modeling.lora import quiet_peft

__all__ = ["METHODS", "combine"]

METHODS = (
    "cat", "linear", "svd", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
"""`combination_type` of peft 0.21. `cat` is the exact weighted sum, at the sum of the ranks."""


def combine(
    opened: Sequence[Opened], weights: Sequence[float], method: str, *, density: float | None, rows: Rows
) -> tuple[dict[str, Tensor], dict[str, Any], list[Tensor], list[Tensor]]:
    """Tensors and configuration of the new adapter, its live logits on `rows`, and the base's.

    Raises AdapterError where PEFT does not combine these, or they are of different bases.
    """
    first = opened[0]
    _refuse(opened, weights, method)
    model = load_adapter(plain_model(first.base, compute_dtype(first.base), first.trained_on), first.folder)
    with quiet_peft():
        for number, other in enumerate(opened[1:], start=1):
            model.load_adapter(str(other.folder), adapter_name=f"other_{number}")
    names = ["default", *(f"other_{number}" for number in range(1, len(opened)))]
    try:
        torch.manual_seed(0)  # DARE drops values at random
        more = {"density": density} if density is not None else {}
        model.add_weighted_adapter(names, list(weights), "combined", combination_type=method, **more)
    except (ValueError, TypeError) as error:  # TypeError: a method that needs a density, and has none
        what = f"PEFT does not combine them by {method}: {' '.join(str(error).split())}"
        raise AdapterError(
            Problem("--method", what, "another method (cat and svd take any ranks), or --density")
        ) from error
    model.set_adapter("combined")
    live = logits_of(model, rows)
    with without_adapter(model):
        plain = logits_of(model, rows)
    tensors = gather_adapter(model, adapter_name="combined")
    config = dict(model.peft_config["combined"].to_dict())
    return tensors, config | {"base_model_name_or_path": first.config.get("base_model_name_or_path")}, live, plain


def _refuse(opened: Sequence[Opened], weights: Sequence[float], method: str) -> None:
    problems = []
    if len(opened) < 2:
        problems.append(Problem("--with", "names no second adapter", "--with OTHER, once for each"))
    if len(weights) != len(opened):
        what = f"has {len(weights)} values for {len(opened)} adapters"
        problems.append(Problem("--weights", what, "one for each, in their order: --weights 0.5,0.5"))
    if method not in METHODS:
        problems.append(Problem("--method", f"{method!r} is not one of PEFT's", f"one of {', '.join(METHODS)}"))
    for other in opened:
        if other.contents.whole or other.contents.taught or other.contents.dora:
            what = "holds more than A and B (DoRA, modules in full, new tokens), which PEFT does not combine"
            problems.append(Problem(str(other.folder), what, "merge it, and train the next on that"))
        if other.trained_on != opened[0].trained_on:
            what = f"was trained on the base in {other.trained_on}, {opened[0].folder} in {opened[0].trained_on}"
            problems.append(Problem(str(other.folder), what, "combine adapters of one base"))
        if other.metadata.get("longrope") != opened[0].metadata.get("longrope"):
            problems.append(Problem(str(other.folder), "was trained with other LongRoPE factors", "leave it out"))
    if problems:
        raise AdapterError(*problems)
