"""Bytes per rank, term by term, before a device is held.

What the strategy holds all the time is counted exactly; what a step adds is walked through moment by moment
(activation_memory.py, fsdp2_memory.py, zero3_memory.py), and the account is that of the highest moment. Each engine's
buffers were read off its real steps on fake CUDA tensors: `python -m phi3_dist.bench.memory` says how far off it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from phi3_dist.family.variants import Shape
from phi3_dist.planning.activation_memory import Step, loss_rows, saved_by_layer
from phi3_dist.planning.fsdp2_memory import fsdp2_gathered
from phi3_dist.planning.memory_moments import Moment, step_moments
from phi3_dist.planning.zero3_memory import Level, Place, zero3_levels

__all__ = [
    "Term",
    "Workload",
    "adapter_parameters",
    "memory_terms",
    "fits",
    "is_sharded",
    "layer_gib",
    "saved_bytes",
    "stored_bytes",
    "total_gib",
]

GIB = 1024**3
NF4_CONSTANTS = 1 / 64 + 4 / (64 * 256)
"""Bytes a weight of double quantisation: a byte of scale for 64, one float32 for 256 of those (QLoRA, section 3)."""
SHIPPED_ZERO: Mapping[str, Any] = {
    "reduce_bucket_size": 10_000_000,
    "stage3_max_live_parameters": 300_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0,
}
"""What decides memory in the shipped DeepSpeed files (planning/launch_configs.py)."""


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
    kernels: str = "torch"
    rank: int = 16
    """The adapter's rank; the largest, where they differ."""
    accumulation: int = 2
    """Micro batches of a step; from the second on there are gradients beside the activations."""
    supervised: float = 1.0
    """Share of tokens that are learned. All, where the data is not counted: an upper bound."""
    fp8: bool = False
    """Whether 8 bits are FP8's, whose products need no copies of their inputs."""
    sequence_parallel: int = 1
    """Ranks that share each pack."""
    zero: Mapping[str, Any] = field(default_factory=lambda: SHIPPED_ZERO)
    """ZeRO's settings; DeepSpeed's own defaults for what is missing."""


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


def _width(precision: str) -> int:
    return 4 if precision == "fp32" else 2


def is_sharded(strategy: str) -> bool:
    """Each rank holds a part of the base's weights."""
    return strategy.startswith(("zero3", "fsdp2"))


def stored_bytes(shape: Shape, load: Workload) -> tuple[float, float]:
    """Bytes of the whole base as it is stored, and of its quantisation constants, which every rank has whole."""
    width = _width(load.precision)
    rest = (shape.parameters - shape.linear_parameters) * width
    if load.quantization == "none":
        return float(shape.parameters * width), 0.0
    if load.quantization == "nf4":
        return shape.linear_parameters * 0.5 + rest, shape.linear_parameters * NF4_CONSTANTS
    scales = 4.0 * shape.layers * sum(rows for _, rows in shape.linear_sizes.values())
    return float(shape.linear_parameters + rest), scales  # one float32 for each output row


