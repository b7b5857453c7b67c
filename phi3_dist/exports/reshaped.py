"""Adapters in other forms, each exactly the same update: one rank and one alpha for all; Llama's names for the parts.

one rank    A and B padded with zeros to the largest rank, each module's scale in B, so that alpha equals the rank
split       qkv_proj and gate_up_proj taken apart: each part has the rows of B that are its own, and the same A
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phi3_dist.errors import AdapterError, Problem
from phi3_dist.exports.open_adapter import Opened
from phi3_dist.exports.weight_updates import PREFIX, AdapterContents, Update, padded

__all__ = ["joined", "one_rank", "split_names"]

_PLAIN = {
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "layers_to_transform": None,
    "layers_pattern": None,
    "init_lora_weights": True,
    "bias": "none",
}
"""What the other forms say besides rank and alpha. Phi-3 has no biases: none can have trained."""


def _tensors(contents: AdapterContents, rank: int) -> dict[str, Tensor]:
    """All of an adapter under PEFT's saved names, its updates at one rank."""
    found = {}
    for module, update in contents.updates.items():
        a, b = padded(update, rank)
        kind = "lora_embedding_{}" if update.embedding else "lora_{}.weight"
        found[f"{PREFIX}{module}.{kind.format('A')}"] = a
        found[f"{PREFIX}{module}.{kind.format('B')}"] = b
        if update.magnitude is not None:
            found[f"{PREFIX}{module}.lora_magnitude_vector"] = update.magnitude.clone()
    found |= {f"{PREFIX}{name}": tensor for name, tensor in contents.whole.items()}
    found |= {f"{PREFIX}{t}.token_adapter.trainable_tokens_delta": rows for t, (_, rows) in contents.taught.items()}
    return found


def _targets(contents: AdapterContents, layers: int) -> list[str]:
    """Ends of names where every layer has the module, else whole names: an end would match other layers too."""
    by_end: dict[str, int] = {}
    for module in contents.updates:
        end = module.rsplit(".", 1)[-1]
        by_end[end] = by_end.get(end, 0) + 1
    inside = {name.rsplit(".", 1)[-1] for name in contents.updates if ".layers." in name}
    everywhere = all(count == layers for end, count in by_end.items() if end in inside)
    return sorted(by_end) if everywhere else sorted(contents.updates)


def one_rank(opened: Opened, contents: AdapterContents | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of the same update without patterns and rsLoRA. Exact but for the rounding of s·B."""
    contents = contents or opened.contents
    rank = max((update.a.shape[0] for update in contents.updates.values()), default=1)
    targets = _targets(contents, int(opened.base.config.num_hidden_layers))
    settings = {"r": rank, "lora_alpha": rank, "target_modules": targets}
    return _tensors(contents, rank), {**opened.config, **_PLAIN, **settings}


def split_names(opened: Opened) -> AdapterContents:
    """The adapter with q_proj, k_proj, v_proj, gate_proj and up_proj in place of the fused modules."""
    contents, config = opened.contents, opened.base.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    cuts = {
        "qkv_proj": (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)),
        "gate_up_proj": (("gate_proj", config.intermediate_size), ("up_proj", config.intermediate_size)),
    }
    found: dict[str, Update] = {}
    for module, update in contents.updates.items():
        above, _, end = module.rpartition(".")
        if end not in cuts:
            found[module] = update
            continue
        first_row = 0
        for name, rows in cuts[end]:
            own = slice(first_row, first_row + rows)
            magnitude = None if update.magnitude is None else update.magnitude[own].clone()
            found[f"{above}.{name}"] = Update(update.a.clone(), update.b[own].clone(), update.scale, magnitude)
            first_row += rows
        assert first_row == update.b.shape[0], f"{module} has {update.b.shape[0]} rows, and its parts {first_row}"
    fused = [name for name in contents.whole if name.split(".")[-2] in cuts]
    if fused:
        what = f"{fused[0]} was trained in full, and is not part of an adapter's split form"
        raise AdapterError(Problem(str(opened.folder), what, "--as merged"))
    return AdapterContents(found, dict(contents.whole), dict(contents.taught))


def joined(contents: AdapterContents) -> AdapterContents:
    """`split_names` undone: parts that share an A are one module again."""
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    fused |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    order = list(fused)
    groups: dict[str, dict[str, Update]] = {}
    for module, update in contents.updates.items():
        above, _, end = module.rpartition(".")
        groups.setdefault(f"{above}.{fused.get(end, end)}".lstrip("."), {})[end] = update
    found = {}
    for module, group in groups.items():
        if set(group) == {module.rsplit(".", 1)[-1]}:
            found[module] = next(iter(group.values()))
            continue
        pieces = [group[end] for end in sorted(group, key=order.index)]
        assert all(torch.equal(piece.a, pieces[0].a) for piece in pieces), f"the parts of {module} share no A"
        magnitudes = [piece.magnitude for piece in pieces]
        whole = None if magnitudes[0] is None else torch.cat([m for m in magnitudes if m is not None])
        found[module] = Update(pieces[0].a, torch.cat([piece.b for piece in pieces]), pieces[0].scale, whole)
    return AdapterContents(found, dict(contents.whole), dict(contents.taught))
