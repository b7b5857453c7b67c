"""What a micro batch holds on one rank, byte for byte: what autograd keeps, and what each backward borrows.

A layer's forward and backward are walked through here as the fused functions of modeling/ run them, in segments: one
for each module that may gather its weights. `python -m phi3_dist.bench.memory` holds the walk against the real step on
fake CUDA tensors and on a CPU; memory_moments.py puts it together.

Shapes: T tokens of a micro batch, S of them supervised, H hidden, Q queries, K keys, I inner, R rank, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from phi3_dist.family.variants import Shape

__all__ = [
    "Layer",
    "Segment",
    "Step",
    "Walk",
    "kept_weights",
    "layer_backward",
    "layer_forward",
    "logits_bytes",
    "loss_rows",
    "saved_by_layer",
    "table_bytes",
]

CHUNK_ROWS = {"cuda": 512, "cpu": 128}
"""Rows of logits that exist at a time, as modeling/loss.py has it."""
_TILE_ROWS, _TILE_SPAN = 256, 1024
"""Rows and columns of a program of Triton's LoRA kernels (modeling/kernels/lora.py), which leaves a float32 sum."""


@dataclass(frozen=True)
class Step:
    """One rank's micro batch, and how its layers are computed. `supervised` is the share of tokens that are learned.

    `by`: `torch` (the fused functions), `triton`, or `library` (PEFT's and transformers' own forwards). `dense_bytes`
    are those of a weight that is dequantised for a product; 0: none is. `copies`: the adapter is float32 beside a
    16-bit model, and each layer keeps 16-bit copies of it.
    """

    tokens: int
    supervised: float
    precision: str
    dropout: float
    device: str
    by: str
    ranks: int
    checkpointing: bool = False
    chunked: bool = True
    whole_attention: bool = False
    """Whether attention's output is copied once more, as one call for each document does."""
    dense: bool = False
    kept_layers: int = 0
    copies: bool = False
    adapter_per_layer: int = 0
    first_input: bool = False
    """Whether the first layer's input is kept, as ZeRO-3's hooks do."""
    inputs_again: int = 0
    """Further copies of each linear's input that are kept, as PEFT's own LoRA beside LLM.int8() does with dropout."""
    exchanged: bool = False
    """Whether attention sends its heads to the ranks that share the pack, and gets tokens back."""
    drawn_for: int = 1
    """Shares of a pack for which each rank draws dropout, one of which it keeps."""

    @property
    def width(self) -> int:
        return 4 if self.precision == "fp32" else 2

    @property
    def rows(self) -> int:
        """Supervised rows."""
        return max(1, round(self.tokens * self.supervised))


class Segment(NamedTuple):
    """Bytes beside a moment's own while a module runs: as it begins, and at most. `late`: when its weights are free."""

    module: str
    late: bool
    entry: float
    peak: float


@dataclass
class Walk:
    """Bytes that live beside what was there at its start, and the most there were since the last `begin`."""

    now: float = 0.0
    peak: float = 0.0
    module: str = ""
    late: bool = False
    entry: float = 0.0
    done: list[Segment] = field(default_factory=list)

    def begin(self, module: str, *, late: bool = False) -> None:
        self.end()
        self.module, self.late, self.entry, self.peak = module, late, self.now, self.now

    def end(self) -> tuple[Segment, ...]:
        if self.module:
            self.done.append(Segment(self.module, self.late, self.entry, self.peak))
        self.module = ""
        return tuple(self.done)

    def take(self, size: float) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def give(self, size: float) -> None:
        self.now -= size

    def borrow(self, size: float) -> None:
        self.take(size)
        self.give(size)


def loss_rows(step: Step) -> int:
    """Rows of logits that exist at a time."""
    return min(step.rows, CHUNK_ROWS.get(step.device, 512)) if step.chunked else step.rows


def logits_bytes(shape: Shape, step: Step) -> float:
    """In chunks: the logits and, in 16 bits, their float32 copy. At once: those, the log-softmax, and gradients."""
    each = step.width + (4 if step.width == 2 else 0)
    return loss_rows(step) * shape.vocab * (each if step.chunked else 12 if step.width == 4 else 16)


