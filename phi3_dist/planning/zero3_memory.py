"""DeepSpeed's ZeRO-3 coordinator, walked through: which weights are whole while each module of a step runs.

DeepSpeed 0.19 records the modules of the first step and gathers the next ones' parameters ahead as long as fewer than
`stage3_max_live_parameters` are whole, at least `stage3_prefetch_bucket_size` at a time. What is gathered together
comes in one buffer and is copied out of it when the first of its modules runs; the buffer lives until
the last one's does. Parameters that are still wanted when the prefetch looks at them stay whole until then. With
checkpointing a layer's forward runs again in the backward of its last module, whose end releases the whole layer.
Read off the real coordinator on fake CUDA tensors, module by module.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from phi3_dist.family.variants import Shape

__all__ = ["Level", "Place", "Zero3Settings", "zero3_levels"]

_BLOCK = ("norm1", "qkv_proj", "o_proj", "norm2", "gate_up_proj", "down_proj")
_FORWARD = ("layer", "norm1", "attn", "qkv_proj", "o_proj", "drop", "norm2", "mlp", "gate_up_proj", "down_proj", "drop")
_BACKWARD = (
    "layer",
    "drop",
    "mlp",
    "down_proj",
    "gate_up_proj",
    "norm2",
    "drop",
    "attn",
    "o_proj",
    "qkv_proj",
    "norm1",
)
"""A decoder layer's modules in the order in which DeepSpeed's hooks see them; most have no parameters of their own, and
each of them is an occasion to fetch ahead."""


class Place(NamedTuple):
    """A module of a step: `forward`, `again` (recomputed) or `backward`; its layer, -1 before and `layers` after."""

    phase: str
    layer: int
    module: str


class Level(NamedTuple):
    """Bytes of gathered weights and their buffers: at most while a module's are fetched, then, and once it ended."""

    fetching: float
    there: float
    after: float


class Zero3Settings(NamedTuple):
    """What of a DeepSpeed file decides it, in parameters."""

    most_live: int
    bucket: int
    reuse: int
    persistent: int

    @classmethod
    def of(cls, zero: Mapping[str, Any]) -> Zero3Settings:
        """With DeepSpeed's own defaults for what is missing."""

        def number(name: str, default: float) -> int:
            value = zero.get(name, default)
            return int(value if isinstance(value, int | float) else default)

        return cls(
            number("stage3_max_live_parameters", 1e9),
            number("stage3_prefetch_bucket_size", 5e7),
            number("stage3_max_reuse_distance", 1e9),
            number("stage3_param_persistence_threshold", 1e5),
        )


class _Weight(NamedTuple):
    values: int
    size: float


@dataclass
class _Group:
    """Parameters that are gathered together: `waiting` for their modules, out of a buffer that is copied or not."""

    waiting: set[str]
    buffer: float
    copied: float


@dataclass
class _Coordinator:
    weights: Mapping[str, _Weight]
    settings: Zero3Settings
    order: list[tuple[Place, tuple[str, ...]]]
    queue: deque[tuple[int, str]] = field(default_factory=deque)
    whole: set[str] = field(default_factory=set)
    flying: dict[str, _Group] = field(default_factory=dict)
    wanted: dict[str, int] = field(default_factory=dict)
    live: int = 0
    now: float = 0.0
    top: float = 0.0

    def __post_init__(self) -> None:
        self.queue = deque((step, name) for step, (_, names) in enumerate(self.order) for name in names)
        kept = [name for name, weight in self.weights.items() if weight.values <= self.settings.persistent]
        self.whole |= set(kept)
        self.now = self.top = sum(self.weights[name].size for name in kept)

    def _take(self, size: float) -> None:
        self.now += size
        self.top = max(self.top, self.now)

    def _gather(self, names: list[str]) -> None:
        size = sum(self.weights[name].size for name in names)
        copied = size if len(names) > 1 else 0.0  # one alone is its own buffer
        group = _Group(set(names), copied, copied)
        self.flying |= dict.fromkeys(names, group)
        self.live += sum(self.weights[name].values for name in names)
        self._take(size)

    def fetch(self, step: int, names: tuple[str, ...]) -> None:
        """As `fetch_sub_module` does: gather what is missing, wait for it, look ahead.

        A module waits for its parameters in the order of a Python set, by address: it may copy the next buffer before
        it frees the last or after. Both were seen; the worse one is taken, which is one linear's weight more.
        """
        missing = [name for name in names if name not in self.whole and name not in self.flying]
        if missing:
            self._gather(missing)
        over = 0.0
        for name in names:
            group = self.flying.pop(name, None)
            if group is None:
                continue
            self._take(group.copied)
            group.copied = 0.0
            self.whole |= group.waiting
            group.waiting.discard(name)
            if not group.waiting:
                over += group.buffer
        self.now -= over
        self._look_ahead(step)

    def _look_ahead(self, step: int) -> None:
        while self.queue and self.queue[0][0] <= step:
            at, name = self.queue.popleft()
            self.wanted[name] = max(self.wanted.get(name, -1), at)
        room, ahead = min(self.settings.most_live - self.live, self.settings.bucket), 0
        names = list[str]()
        while self.queue and ahead < room:
            at, name = self.queue.popleft()
            self.wanted[name] = max(self.wanted.get(name, -1), at)
            if name not in self.whole and name not in self.flying and name not in names:
                names.append(name)
                ahead += self.weights[name].values
        if names:
            self._gather(names)

    def _soon(self, step: int) -> set[str]:
        """Parameters of the next modules, as many as `stage3_max_reuse_distance`."""
        found, passed = set[str](), 0
        for _, names in self.order[step + 1 :]:
            if passed >= self.settings.reuse:
                break
            found |= set(names)
            passed += sum(self.weights[name].values for name in names)
        return found

    def release(self, step: int, names: tuple[str, ...], *, forced: tuple[str, ...] = ()) -> None:
        """`forced`: those that a recomputed layer holds, whether they are wanted again or not."""
        soon = self._soon(step) if self.settings.reuse > 0 and names else set()
        free = [name for name in names if self.wanted.get(name, -1) <= step + 1 and name not in soon]
        for name in {*free, *forced}:
            weight = self.weights[name]
            if name in self.whole and name not in self.flying and weight.values > self.settings.persistent:
                self.whole.discard(name)
                self.live -= weight.values
                self.now -= weight.size


