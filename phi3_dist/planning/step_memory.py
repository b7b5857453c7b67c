"""What a micro batch holds on one rank, byte for byte: what autograd keeps, and what each backward borrows.

A step's memory is highest in one of a few moments: while the loss is computed, or in the backward of the last decoder
layer, or of the one before it (the last one's MLP sees supervised rows alone, and may be the smaller). Each moment is
walked through here as the fused functions of modeling/ run it; `python -m phi3_dist.bench.memory` holds the walk
against the real step on fake CUDA tensors and on a CPU.

Shapes: T tokens of a micro batch, S of them supervised, H hidden, Q queries, K keys, I inner, R rank, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from phi3_dist.family.variants import Shape

__all__ = ["Moment", "Step", "loss_rows", "saved_by_layer", "step_moments"]

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
    inputs_again: int = 0
    """Further copies of each linear's input that are kept, as LLM.int8() and PEFT's own LoRA beside it do."""
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


@dataclass
class _Walk:
    """Bytes that live beside what was there at its start, and the most there were."""

    now: float = 0.0
    peak: float = 0.0

    def take(self, size: float) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def give(self, size: float) -> None:
        self.now -= size

    def borrow(self, size: float) -> None:
        self.take(size)
        self.give(size)


@dataclass(frozen=True)
class Moment:
    """Bytes by what they are for, at one moment of a step."""

    name: str
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def loss_rows(step: Step) -> int:
    """Rows of logits that exist at a time."""
    return min(step.rows, CHUNK_ROWS.get(step.device, 512)) if step.chunked else step.rows


def _logits_bytes(shape: Shape, step: Step) -> float:
    """In chunks: the logits and, in 16 bits, their float32 copy. At once: those, the log-softmax, and gradients."""
    each = step.width + (4 if step.width == 2 else 0)
    return loss_rows(step) * shape.vocab * (each if step.chunked else 12 if step.width == 4 else 16)


@dataclass(frozen=True)
class _Layer:
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


def saved_by_layer(shape: Shape, step: Step, rows: int | None = None) -> _Layer:
    """What a layer keeps; `rows`: that many go on after its attention, as in the last one."""
    t, w, r = step.tokens, step.width, step.ranks
    m = t if rows is None else rows
    h, q, k, i = shape.hidden, shape.q_out, shape.kv_out, shape.intermediate
    mask = 1 if step.dropout > 0 and step.by != "triton" else 0
    copied = 2 * step.adapter_per_layer if step.copies and step.by != "triton" else 0
    layer = _Layer(
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
    walk: _Walk, shape: Shape, step: Step, name: str, rows: int, saved: float, *, mask: float, low: float, keeps: bool
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


def _norm_backward(walk: _Walk, step: Step, size: float, saved: float) -> None:
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


def _layer_backward(walk: _Walk, shape: Shape, step: Step, layer: _Layer, rows: int | None, *, keeps: bool) -> None:
    """From the gradient of a layer's output, which is there, to that of its input."""
    t, w = step.tokens, step.width
    m = t if rows is None else rows
    h, q, k, i = shape.hidden, shape.q_out, shape.kv_out, shape.intermediate

    def linear(name: str, number: int, rows: int, saved: float) -> None:
        _lora_backward(
            walk, shape, step, name, rows, saved, mask=layer.masks[number], low=layer.low[number], keeps=keeps
        )

    linear("down_proj", 3, m, layer.inner)
    walk.take(2 * m * i * w)
    if step.by != "triton":
        walk.borrow(m * i * w)
    walk.give(m * i * w + layer.gate_up)
    linear("gate_up_proj", 2, m, layer.normed_mlp)
    walk.give(2 * m * i * w)
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
    _norm_backward(walk, step, t * h * w, layer.x)


def _kept_weights(shape: Shape, step: Step, layers: int) -> float:
    return min(layers, step.kept_layers) * shape.linear_parameters / shape.layers * step.width


def _tables(shape: Shape, step: Step) -> float:
    """Cosines and sines, their halves, ids and positions."""
    return step.tokens * (3 * shape.head_dim * step.width + 3 * 8) + step.rows * 16


def _drawn(shape: Shape, step: Step) -> float:
    """The largest mask of a whole pack, of which a rank keeps its rows: a byte for each token and input."""
    if step.dropout == 0 or step.drawn_for == 1:
        return 0.0
    return float(step.tokens * step.drawn_for * max(ins for ins, _ in shape.linear_sizes.values()))


def step_moments(shape: Shape, step: Step, *, selects: bool) -> tuple[Moment, ...]:
    """The moments at which a micro batch's bytes may be highest.

    `selects`: whether the last layer's MLP sees supervised rows alone.
    """
    t, w, s, h = step.tokens, step.width, step.rows, shape.hidden
    rows = s if selects else None
    layer, last = saved_by_layer(shape, step), saved_by_layer(shape, step, rows)
    tables, n = _tables(shape, step), shape.layers
    out_rows = s if selects else t
    # the last layer's output, its norm, the loss's gradient of it
    end = out_rows * (2 * h * w + 4) + (0 if selects else s * h * w) + s * h * w
    before: float
    after_last: float
    after_two: float
    if step.checkpointing:
        before, after_last, after_two = n * t * h * w, (n - 1) * t * h * w, max(n - 2, 0) * t * h * w
    else:  # the first one's input needs no gradient
        before = (n - 1) * layer.total + last.total - layer.x
        after_last, after_two = before, before - last.total
    largest = max(ins * outs for ins, outs in shape.linear_sizes.values()) * w if step.dense else 0.0
    ahead = before - (0 if step.checkpointing else last.total)
    kept = 0.0 if step.checkpointing else _kept_weights(shape, step, n)
    moments = [
        Moment("the first layer's forward", {"activations": 2.0 * t * h * w + tables, "one dequantised": largest}),
        Moment(
            "the last layer's forward",
            {
                "activations": ahead + 2 * t * h * w + tables + _drawn(shape, step),
                "kept weights": kept,
                "one dequantised": largest,
            },
        ),
        Moment(
            "the loss",
            {"activations": before + end + tables, "logits": _logits_bytes(shape, step), "kept weights": kept},
        ),
    ]
    names = ("the last layer's backward", "the backward of the layer before the last")
    for number, (one, its_rows, held) in enumerate(((last, rows, after_last), (layer, None, after_two))[: min(n, 2)]):
        walk = _Walk()
        walk.take((out_rows if number == 0 else t) * h * w + (one.total if step.checkpointing else 0))
        if step.checkpointing:
            walk.borrow(_drawn(shape, step))
        keeps = step.dense and step.kept_layers > number
        _layer_backward(walk, shape, step, one, its_rows, keeps=keeps)
        still = _kept_weights(shape, step, 1 if step.checkpointing else n - number)
        parts = {"activations": held + tables, "backward's own": walk.peak, "kept weights": still}
        moments.append(Moment(names[number], parts))
    return tuple(moments)