def _tokens(load: Workload) -> int:
    """One rank's of a micro batch."""
    return -(-load.micro_batch * load.pack_length // load.sequence_parallel)


def _step_of(shape: Shape, trainable: int, load: Workload) -> Step:
    by = "library" if not load.fused else "triton" if load.kernels == "triton" else "torch"
    return Step(
        tokens=_tokens(load),
        exchanged=load.sequence_parallel > 1,
        drawn_for=load.sequence_parallel,
        supervised=load.supervised,
        precision=load.precision,
        dropout=load.dropout,
        device=load.device,
        by=by,
        ranks=load.rank,
        checkpointing=load.activation_checkpointing,
        chunked=load.chunked,
        whole_attention=load.device == "cpu" or load.precision == "fp32",
        dense=load.quantization == "nf4",
        kept_layers=load.kept_layers,
        copies=load.precision == "bf16" and load.strategy.startswith(("single", "ddp", "zero3")),
        first_input=load.strategy.startswith("zero3"),
        adapter_per_layer=trainable // shape.layers,
        inputs_again=1 if load.quantization == "int8" and not load.fp8 and load.dropout else 0,
    )


def saved_bytes(shape: Shape, trainable: int, load: Workload) -> float:
    """What autograd keeps of a micro batch without recomputing: what the passes between products move."""
    return shape.layers * saved_by_layer(shape, _step_of(shape, trainable, load)).total


def _gathered(shape: Shape, trainable: int, load: Workload) -> Callable[[Place], Level]:
    """Bytes of whole weights while a module runs."""
    if not is_sharded(load.strategy) or load.world_size == 1:
        return lambda _: Level(0.0, 0.0, 0.0)
    width = _width(load.precision)
    if load.strategy.startswith("fsdp2"):
        stored = 0.5 if load.quantization == "nf4" else width
        layer = shape.linear_parameters / shape.layers * stored + trainable / shape.layers * width
        return fsdp2_gathered(shape, layer, width)
    adapters = {name: load.rank * (ins + outs) for name, (ins, outs) in shape.linear_sizes.items()}
    packed = 2 * width if load.quantization == "nf4" else 1
    recompute = load.activation_checkpointing
    levels = zero3_levels(shape, adapters, load.zero, recompute=recompute, packed=packed, width=width)
    return levels.__getitem__


def _highest_of(moment: Moment, gathered: Callable[[Place], Level]) -> tuple[float, float]:
    """Bytes of the moment's own and of gathered weights where both together are most."""
    found = (0.0, gathered(moment.place).there) if moment.place.module else (0.0, 0.0)
    for module, late, entry, peak in moment.segments:
        level = gathered(moment.place._replace(module=module))
        found = max(found, (entry, level.fetching), (peak, level.after if late else level.there), key=sum)
    return found


def memory_terms(shape: Shape, trainable: int, load: Workload, frozen: int = 0) -> tuple[Term, ...]:
    """The account of one rank. `trainable`: parameters of the adapter (see `adapter_parameters`); `frozen`: its others.

    Outside DeepSpeed the adapter is float32 (PEFT's `autocast_adapter_dtype`); ZeRO-1 and ZeRO-2 keep it in bf16 beside
    a float32 master. Offload moves a term to host memory; on a CPU every term is there.
    """
    held = _held_terms(shape, trainable, load, frozen)
    moments = step_moments(shape, _step_of(shape, trainable, load), selects=load.fused)
    bucket, gathered = _backward_bucket(load), _gathered(shape, trainable, load)
    # of one micro batch, autograd's gradients come while activations go
    late = load.accumulation == 1 and not load.strategy.startswith("zero")
    gradients = sum(term.gib for term in held if term.name == "gradients") * GIB
    update = Moment("the update", Place("update", 0, ""), {"activations": 0.0})
    highest = (gradients, update, 0.0, 0.0, 0.0, 1.0)
    for moment in moments:
        phase, layer, _ = moment.place
        there = bucket if phase == "backward" else 0.0
        share = 1.0 if not late else 1 - (layer + 1) / shape.layers if phase != "forward" else 0.0
        own, whole = _highest_of(moment, gathered)
        total = sum(moment.held.values()) + own + whole + there + gradients * max(share, 0.0)
        highest = max(highest, (total, moment, own, whole, there, max(share, 0.0)), key=lambda one: one[0])
    _, moment, own, whole, there, share = highest
    if share < 1:
        held = [replace(term, gib=term.gib * share) if term.name == "gradients" else term for term in held]
    return (*held, *_moment_terms(shape, load, moment, own, whole=whole, bucket=there))


def _held_terms(shape: Shape, trainable: int, load: Workload, frozen: int) -> list[Term]:
    """What lives from step to step."""
    zero, world, bf16 = load.strategy.startswith("zero"), load.world_size, load.precision == "bf16"
    sharded, offload = is_sharded(load.strategy), load.strategy.endswith("_offload")
    rounded = zero and bf16 and not sharded
    masters = zero and bf16
    width = 2 if rounded else 4
    everywhere = offload and sharded
    state_parts = world if zero or sharded else 1
    state = (2 if "8bit" in load.optimizer else 8) + (4 if masters else 0)

    def term(name: str, size: float, words: str, shards: int = 1, on_host: bool = False) -> Term:
        share = f" / {shards} ranks" if shards > 1 else ""
        host = on_host or load.device == "cpu"
        return Term(name, size / shards / GIB, words + share, "host" if host else "device")

    def of(each: float, count: int = trainable) -> str:
        return f"{count:,} parameters × {each:g} B"

    base, constants = stored_bytes(shape, load)
    shards = world if sharded else 1
    out = [term("base weights", base, _base_words(shape, load), shards, everywhere)]
    if constants:
        out.append(term("quantisation constants", constants, f"of {shape.linear_parameters:,} weights, on every rank"))
    out.append(term("adapter", (trainable + frozen) * width, of(width, trainable + frozen), shards, everywhere))
    gradients, words, gradient_parts = _gradients(load, trainable)
    out.append(term("gradients", gradients, words, gradient_parts, offload))
    kinds = "two moments" + (" and a float32 master" if masters else "")
    out.append(term("optimizer", trainable * state, f"{of(state)} ({kinds})", state_parts, offload))
    if load.strategy == "ddp":
        out.append(term("reduce buckets", trainable * 4, f"DDP's copy of the gradients, {of(4)}"))
    if load.strategy.startswith("zero3"):
        bucket = int(load.zero.get("reduce_bucket_size", 500_000_000)) * 4
        out.append(term("reduce buckets", bucket, "stage 3 holds reduce_bucket_size float32 values all along"))
    return out


def _gradients(load: Workload, trainable: int) -> tuple[float, str, int]:
    """Bytes, words, and among how many ranks they are shared."""
    several, world = load.accumulation > 1, load.world_size
    parameters = f"{trainable:,} parameters ×"
    if load.strategy == "zero1" and load.precision == "bf16":
        return trainable * 6.0, f"{parameters} 6 B (bf16, and DeepSpeed's float32 sum of all)", 1
    if load.strategy.startswith("zero"):
        return trainable * 4.0, f"{parameters} 4 B", world if not load.strategy.startswith("zero1") else 1
    if load.strategy.startswith("fsdp2") and several:
        return trainable * 4.0, f"{parameters} 4 B, whole until the last micro batch of a step", 1
    parts = world if load.strategy.startswith("fsdp2") else 1
    return trainable * 4.0, f"{parameters} 4 B", parts


def _backward_bucket(load: Workload) -> float:
    """ZeRO-2's contiguous gradients: a bucket that lives in backward."""
    if not load.strategy.startswith("zero2"):
        return 0.0
    return float(int(load.zero.get("reduce_bucket_size", 500_000_000)) * _width(load.precision))


def _base_words(shape: Shape, load: Workload) -> str:
    width = _width(load.precision)
    if load.quantization == "none":
        return f"{shape.parameters:,} parameters × {width} B"
    per_weight = 0.5 if load.quantization == "nf4" else 1
    rest = shape.parameters - shape.linear_parameters
    return f"{shape.linear_parameters:,} linear parameters × {per_weight} B + {rest:,} others × {width} B"


def layer_gib(shape: Shape, precision: str) -> float:
    """The linear weights of one layer, not quantised."""
    return shape.linear_parameters / shape.layers * _width(precision) / GIB


def _moment_terms(
    shape: Shape, load: Workload, moment: Moment, own: float, *, whole: float, bucket: float
) -> list[Term]:
    """What a step adds at its highest moment. Full packs; all tokens supervised unless it is known better."""
    tokens = _tokens(load)
    place: Literal["device", "host"] = "host" if load.device == "cpu" else "device"
    how = "each layer's input and one layer's insides" if load.activation_checkpointing else "every layer's insides"
    at = f"; at its highest in {moment.name}"
    held = moment.bytes_with(own)
    out = []
    if whole:
        words = f"whole while they are used or fetched ahead{at}"
        out.append(Term("gathered weights", whole / GIB, words, place))
    if bucket:
        out.append(Term("reduce buckets", bucket / GIB, "reduce_bucket_size values, in backward", place))
    dense = held.get("kept weights", 0.0)
    if dense:
        kept = min(load.kept_layers, 1) if load.activation_checkpointing else load.kept_layers
        words = f"{kept} layers × {layer_gib(shape, load.precision):.2f} GiB"
        out.append(Term("dequantised weights", dense / GIB, words, place))
    shared = f" (1/{load.sequence_parallel} of a pack's)" if load.sequence_parallel > 1 else ""
    kept_words = f"{tokens:,} tokens{shared} × {shape.layers} layers, {how}{at}"
    out.append(Term("activations (estimate)", held["activations"] / GIB, kept_words, place, True))
    if "logits" in held:
        rows = loss_rows(_step_of(shape, shape.layers, load))
        at_a_time = "at a time " if load.chunked else ""
        words = f"at most {rows:,} supervised tokens {at_a_time}× {shape.vocab:,}"
        out.append(Term("logits (upper bound)", held["logits"] / GIB, words, place, True))
    if moment.own == "backward's own" and own:
        out.append(Term("backward's own (estimate)", own / GIB, "gradients of activations, and copies", place, True))
    return out


def total_gib(terms: Iterable[Term], place: str = "device") -> float:
    """Sum of the terms in one place, in GiB."""
    return sum(term.gib for term in terms if term.place == place)


def fits(terms: Iterable[Term], device_memory_gib: float, reserve: float = 0.1) -> bool:
    """Whether the device's terms leave `reserve` of its memory free.

    The reserve is a margin for the CUDA context, communication buffers and fragmentation; it is not measured.
    """
    return total_gib(terms) <= device_memory_gib * (1 - reserve)