@dataclass(frozen=True)
class Layer:
    """What one decoder layer keeps from forward to backward, in bytes."""

    x: float
    normed: float
    qkv: float
    attended: float
    chosen: float
    middle: float
    normed_mlp: float
    gate_up: float
    inner: float
    masks: tuple[float, float, float, float]
    low: tuple[float, float, float, float]
    small: float
    copies: float
    again: float

    @property
    def total(self) -> float:
        wide = self.x + self.normed + self.qkv + self.attended + self.chosen + self.middle + self.normed_mlp
        return (
            wide + self.gate_up + self.inner + sum(self.masks) + sum(self.low) + self.small + self.copies + self.again
        )


def saved_by_layer(shape: Shape, step: Step, rows: int | None = None) -> Layer:
    """What a layer keeps; `rows`: that many go on after its attention, as in the last one."""
    t, w, r = step.tokens, step.width, step.ranks
    m = t if rows is None else rows
    h, q, k, i = shape.hidden, shape.q_out, shape.kv_out, shape.intermediate
    mask = 1 if step.dropout > 0 and step.by != "triton" else 0
    copied = 2 * step.adapter_per_layer if step.copies and step.by != "triton" else 0
    layer = Layer(
        x=t * h * w,
        normed=t * h * w,
        qkv=t * (q + 2 * k) * w,
        attended=t * q * w * (2 if (step.whole_attention or step.exchanged) and rows is None else 1),
        chosen=0 if rows is None else m * q * w,
        middle=m * h * w,
        normed_mlp=m * h * w,
        gate_up=2 * m * i * w,
        inner=m * i * w,
        masks=(t * h * mask, m * q * mask, m * h * mask, m * i * mask),
        low=(t * r * w, m * r * w, m * r * w, m * r * w),
        small=4 * t + 4 * m + 4 * t * shape.heads,
        copies=copied,
        again=step.inputs_again * w * (t * h + m * (q + h + i)),
    )
    if step.by != "library":
        return layer
    # coefficients that were read off what autograd saves for a PEFT Phi-3 (torch 2.13, CPU, sdpa)
    whole = 20 * h + 12 * q + 12 * k + 16 * i if w == 4 else 16 * h + 10 * q + 6 * k + 10 * i
    whole += (4 if step.device == "cpu" else 1) * (2 * h + q + i) if step.dropout > 0 else 0
    return replace(layer, again=max(0.0, t * whole - layer.total))


