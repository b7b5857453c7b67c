"""Bytes per rank, term by term, before a device is held.

Parameters are counted exactly; what the strategy shards is divided by the world size. The activations are an
estimate, whose coefficients were read off the tensors that autograd saves for a PEFT Phi-3 (torch 2.13, CPU, sdpa);
a test compares them again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from phi3_dist.family.variants import Shape

__all__ = [
    "Term",
    "Workload",
    "adapter_parameters",
    "memory_terms",
    "fits",
    "layer_gib",
    "total_gib",
    "activation_bytes",
]

GIB = 1024**3
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""NF4 with double quantisation: 4 bits a weight, one byte of scale for 64, one float32 for 256 of those (QLoRA, §3)."""
LOSS_BYTES = {"fp32": 12, "bf16": 16}
"""Bytes a logit costs: the logit, its float32 copy (bf16), the log-softmax, and the gradients of each."""

CHUNK_ROWS = 512
"""Rows of logits that exist at a time, as modeling/loss.py has it; fewer on a CPU."""


@dataclass(frozen=True)
class Term:
    """One line of the account of one rank: GiB, the formula in words, and whose memory it is."""

    name: str
    gib: float
    formula: str
    place: Literal["device", "host"] = "device"
    estimated: bool = False
    """Whether the size depends on the data or the kernels, and may turn out smaller."""


@dataclass(frozen=True)
class Workload:
    """What decides the memory beside the model's shape. Lengths in tokens, counts in packs."""

    strategy: str
    world_size: int
    precision: str
    quantization: str = "none"
    pack_length: int = 2048
    micro_batch: int = 1
    activation_checkpointing: bool = False
    dropout: float = 0.0
    optimizer: str = "adamw"
    device: str = "cuda"
    fused: bool = True
    """Whether LoRA linears and layers are the fused ones (`model.fused_lora`, `model.fused_layers`)."""
    chunked: bool = True
    """Whether the loss is computed in chunks of rows: wherever the head has no adapter."""
    kept_layers: int = 0
    """Layers of an NF4 base that keep their dequantised weights from forward to backward."""