def _weights(shape: Shape, adapters: Mapping[str, int], packed: int, width: int) -> dict[str, _Weight]:
    """`model.layers` of a trace share their sizes: a name is `module.layer`, its adapter's matrices `.a` and `.b`."""
    table = shape.vocab * shape.hidden
    found = {"table": _Weight(table, table * width), "head": _Weight(table, table * width)}
    found["end"] = _Weight(shape.hidden, shape.hidden * width)
    for layer in range(shape.layers):
        for module in _BLOCK:
            name = f"{module}.{layer}"
            if module.startswith("norm"):
                found[name] = _Weight(shape.hidden, shape.hidden * width)
                continue
            inputs, outputs = shape.linear_sizes[module]
            count = inputs * outputs // packed
            found[name] = _Weight(count, count * width)
            rank = adapters.get(module, 0) // (inputs + outputs)
            for part, size in (("a", inputs), ("b", outputs)):  # the adapter is float32 beside a 16-bit base
                if rank:
                    found[f"{name}.{part}"] = _Weight(rank * size, rank * size * 4)
    return found


def _names(weights: Mapping[str, _Weight], module: str, layer: int) -> tuple[str, ...]:
    name = f"{module}.{layer}"
    return tuple(one for one in (name, f"{name}.a", f"{name}.b") if one in weights)


def _trace(shape: Shape, weights: Mapping[str, _Weight], *, recompute: bool) -> Iterator[tuple[Place, tuple[str, ...]]]:
    n, lm_head = shape.layers, "table" if shape.tied else "head"
    for name, own in (("loss", ()), ("model", ()), ("embedding", ("table",)), ("rotary", ())):
        yield Place("forward", -1, name), own
    for layer in range(n):
        for module in _FORWARD:
            yield Place("forward", layer, module), _names(weights, module, layer)
    yield Place("forward", n, "norm"), ("end",)
    yield Place("forward", n, "head"), (lm_head,)
    for name, own in (("loss", ()), ("head", (lm_head,)), ("model", ()), ("norm", ("end",))):
        yield Place("backward", n, name), own
    again = _FORWARD[1:-1] if recompute else ()
    for layer in range(n - 1, -1, -1):
        for module in _BACKWARD:
            yield Place("backward", layer, module), _names(weights, module, layer)
            for other in again if module == "down_proj" else ():
                yield Place("again", layer, other), _names(weights, other, layer)
    if recompute:
        yield Place("backward", -1, "embedding"), ("table",)


@dataclass(frozen=True)
class _WalkInput:
    shape: Shape
    adapters: tuple[tuple[str, int], ...]
    settings: Zero3Settings
    recompute: bool
    packed: int
    width: int


@lru_cache(maxsize=64)
def _levels(walk_input: _WalkInput) -> dict[Place, Level]:
    shape, settings, recompute = walk_input.shape, walk_input.settings, walk_input.recompute
    weights = _weights(shape, dict(walk_input.adapters), walk_input.packed, walk_input.width)
    order = list(_trace(shape, weights, recompute=recompute))
    walk = _Coordinator(weights, settings, order)
    found: dict[Place, Level] = {}
    for step, (place, names) in enumerate(order):
        walk.top = walk.now
        walk.fetch(step, names)
        top, there = walk.top, walk.now
        phase, layer, module = place
        if module == "down_proj" and recompute and phase != "forward":
            if phase == "again":  # the recomputed forward ends here, and the backward of its last module
                of_layer = tuple(name for one in _BLOCK for name in _names(weights, one, layer)[:1])
                walk.release(step, names, forced=of_layer)
                found[Place("backward", layer, module)] = Level(there, there, walk.now)
        else:
            walk.release(step, names)
        found.setdefault(place, Level(top, there, walk.now))
    return found


def zero3_levels(
    shape: Shape,
    adapters: Mapping[str, int],
    zero: Mapping[str, Any],
    *,
    recompute: bool,
    packed: int = 1,
    width: int = 2,
) -> dict[Place, Level]:
    """Bytes by module. `adapters`: trained parameters at each linear; `zero`: ZeRO's settings; `width`: bytes a value.

    `packed`: linear weights that are stored in one element. With `recompute`, the level of a layer's last module in
    backward is that after its forward has run again.
    """
    trained = tuple(sorted(adapters.items()))
    return _levels(_WalkInput(shape, trained, Zero3Settings.of(zero), recompute, packed, width))
