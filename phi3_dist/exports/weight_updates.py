"""An adapter's tensors as what they do to the base's: an update of a weight, a weight in whole, rows of a table.

Shapes: A (r, in), B (out, r); of an embedding A (r, rows), B (dim, r), and its update is (B A)ᵀ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from phi3_dist.errors import AdapterError, Problem
from phi3_dist.modeling.base import Base

__all__ = ["PREFIX", "AdapterContents", "Update", "contents_of"]

PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B)|(magnitude)_vector)")
_TAUGHT = ".token_adapter.trainable_tokens_delta"
_EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True)
class Update:
    """W + scale·BA, and with `magnitude` (out,), DoRA's, that with its rows brought to these norms."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    embedding: bool = False

    def delta(self) -> Tensor:
        """scale·BA in float32, in the weight's own shape."""
        product = self.scale * (self.b.float() @ self.a.float())
        return product.T if self.embedding else product

    def of(self, weight: Tensor) -> Tensor:
        """The weight with the update, float32. PEFT's own merge computes the same."""
        new = weight.float() + self.delta()
        if self.magnitude is not None:
            new *= (self.magnitude.float() / new.norm(dim=1))[:, None]
        return new


@dataclass
class AdapterContents:
    """All that an adapter holds, by names of the base. `taught`: table → (ids, rows)."""

    updates: dict[str, Update] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    taught: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)

    @property
    def dora(self) -> bool:
        return any(update.magnitude is not None for update in self.updates.values())

    def unfit(self, base: Base, rows: int, where: str) -> list[Problem]:
        """Why they do not belong on `base`, whose tables will have at least `rows` rows; or nothing."""
        names = base.weights.names() | ({"lm_head.weight"} if base.config.tie_word_embeddings else set())
        wrong: list[str] = []

        def shape_of(name: str) -> tuple[int, ...]:
            tied = name == "lm_head.weight" and name not in base.weights.names()
            return tuple(base.weights.shape("model.embed_tokens.weight" if tied else name))

        for module, update in self.updates.items():
            weight = f"{module}.weight"
            outside, inside = update.b.shape[0], update.a.shape[1]
            ours = (inside, outside) if update.embedding else (outside, inside)
            if weight not in names:
                wrong.append(f"{module} is not in the base")
            elif shape_of(weight) != ours:
                wrong.append(f"{module} has {ours} here and {shape_of(weight)} in the base")
        for name, tensor in self.whole.items():
            if name not in names:
                wrong.append(f"{name} is not in the base")
            elif shape_of(name)[1:] != tuple(tensor.shape)[1:] or shape_of(name)[0] > max(tensor.shape[0], rows):
                wrong.append(f"{name} has {tuple(tensor.shape)} here and {shape_of(name)} in the base")
        for table, (ids, taught) in self.taught.items():
            have = shape_of(f"{table}.weight")
            if have[1] != taught.shape[1]:
                wrong.append(f"{table} has rows of {taught.shape[1]} here and of {have[1]} in the base")
            elif max(ids, default=0) >= max(have[0], rows):
                wrong.append(f"{table} has a trained token row {max(ids)} here, and {have[0]:,} rows in the base")
        base.weights.close()
        if not wrong:
            return []
        what = f"was trained on another base than {base.source}: {wrong[0]}"
        more = f" ({len(wrong) - 1} more)" if len(wrong) > 1 else ""
        return [Problem(where, what + more, "name its own with --base")]


def contents_of(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> AdapterContents:
    """Take an adapter apart. Raises AdapterError, with all names, for a tensor whose meaning isn't known."""
    halves: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    contents, strange = AdapterContents(), []
    for key in sorted(tensors):
        name, tensor = key.removeprefix(PREFIX), tensors[key]
        match = _LORA.fullmatch(name)
        if match:
            halves.setdefault(match[1], {})[match[2] or match[3] or match[4]] = tensor
            embeddings |= {match[1]} if match[3] else set()
        elif name.endswith(_TAUGHT):
            table = name.removesuffix(_TAUGHT)
            contents.taught[table] = (_taught_ids(config, table), tensor)
        elif ".lora_" not in name and name.endswith(".weight"):
            contents.whole[name] = tensor
        else:
            strange.append(name)
    for module, half in halves.items():
        dims = [half[letter].ndim for letter in "AB" if letter in half]
        if dims != [2, 2] or (module in embeddings and "magnitude" in half):
            strange.append(module)
            continue
        rank = half["A"].shape[0]
        contents.updates[module] = Update(
            half["A"], half["B"], _scale(config, module, rank), half.get("magnitude"), module in embeddings
        )
    wrong = [t for t, (ids, rows) in contents.taught.items() if len(ids) != len(rows)]
    if strange or wrong:
        what = f"{len(strange) + len(wrong)} tensors that can't be taken over, first {(strange + wrong)[0]}"
        raise AdapterError(Problem("adapter", what, "serve it with PEFT as it is"))
    return contents


def _taught_ids(config: Mapping[str, Any], table: str) -> list[int]:
    said = config.get("trainable_token_indices")
    if isinstance(said, list):
        return [int(i) for i in said] if table == _EMBEDDING else []
    for name, ids in (said or {}).items():
        if table == name or table.endswith(f".{name}"):
            return [int(i) for i in ids]
    return []


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(list(patterns), module), config.get("lora_alpha", 0)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def padded(update: Update, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of `rank` with the scale in B: their product is the update itself. Rows and columns of 0 fill up."""
    a, b = update.a.float(), update.b.float() * update.scale
    more = rank - a.shape[0]
    return (
        torch.cat((a, a.new_zeros(more, a.shape[1]))) if more else a.clone(),
        torch.cat((b, b.new_zeros(b.shape[0], more)), 1) if more else b.clone(),
    )
