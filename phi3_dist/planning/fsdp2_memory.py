"""Weights that are whole on a rank while each rank holds a part of them, under FSDP2; ZeRO-3's are in zero3_memory.py.

Read off the real engine on fake CUDA tensors (`python -m phi3_dist.bench.memory`). FSDP2 gathers a layer into one
buffer, copies its parameters out of it, and keeps that until the next one's is copied; the root group (embedding and
head) is whole all along.
"""

from __future__ import annotations

from collections.abc import Callable

from phi3_dist.family.variants import Shape
from phi3_dist.planning.zero3_memory import Level, Place

__all__ = ["fsdp2_gathered"]


def fsdp2_gathered(shape: Shape, layer_bytes: float, width: int) -> Callable[[Place], Level]:
    """Bytes of whole weights while a module runs. `layer_bytes`: one layer with its adapter, as it is gathered."""
    root = shape.vocab * shape.hidden * width * (1 if shape.tied else 2)

    def level(place: Place) -> Level:
        if place.phase == "forward" and place.layer < 0:
            return Level(*[2 * root + 2 * layer_bytes] * 3)
        if place.phase == "forward" and place.layer < shape.layers:
            there = root + 2 * layer_bytes
            begins = there + (layer_bytes if place.module == "norm1" else 0)
            return Level(begins, there, there)
        return Level(*[root + (1 if place.phase == "forward" else 2) * layer_bytes] * 3)

    return level
