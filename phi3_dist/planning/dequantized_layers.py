"""How many layers of an NF4 base keep their dequantised weights from forward to backward.

On a CPU (the throughput benchmark's model, `python -m phi3_dist.bench.pairs`) kept weights took 1.001, 1.008 and 1.010
of the time without activation checkpointing, one and two threads, 80 pairs: fresh memory costs what dequantising does.
With it they took 0.991, 0.992 and 0.993, of which 54 of 80 pairs were faster. No GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Iterable

from phi3_dist.family.variants import Shape
from phi3_dist.planning.memory import Term, Workload, layer_gib, total_gib

__all__ = ["RESERVE", "choose_kept_layers", "stored_as"]

RESERVE = {"device": 0.3, "host": 0.5}
"""Share of the memory that stays free: the account is an estimate, and others and the files' pages need a host too."""


def choose_kept_layers(
    configured: str | int, shape: Shape, load: Workload, terms: Iterable[Term], memory_gib: float, *, fused: bool
) -> tuple[int, str]:
    """Layers that keep their weights, counted from the last, and the reason.

    `terms` is the account without them and `memory_gib` what one rank has of the memory that its base lies in. `fused`:
    whether LoRA linears are this toolkit's, since bitsandbytes' own keep nothing. With activation checkpointing a layer
    is recomputed right before its backward, so that all may keep theirs and one is there at a time. Without it, `auto`
    keeps none: whoever picks NF4 wants the memory, and kept weights would make QLoRA larger than LoRA.
    """
    if not fused:
        return 0, "model.fused_lora is false, and PEFT's layers dequantise twice"
    if isinstance(configured, int):
        return min(configured, shape.layers), "as the run file says"
    place = "host" if load.device == "cpu" else "device"
    free_gib = memory_gib * (1 - RESERVE[place]) - total_gib(terms, place)
    each = layer_gib(shape, load.precision)
    fit = max(0, int(free_gib / each))
    words = f"{each:.2f} GiB a layer, {max(free_gib, 0):.1f} GiB to spare with {RESERVE[place]:.0%} kept free"
    if load.activation_checkpointing:
        return (
            shape.layers if fit else 0
        ), f"one layer's at a time, since it is recomputed before its backward; {words}"
    if place == "host":
        return 0, "on a CPU dequantising twice takes no longer than the memory to keep them"
    why = f"kept, they would take back what NF4 saves; {min(fit, shape.layers)} would fit (model.dequantized_layers=N)"
    return 0, f"{why}; {words}"


def stored_as(quantization: str, precision: str, kernels: str, *, fp8: bool) -> str:
    """The quantization whose weights take as much memory as this run's.

    FP8 takes a byte a weight and a float32 a row, as int8; with Triton's kernels two bytes, since it is kept along both
    sides: turning the bytes for each backward took 0.68 ms a layer of Phi-3-mini on an H200, of which the products in
    FP8 take 1.4.
    """
    if not fp8:
        return quantization
    return "none" if kernels == "triton" and precision == "bf16" else "int8"
