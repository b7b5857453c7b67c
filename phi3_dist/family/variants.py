"""The Phi-3 family as data: the shape of each variant, how one is recognised, and what is refused by name.

Sources: the published `config.json` files and `transformers.models.phi3`; parameter counts were checked with a model
on torch's meta device. The sliding window of medium-128k is quoted, not rechecked; nothing is decided by it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi3_dist.errors import ModelError, Problem

__all__ = [
    "Shape",
    "Family",
    "FAMILIES",
    "HUB_IDS",
    "LINEARS",
    "FUSED_TARGETS",
    "PRESETS",
    "Preset",
    "TINY_RANDOM",
    "family_of_hub_id",
    "recognise",
    "refuse_unsupported",
    "check_targets",
]

TINY_RANDOM = "tiny-random"
"""The source that stands for a small random Phi-3 with a byte tokenizer, both made in code."""
LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""The linear modules of a decoder layer, which `all-linear` adapts."""

FUSED_TARGETS: Mapping[str, str] = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Llama's module names, and the fused module that holds those weights in Phi-3."""


@dataclass(frozen=True)
class Shape:
    """The numbers that fix every tensor of a `Phi3ForCausalLM`. Widths are in values, not bytes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False

    @classmethod
    def of(cls, hf_config: Mapping[str, Any]) -> Shape:
        """The shape in a Hugging Face `config.json`. Raises `ModelError` naming every key that is missing."""
        keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        absent = [key for key in keys if not isinstance(hf_config.get(key), int)]
        if absent:
            raise ModelError(*(Problem("config.json", f"{key} is missing or not a whole number") for key in absent))
        layers, hidden, intermediate, heads, vocab = (int(hf_config[key]) for key in keys)
        return cls(
            layers=layers,
            hidden=hidden,
            intermediate=intermediate,
            heads=heads,
            kv_heads=hf_config.get("num_key_value_heads") or heads,
            head_dim=hf_config.get("head_dim") or hidden // heads,
            vocab=vocab,
            tied=bool(hf_config.get("tie_word_embeddings", False)),
        )

    @property
    def q_out(self) -> int:
        """Width of the queries."""
        return self.heads * self.head_dim

    @property
    def kv_out(self) -> int:
        """Width of the keys; the values have the same."""
        return self.kv_heads * self.head_dim

    @property
    def qkv_out(self) -> int:
        """Rows of the fused `qkv_proj`."""
        return self.q_out + 2 * self.kv_out

    @property
    def gate_up_out(self) -> int:
        """Rows of the fused `gate_up_proj`."""
        return 2 * self.intermediate

    @property
    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear of one decoder layer, by module name."""
        return {
            "qkv_proj": (self.hidden, self.qkv_out),
            "o_proj": (self.q_out, self.hidden),
            "gate_up_proj": (self.hidden, self.gate_up_out),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def linear_parameters(self) -> int:
        """Parameters of all decoder linears: what 4-bit and 8-bit storage apply to."""
        return self.layers * sum(rows * columns for columns, rows in self.linear_sizes.values())

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        norms = self.layers * 2 * self.hidden + self.hidden
        return self.linear_parameters + norms + self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def grouped_query(self) -> bool:
        return self.kv_heads != self.heads


@dataclass(frozen=True)
class Family:
    """A variant: its shape, its attention window (positions, or none) and its rotary embedding (positions)."""

    name: str
    hub_ids: tuple[str, ...]
    shape: Shape
    sliding_window: int | None
    rope: str
    """`plain` or `longrope`."""
    max_positions: int
    original_positions: int
    """Positions below which LongRoPE uses its short factors; the same as `max_positions` where the rope is plain."""
    partial_rotary: float = 1.0
    """Share of each head that is rotated."""

    @property
    def parameters(self) -> int:
        return self.shape.parameters


_MINI = Shape(32, 3072, 8192, 32, 32, 96, 32064)
_MEDIUM = Shape(40, 5120, 17920, 40, 10, 128, 32064)
_PHI4_MINI = Shape(32, 3072, 8192, 24, 8, 128, 200064, tied=True)
_PHI4 = Shape(40, 5120, 17920, 40, 10, 128, 100352)

FAMILIES: tuple[Family, ...] = (
    Family("mini-4k", ("microsoft/Phi-3-mini-4k-instruct",), _MINI, 2047, "plain", 4096, 4096),
    Family(
        "mini-128k and 3.5-mini",
        ("microsoft/Phi-3-mini-128k-instruct", "microsoft/Phi-3.5-mini-instruct"),
        _MINI,
        262144,
        "longrope",
        131072,
        4096,
    ),
    Family("medium-4k", ("microsoft/Phi-3-medium-4k-instruct",), _MEDIUM, 2047, "plain", 4096, 4096),
    Family("medium-128k", ("microsoft/Phi-3-medium-128k-instruct",), _MEDIUM, 131072, "longrope", 131072, 4096),
    Family(
        "Phi-4-mini",
        ("microsoft/Phi-4-mini-instruct",),
        _PHI4_MINI,
        262144,
        "longrope",
        131072,
        4096,
        partial_rotary=0.75,
    ),
    Family("Phi-4", ("microsoft/phi-4",), _PHI4, None, "plain", 16384, 16384),
)
HUB_IDS = ", ".join(hub_id for family in FAMILIES for hub_id in family.hub_ids)
"""All of them, for messages."""


def family_of_hub_id(hub_id: str) -> Family | None:
    """The variant published under this id, in capitals or small letters; None for another id."""
    return next((family for family in FAMILIES if hub_id.lower() in map(str.lower, family.hub_ids)), None)


@dataclass(frozen=True)
class Preset:
    """Where to start with a variant: fields of the run file that its structure speaks for."""

    targets: tuple[str, ...]
    """`lora.targets`."""
    pack_length: int
    """`data.pack_length`, tokens."""
    precision: str
    """`model.precision`: what the published weights are stored in."""
    reason: str


_SHORT = Preset(LINEARS, 2048, "bf16", "half of its 4096 positions, about its attention window of 2047")
_LONG = Preset(LINEARS, 4096, "bf16", "as long as LongRoPE's short factors hold: one set of factors serves all prompts")
PRESETS: Mapping[str, Preset] = {
    "mini-4k": _SHORT,
    "mini-128k and 3.5-mini": _LONG,
    "medium-4k": _SHORT,
    "medium-128k": _LONG,
    "Phi-4-mini": _LONG,
    "Phi-4": Preset(LINEARS, 4096, "bf16", "a quarter of its 16384 positions; it has no attention window"),
}
"""By the family's name. Longer packs are allowed up to `max_positions`; `phi3-dist plan` says whether they fit."""


def _rope_kind(hf_config: Mapping[str, Any]) -> str:
    """`plain` or `longrope`, from either spelling: `rope_scaling` (published files) or `rope_parameters` (new)."""
    scaling = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        return "plain"
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    return "longrope" if kind in ("longrope", "su", "yarn") else "plain"


def recognise(hf_config: Mapping[str, Any]) -> Family | None:
    """The variant with this `config.json`'s structure, or None for a Phi-3 of some other size. Names are not read."""
    try:
        shape = Shape.of(hf_config)
    except ModelError:
        return None
    rope = _rope_kind(hf_config)
    return next((family for family in FAMILIES if family.shape == shape and family.rope == rope), None)


_REFUSED: Mapping[str, str] = {
    "phi3small": "Phi-3-small has block-sparse attention and a gegelu MLP, which exist only as remote code",
    "phi3_v": "Phi-3-vision takes images, and exists only as remote code",
    "phimoe": "Phi-3.5-MoE is a mixture of experts, another class",
    "phi4mm": "Phi-4-multimodal takes images and sound, another class",
    "phi4_multimodal": "Phi-4-multimodal takes images and sound, another class",
    "phi": "Phi-1 and Phi-2 are another class, without fused projections",
}
_CLASSES: Mapping[str, str] = {
    "Phi3SmallForCausalLM": "phi3small",
    "Phi3VForCausalLM": "phi3_v",
    "PhiMoEForCausalLM": "phimoe",
    "PhimoeForCausalLM": "phimoe",
    "Phi4MMForCausalLM": "phi4mm",
    "PhiForCausalLM": "phi",
}


def refuse_unsupported(hf_config: Mapping[str, Any]) -> None:
    """Raise `ModelError` unless this `config.json` is a `Phi3ForCausalLM`'s; the message names what is supported."""
    listed = hf_config.get("architectures")
    classes = [str(name) for name in listed] if isinstance(listed, list | tuple) else []
    model_type = str(hf_config.get("model_type", ""))
    if any(key.startswith("blocksparse") for key in hf_config):
        model_type = "phi3small"
    if not classes and listed:
        classes = [str(listed)]
    reason = next((_REFUSED[_CLASSES[name]] for name in classes if name in _CLASSES), _REFUSED.get(model_type))
    if reason is None:
        if "Phi3ForCausalLM" in classes or (not classes and model_type == "phi3"):
            return
        found = ", ".join(classes)[:100] or model_type[:100] or "no architecture at all"
        reason = f"its class is {found}, and this toolkit trains Phi3ForCausalLM"
    fix = f"use one of {HUB_IDS}, or a model of that class"
    raise ModelError(Problem("model.source", f"not supported: {reason}", fix))


def check_targets(targets: str | Sequence[str], linear_module_names: Iterable[str]) -> list[Problem]:
    """A problem for each of `lora.targets` that is the end of no linear module's name (dots part the name)."""
    if isinstance(targets, str):
        return []
    names = tuple(linear_module_names)
    ends = sorted({name.rsplit(".", 1)[-1] for name in names})
    problems = []
    for index, target in enumerate(targets):
        if any(name == target or name.endswith(f".{target}") for name in names):
            continue
        fused = FUSED_TARGETS.get(target)
        near = difflib.get_close_matches(target, ends, n=1)
        if fused in ends:
            fix = f"Phi-3 fuses that weight into {fused}: name {fused}, or use `targets: all-linear`"
        elif near:
            fix = f"did you mean {near[0]}?"
        else:
            fix = f"the linear modules are {', '.join(ends)}"
        problems.append(Problem(f"lora.targets[{index}]", f"{target!r} matches no module of the model", fix))
    return problems