def _lora_backward(  # noqa: PLR0917 -- what of a layer it is about
    walk: Walk, shape: Shape, step: Step, name: str, rows: int, saved: float, *, mask: float, low: float, keeps: bool
) -> None:
    """Backward of one LoRA linear. The output's gradient is there before, and the caller's to give back."""
    inputs, outputs = shape.linear_sizes[name]
    w, r = step.width, step.ranks
    size, weights = rows * inputs * w, (inputs + outputs) * r * 4
    dense = inputs * outputs * w if step.dense and not keeps else 0
    grad_low = rows * r * w
    if step.by == "triton":
        strips, spans = -(-rows // _TILE_ROWS), -(-outputs // _TILE_SPAN)
        walk.take(dense)
        walk.borrow(4 * r * (spans * rows + strips * outputs) + grad_low)
        walk.take(grad_low + outputs * r * 4 + size)
        walk.borrow(4 * r * strips * inputs)
        walk.give(dense + grad_low)
    else:
        walk.take(grad_low)
        if mask:
            walk.borrow(size)
        walk.take(size + weights * w // 4)
        walk.borrow(dense)
        if mask:
            walk.borrow(size)
        walk.give(grad_low)
    walk.give(saved + mask + low + (weights * w // 4 if step.by != "triton" else outputs * r * 4))
    if keeps:
        walk.give(inputs * outputs * w)


def _norm_backward(walk: Walk, step: Step, size: float, saved: float) -> None:
    """`size`: bytes of its rows. Two sums of gradients meet in one."""
    if step.by == "triton":
        walk.take(size)
        walk.give(2 * size)  # its output's gradient and the sum's
    else:
        wide = size * 4 / step.width
        walk.borrow(3 * wide if step.width == 2 else 2 * wide)
        walk.take(size)
        walk.give(size)
        walk.take(size)
        walk.give(2 * size)
    walk.give(saved)


def layer_forward(
    walk: Walk, shape: Shape, step: Step, layer: Layer, rows: int | None, *, saves: bool, keeps: bool
) -> None:
    """From a layer's input, which is there and stays, to its output.

    `saves`: what backward wants is kept; `keeps`: the dequantised weights too, which are counted elsewhere.
    """
    t, w, h = step.tokens, step.width, shape.hidden
    m = t if rows is None else rows

    def linear(name: str, number: int, rows: int) -> None:
        ins, outs = shape.linear_sizes[name]
        walk.begin(name)
        aside = layer.masks[number] + layer.low[number] + layer.copies / 4
        walk.take(aside + rows * outs * w)
        walk.borrow(ins * outs * w if step.dense and not keeps else 0)
        if layer.masks[number]:
            walk.borrow(max(rows * ins * w, t * step.drawn_for * ins if step.drawn_for > 1 else 0))
        if not saves:
            walk.give(aside)

    wide = 0 if step.by == "triton" or w == 4 else 2
    walk.begin("norm1")
    walk.borrow(t * h * 4 * wide)
    walk.take(layer.normed)
    linear("qkv_proj", 0, t)
    walk.begin("qkv_proj", late=True)
    walk.take(layer.attended + layer.chosen)
    linear("o_proj", 1, m)
    walk.begin("norm2")
    if not saves:  # the attention's variables live until it returns
        walk.give(layer.normed + layer.qkv + layer.attended + layer.chosen)
    walk.take(layer.middle)
    if rows is None:  # the last layer's forward has a name for what o_proj gave
        walk.give(m * h * w)
    walk.borrow(m * h * 4 * wide)
    walk.take(layer.normed_mlp)
    linear("gate_up_proj", 2, m)
    walk.begin("gate_up_proj", late=True)
    walk.take(layer.inner)
    walk.borrow(0 if step.by == "triton" else layer.inner)
    linear("down_proj", 3, m)


def layer_backward(walk: Walk, shape: Shape, step: Step, layer: Layer, rows: int | None, *, keeps: bool) -> None:
    """From the gradient of a layer's output, which is there, to that of its input."""
    t, w = step.tokens, step.width
    m = t if rows is None else rows
    h, q, k, i = shape.hidden, shape.q_out, shape.kv_out, shape.intermediate

    def linear(name: str, number: int, rows: int, saved: float) -> None:
        walk.begin(name)
        _lora_backward(
            walk, shape, step, name, rows, saved, mask=layer.masks[number], low=layer.low[number], keeps=keeps
        )
        walk.begin(name, late=True)

    linear("down_proj", 3, m, layer.inner)
    walk.take(2 * m * i * w)
    if step.by != "triton":
        walk.borrow(m * i * w)
    walk.give(m * i * w + layer.gate_up)
    linear("gate_up_proj", 2, m, layer.normed_mlp)
    walk.give(2 * m * i * w)
    walk.begin("norm2")
    _norm_backward(walk, step, m * h * w, layer.middle)
    if rows is not None:
        walk.take(t * h * w)
        walk.give(m * h * w)
    linear("o_proj", 1, m, layer.chosen)
    if rows is not None:
        walk.take(t * q * w)
        walk.give(m * q * w)
    joined = t * (q + 2 * k) * w
    if step.exchanged:  # the gradient as it is sent and as it comes
        walk.borrow(2 * t * q * w)
    walk.take(joined)
    walk.give(t * q * w + layer.attended + layer.qkv)
    if step.exchanged:
        walk.borrow(2 * joined)
    walk.take(joined)
    walk.give(joined)
    linear("qkv_proj", 0, t, layer.normed)
    walk.give(joined)
    walk.begin("norm1")
    _norm_backward(walk, step, t * h * w, layer.x)


def kept_weights(shape: Shape, step: Step, layers: int) -> float:
    return min(layers, step.kept_layers) * shape.linear_parameters / shape.layers * step.width


def table_bytes(shape: Shape, step: Step) -> float:
    """Cosines and sines, their halves, ids and positions."""
    return step.tokens * (3 * shape.head_dim * step.width + 3 * 8) + step.rows * 16