def adapter_parameters(
    shape: Shape,
    r: int,
    targets: str | Sequence[str] = "all-linear",
    *,
    dora: bool = False,
    modules_to_save: Iterable[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    layers: Sequence[int] | None = None,
    freeze_a: bool = False,
    new_tokens: int = 0,
) -> int:
    """Trainable parameters of a LoRA: r·(in + out) for each adapted linear, out more with DoRA, and full modules.

    `rank_pattern` gives other ranks, matched as PEFT does; `layers` are those adapted; with `freeze_a` B alone counts;
    each of `new_tokens` trains a row of the embedding and, where it is not tied, of the head.
    """
    total = sum(shape.vocab * shape.hidden for name in modules_to_save if name in ("lm_head", "embed_tokens"))
    total += new_tokens * shape.hidden * (1 if shape.tied else 2)
    for layer in range(shape.layers) if layers is None else layers:
        for name, (columns, rows) in shape.linear_sizes.items():
            block = "self_attn" if name in ("qkv_proj", "o_proj") else "mlp"
            full_name = f"model.layers.{layer}.{block}.{name}"
            if targets != "all-linear" and not any(f".{full_name}".endswith(f".{target}") for target in targets):
                continue
            patterns = (rank for key, rank in (rank_pattern or {}).items() if re.match(rf"(.*\.)?({key})$", full_name))
            rank = next(patterns, r)
            total += rank * (rows if freeze_a else columns + rows) + (rows if dora else 0)
    return total


def activation_bytes(
    shape: Shape, tokens: int, precision: str, *, checkpointing: bool, dropout: float, device: str, fused: bool = False
) -> float:
    """Bytes that autograd keeps from forward to backward for `tokens` tokens on one rank.

    Without checkpointing a layer keeps, for each token, 20·hidden + 12·(queries + keys) + 16·intermediate bytes in
    fp32 and 16·hidden + 10·queries + 6·keys + 10·intermediate in bf16 with a float32 adapter; dropout adds its mask on
    the input of each adapted linear (float32 on a CPU, one byte on CUDA). The fused layers keep, of values w bytes
    wide, w·(4·hidden + 3·queries + 2·keys + 3·intermediate), and one byte for a dropout. With checkpointing each layer
    keeps its input, and one layer at a time the rest.
    """
    h, q, k, i = shape.hidden, shape.q_out, shape.kv_out, shape.intermediate
    per_token = 20 * h + 12 * q + 12 * k + 16 * i if precision == "fp32" else 16 * h + 10 * q + 6 * k + 10 * i
    if fused:
        per_token = _width(precision) * (4 * h + 3 * q + 2 * k + 3 * i)
    if dropout > 0:
        per_token += (4 if device == "cpu" and not fused else 1) * (2 * h + q + i)
    if not checkpointing:
        return float(tokens * shape.layers * per_token)
    return float(tokens * (shape.layers * h * _width(precision) + per_token))


def _width(precision: str) -> int:
    return 4 if precision == "fp32" else 2


def _base_bytes(shape: Shape, load: Workload) -> tuple[float, str]:
    width = _width(load.precision)
    if load.quantization == "none":
        return float(shape.parameters * width), f"{shape.parameters:,} parameters × {width} B"
    per_weight = NF4_BYTES if load.quantization == "nf4" else 1.0
    rest = shape.parameters - shape.linear_parameters
    scales = 0.0
    if load.quantization == "int8":  # one float32 for each output row
        scales = 4.0 * shape.layers * sum(rows for _, rows in shape.linear_sizes.values())
    words = f"{shape.linear_parameters:,} linear parameters × {per_weight:.3f} B + {rest:,} others × {width} B"
    return shape.linear_parameters * per_weight + scales + rest * width, words


def memory_terms(shape: Shape, trainable: int, load: Workload, frozen: int = 0) -> tuple[Term, ...]:
    """The account of one rank. `trainable`: parameters of the adapter (see `adapter_parameters`); `frozen`: its others.

    Outside DeepSpeed the adapter is float32 (PEFT's `autocast_adapter_dtype`); DeepSpeed keeps it in bf16 beside a
    float32 master. Offload moves a term to host memory; on a CPU every term is there.
    """
    zero, world = load.strategy.startswith("zero"), load.world_size
    sharded = load.strategy.startswith(("zero3", "fsdp2"))
    offload = load.strategy.endswith("_offload")
    base, base_words = _base_bytes(shape, load)
    masters = zero and load.precision == "bf16"
    width = 2 if masters else 4
    parts = world if sharded else 1
    gradient_parts = world if sharded or load.strategy.startswith("zero2") else 1
    state_parts = world if zero or sharded else 1
    moments = 2 if "8bit" in load.optimizer else 8
    state = moments + (4 if masters else 0)
    params_on_host = offload and sharded

    def term(name: str, size: float, words: str, parts: int = 1, on_host: bool = False) -> Term:
        share = f" / {parts} ranks" if parts > 1 else ""
        host = on_host or load.device == "cpu"
        return Term(name, size / parts / GIB, words + share, "host" if host else "device")

    out = [
        term("base weights", base, base_words, parts, params_on_host),
        term(
            "adapter",
            (trainable + frozen) * width,
            f"{trainable + frozen:,} parameters × {width} B",
            parts,
            params_on_host,
        ),
        term("gradients", trainable * width, f"{trainable:,} parameters × {width} B", gradient_parts, offload),
        term(
            "optimizer",
            trainable * state,
            f"{trainable:,} parameters × {state} B (two moments{' and a float32 master' if masters else ''})",
            state_parts,
            offload,
        ),
    ]
    if sharded:
        layer = max(2 * shape.linear_parameters // shape.layers, shape.vocab * shape.hidden)
        words = f"{layer:,} parameters at a time (two layers, or the vocabulary) × {_width(load.precision)} B"
        out.append(term("gathered weights", layer * _width(load.precision), words))
    if load.quantization == "nf4":
        out.append(_dequantized_term(shape, load))
    return (*out, *_pass_terms(shape, load))


def layer_gib(shape: Shape, precision: str) -> float:
    """The linear weights of one layer, not quantised."""
    return shape.linear_parameters / shape.layers * _width(precision) / GIB


def _dequantized_term(shape: Shape, load: Workload) -> Term:
    """Weights as numbers beside the 4 bits: of the layers that keep them, and of one linear at a time elsewhere."""
    kept = min(load.kept_layers, 1) if load.activation_checkpointing else load.kept_layers
    layer = layer_gib(shape, load.precision)
    largest = max(columns * rows for columns, rows in shape.linear_sizes.values()) * _width(load.precision) / GIB
    one = "" if kept == shape.layers else "one linear"
    words = " and ".join(part for part in (f"{kept} layers × {layer:.2f} GiB" if kept else "", one) if part)
    size = kept * layer + (largest if one else 0)
    return Term("dequantised weights", size, words, "host" if load.device == "cpu" else "device")


def _pass_terms(shape: Shape, load: Workload) -> tuple[Term, Term]:
    """Activations and logits of one micro batch of full packs, every token supervised: an upper bound."""
    tokens = load.micro_batch * load.pack_length
    kept = activation_bytes(
        shape,
        tokens,
        load.precision,
        checkpointing=load.activation_checkpointing,
        dropout=load.dropout,
        device=load.device,
        fused=load.fused,
    )
    place: Literal["device", "host"] = "host" if load.device == "cpu" else "device"
    how = "each layer's input and one layer's insides" if load.activation_checkpointing else "every layer's insides"
    each = LOSS_BYTES[load.precision]
    rows = min(tokens, CHUNK_ROWS) if load.chunked else tokens
    words = f"at most {rows:,} supervised tokens {'at a time ' if load.chunked else ''}× {shape.vocab:,} × {each} B"
    return (
        Term("activations (estimate)", kept / GIB, f"{tokens:,} tokens × {shape.layers} layers, {how}", place, True),
        Term("logits (upper bound)", rows * shape.vocab * each / GIB, words, place, True),
    )


def total_gib(terms: Iterable[Term], place: str = "device") -> float:
    """Sum of the terms in one place, in GiB."""
    return sum(term.gib for term in terms if term.place == place)


def fits(terms: Iterable[Term], device_memory_gib: float, reserve: float = 0.1) -> bool:
    """Whether the device's terms leave `reserve` of its memory free.

    The reserve is a margin for the CUDA context, communication buffers and fragmentation; it is not measured.
    """
    return total_gib(terms) <= device_memory_gib * (1 - reserve)
