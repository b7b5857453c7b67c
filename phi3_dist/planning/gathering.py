"""Weights that are whole on a rank while each rank holds a part of them: ZeRO-3's and FSDP2's, moment by moment.

Both were read off their real engines on fake CUDA tensors (`python -m phi3_dist.bench.memory`). DeepSpeed 0.19 gathers
the next parameters ahead as long as fewer than `stage3_max_live_parameters` are whole; those gathered together come in
one buffer and are copied out of it. FSDP2 gathers a layer into one buffer, copies its parameters out of it, and keeps
that until the next one's is copied; the root group (embedding and head) is whole all along.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from phi3_dist.family.variants import Shape

__all__ = ["fsdp2_gathered", "zero3_gathered"]

ByMoment = tuple[float, float, float, float, float]
"""At the first layer's forward, the last one's, the loss, the last layer's backward, and that of the one before it."""


def fsdp2_gathered(shape: Shape, layer_bytes: float, width: int) -> ByMoment:
    """Bytes of whole weights at each moment. `layer_bytes`: one layer with its adapter, as it is gathered."""
    root = shape.vocab * shape.hidden * width * (1 if shape.tied else 2)
    return (
        2 * root + 2 * layer_bytes,
        root + 3 * layer_bytes,
        root + layer_bytes,
        root + 2 * layer_bytes,
        root + 2 * layer_bytes,
    )


@dataclass
class _Live:
    """DeepSpeed's coordinator over a known trace: what is fetched, fetched ahead, and released."""

    sizes: Mapping[str, int]
    most: int
    bucket: int
    whole: set[str] = field(default_factory=set)
    flying: set[str] = field(default_factory=set)
    wanted_again: dict[str, int] = field(default_factory=dict)
    peak: int = 0

    @property
    def live(self) -> int:
        return sum(self.sizes[name] for name in self.whole | self.flying)

    def fetch(self, step: int, names: tuple[str, ...], queue: deque[tuple[int, str]]) -> int:
        """The most parameters that are there at once while this module's are fetched."""
        missing = [name for name in names if name not in self.whole and name not in self.flying]
        buffers = sum(self.sizes[name] for name in self.flying if name in names) if len(self.flying) > 1 else 0
        copied = sum(self.sizes[name] for name in missing) if len(missing) > 1 else 0
        self.whole |= set(names)
        self.flying -= set(names)
        while queue and queue[0][0] <= step:
            queue.popleft()
        room, ahead = min(self.most - self.live, self.bucket), 0
        most_here = self.live + max(buffers, copied)
        while queue and ahead < room:
            at, name = queue.popleft()
            self.wanted_again[name] = max(self.wanted_again.get(name, -1), at)
            if name not in self.whole and name not in self.flying:
                self.flying.add(name)
                ahead += self.sizes[name]
        return max(most_here, self.live)

    def release(self, step: int, names: tuple[str, ...]) -> None:
        self.whole -= {name for name in names if self.wanted_again.get(name, -1) <= step}


def _trace(shape: Shape, adapters: Mapping[str, int], packed: int) -> tuple[list[tuple[str, ...]], dict[str, int]]:
    """Modules in the order of a forward pass, each with its parameters, and their sizes."""
    sizes = {"table": shape.vocab * shape.hidden, "end": shape.hidden}
    sizes["head"] = shape.vocab * shape.hidden
    head = "table" if shape.tied else "head"
    modules: list[tuple[str, ...]] = [("table",)]
    for number in range(shape.layers):
        for kind in ("norm", "qkv_proj", "o_proj", "norm2", "gate_up_proj", "down_proj"):
            name = f"{kind}.{number}"
            if kind.startswith("norm"):
                sizes[name] = shape.hidden
                modules.append((name,))
                continue
            inputs, outputs = shape.linear_sizes[kind]
            sizes[name], sizes[f"{name}.lora"] = inputs * outputs // packed, adapters.get(kind, 0)
            modules.append((name, f"{name}.lora"))
    return [*modules, ("end",), (head,)], sizes


def zero3_gathered(
    shape: Shape, adapters: Mapping[str, int], settings: Mapping[str, Any], *, recompute: bool, packed: int = 1
) -> ByMoment:
    """Parameters that are whole at each moment; `adapters`: trained parameters at each linear; `settings`: ZeRO's.

    `packed`: linear weights that are stored in one element.
    """
    shallow = Shape(**{**vars(shape), "layers": min(shape.layers, 12)})
    modules, sizes = _trace(shallow, adapters, packed)
    backward = list(reversed(modules))
    if recompute:
        backward = backward[:2]
        per_layer = 6
        for last in range(shallow.layers - 1, -1, -1):
            one = modules[1 + last * per_layer : 1 + (last + 1) * per_layer]
            backward += [*one, *reversed(one)]
    trace = [*modules, *backward]
    live = _Live(
        sizes,
        int(settings.get("stage3_max_live_parameters", 1e9)),
        int(settings.get("stage3_prefetch_bucket_size", 5e7)),
    )
    queue = deque((step, name) for step, names in enumerate(trace) for name in names)
    counts = [0] * len(trace)
    for step, names in enumerate(trace):
        counts[step] = live.fetch(step, names, queue)
        if int(settings.get("stage3_max_reuse_distance", 1e9)) < 1e9 // 2 or step + 1 == len(trace):
            live.release(step, names)
    end = len(modules)
    per = 12 if recompute else 6
    if (
        recompute
    ):  # an upper bound: all that may live, and the largest on top; the real one lies between it and the walk
        most = float(min(live.most + max(sizes.values()), sum(sizes.values())))
        return (float(max(counts[:7])), float(max(counts[end - 8 : end - 2])), most, most, most)
    return (
        float(max(counts[:7])),
        float(max(counts[end - 8 : end - 2])),
        float(max(counts[end - 2 : end + 2])),
        float(max(counts[end + 2 : end + 2 + per])),
        float(max(counts[end + 2 + per : end + 2 + 2 * per], default=0)),
    )
