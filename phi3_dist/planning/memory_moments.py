"""The moments of a micro batch at which one rank's bytes may be highest, in the order of a step.

That is while the loss is computed, or in the backward of the last decoder layer or of the one before it (the last one's
MLP sees supervised rows alone, and may be the smaller); where weights are gathered it may be any layer's forward or
backward.

Letters of shapes as in activation_memory.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from phi3_dist.family.variants import Shape
from phi3_dist.planning.activation_memory import (
    Layer,
    Segment,
    Step,
    Walk,
    kept_weights,
    layer_backward,
    layer_forward,
    logits_bytes,
    saved_by_layer,
    table_bytes,
)
from phi3_dist.planning.zero3_memory import Place

__all__ = ["Moment", "step_moments"]


@dataclass(frozen=True)
class Moment:
    """Bytes by what they are for, at one moment of a step; `own` beside them, which varies by segment."""

    name: str
    place: Place
    held: dict[str, float] = field(default_factory=dict)
    own: str = "activations"
    segments: tuple[Segment, ...] = ()

    @property
    def bytes_by_use(self) -> dict[str, float]:
        """At its highest, no weights gathered."""
        return self.bytes_with(max((one.peak for one in self.segments), default=0.0))

    def bytes_with(self, size: float) -> dict[str, float]:
        return {**self.held, self.own: self.held.get(self.own, 0.0) + size}

    @property
    def total(self) -> float:
        return sum(self.bytes_by_use.values())


@dataclass(frozen=True)
class _Kind:
    """A decoder layer of a step, walked through once: those before the last are alike."""

    layer: Layer
    rows: int | None
    forward: Mapping[bool, tuple[Segment, ...]]
    again: Mapping[bool, tuple[Segment, ...]]
    backward: Mapping[bool, tuple[Segment, ...]]
    """Each by whether its dequantised weights are kept."""

    @classmethod
    def of(cls, shape: Shape, step: Step, rows: int | None, out_rows: int) -> _Kind:
        layer = saved_by_layer(shape, step, rows)
        grad = out_rows * shape.hidden * step.width

        def walked(resident: float, run: Callable[..., None], **options: bool) -> tuple[Segment, ...]:
            walk = Walk()
            walk.take(resident)
            run(walk, shape, step, layer, rows, **options)
            return walk.end()

        resident = grad + (layer.total if step.checkpointing else 0)
        saves, both = not step.checkpointing, (False, True)
        return cls(
            layer,
            rows,
            {keeps: walked(0, layer_forward, saves=saves, keeps=keeps) for keeps in both},
            {keeps: walked(grad, layer_forward, saves=True, keeps=keeps) for keeps in both},
            {keeps: walked(resident, layer_backward, keeps=keeps) for keeps in both},
        )


def step_moments(shape: Shape, step: Step, *, selects: bool) -> tuple[Moment, ...]:
    """The moments at which a micro batch's bytes may be highest, in the order of a step.

    `selects`: whether the last layer's MLP sees supervised rows alone.
    """
    t, w, s, h, n = step.tokens, step.width, step.rows, shape.hidden, shape.layers
    tables, out_rows = table_bytes(shape, step), s if selects else t
    plain = _Kind.of(shape, step, None, t)
    last = _Kind.of(shape, step, s if selects else None, out_rows)
    kept_bytes = 0.0 if step.checkpointing else kept_weights(shape, step, n)
    first_kept = n - step.kept_layers if step.dense else n

    def before(layer: int) -> float:
        """What backward wants of the layers below this one; the first one's input needs no gradient."""
        if step.checkpointing:
            return layer * t * h * w
        total = layer * plain.layer.total if layer < n else (n - 1) * plain.layer.total + last.layer.total
        return total - (plain.layer.x if layer and not step.first_input else 0)

    first = {"activations": t * h * w + tables}
    moments = [Moment("the embedding", Place("forward", -1, "embedding"), first)]
    for number in range(n):
        kind = last if number == n - 1 else plain
        keeps = number >= first_kept and not step.checkpointing
        so_far = kept_weights(shape, step, number + 1 - first_kept) if keeps else 0.0
        held = {"activations": before(number) + t * h * w + tables, "kept weights": so_far}
        moments.append(
            Moment(_name(number, n, "forward"), Place("forward", number, ""), held, segments=kind.forward[keeps])
        )
    # the last layer's output, its norm, the loss's gradient of it
    end = out_rows * (2 * h * w + 4) + (0 if selects else s * h * w) + s * h * w
    held = {"activations": before(n) + end + tables, "kept weights": kept_bytes}
    logits = (Segment("head", False, 0.0, logits_bytes(shape, step)),)
    moments.append(Moment("the loss", Place("forward", n, ""), held, "logits", logits))
    own = (Segment("norm", False, 0.0, 0.0 if step.by == "triton" else 3 * out_rows * h * 4),)
    moments.append(Moment("the last norm's backward", Place("backward", n, ""), held, "backward's own", own))
    for number in range(n - 1, -1, -1):
        kind = last if number == n - 1 else plain
        keeps = number >= first_kept
        still = kept_weights(shape, step, 1 if step.checkpointing else number + 1)
        below = before(number if step.checkpointing else number + 1)
        held = {"activations": below + tables, "kept weights": still}
        if step.checkpointing:
            name, place = f"{_name(number, n, 'forward')} again", Place("again", number, "")
            moments.append(Moment(name, place, held, "backward's own", kind.again[keeps]))
        place = Place("backward", number, "")
        moments.append(Moment(_name(number, n, "backward"), place, held, "backward's own", kind.backward[keeps]))
    return tuple(moments)


def _name(number: int, layers: int, phase: str) -> str:
    if number == layers - 1:
        return f"the last layer's {phase}"
    return f"the {phase} of the layer before the last" if number == layers - 2 else f"layer {number + 1}'s {phase}"
