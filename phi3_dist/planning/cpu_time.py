"""How long a step takes on a CPU: products, passes over memory, the host's own work, the network, one after another.

Nothing overlaps on a CPU: the sum is the step. The constants below were set by what each part does (passes over memory,
how far a product of few columns is from a square one); those of products, masks, ranks beside each other and gathers
then by 14 run files that are not among the ten of `python -m phi3_dist.bench.timing`, which checks them and prints the
errors. On a machine where others work, products in a step lose more than square ones do.
"""

from __future__ import annotations

from dataclasses import dataclass

from phi3_dist.family.variants import Shape
from phi3_dist.planning.timing import StepTime
from phi3_dist.planning.traffic import Traffic

__all__ = ["CpuRates", "CpuStep", "cpu_step_time"]


@dataclass(frozen=True)
class CpuRates:
    """One rank's, as `phi3-dist doctor --bandwidth` names them: 10¹² operations and 10⁹ bytes a second, seconds."""

    matrix_fp32_tflops: float
    memory_gbps: float
    network_gbps: float = 1.0
    collective_s: float = 1e-4


@dataclass(frozen=True)
class CpuStep:
    """One rank's micro batch of fused float32 layers. `squares`: the sum of the documents' squared lengths."""

    tokens: int
    supervised: int
    squares: float
    rank: int
    trainable: int
    saved_bytes: float
    dropout: bool = False
    recompute: bool = False
    accumulation: int = 1


@dataclass(frozen=True)
class _Constants:
    """Times the time that the rates give: of base products, of the adapter's and of attention's, of passes."""

    base: float = 1.25
    adapter: float = 2.0
    attention: float = 2.0
    passes: float = 6.0
    """Over what autograd keeps of a layer."""
    logits: float = 10.0
    """Passes over float32 logits."""
    layer_s: float = 1.5e-3
    step_s: float = 3e-3
    update: float = 40.0
    """Bytes moved for each trained value."""
    mask_s: float = 1.5e-8
    """To draw one value of a dropout mask and to pass over it."""
    beside: float = 1.2
    """Times all of the above, where other ranks compute on the same machine and share its caches and memory."""
    network: float = 1.5
    """Times the time of the bytes sent: what is gathered is also copied into place."""


CONSTANTS = _Constants()


def features(shape: Shape, step: CpuStep, rates: CpuRates) -> dict[str, float]:
    """Seconds (of the host's: counts) that each constant multiplies, of a whole step without its network."""
    flops, memory = rates.matrix_fp32_tflops * 1e12, rates.memory_gbps * 1e9
    t, n, r = step.tokens, step.accumulation, step.rank
    again = 1 if step.recompute else 0
    first = 2 * t * shape.hidden * shape.qkv_out  # the first layer's input needs no gradient
    head = 4 * step.supervised * shape.hidden * shape.vocab
    base = t * shape.linear_parameters * (4 + 2 * again) - first + head
    widths = sum(ins + outs for ins, outs in shape.linear_sizes.values()) * shape.layers
    squares = shape.layers * shape.q_out * step.squares
    masks = t * (2 * shape.hidden + shape.q_out + shape.intermediate) * shape.layers
    return {
        "base": n * base / flops,
        "adapter": n * t * r * widths * (6 + 2 * again) / flops,
        "attention": n * squares * (7 + 2 * again) / flops,
        "passes": n * step.saved_bytes * (1 + again / 3) / memory,
        "logits": n * step.supervised * shape.vocab * 4 / memory,
        "layer_s": n * shape.layers * (1 + again / 3),
        "step_s": 1.0,
        "update": step.trainable / memory,
        "mask_s": n * masks * (1 + again) if step.dropout else 0.0,
    }


def cpu_step_time(shape: Shape, step: CpuStep, rates: CpuRates, traffic: Traffic) -> StepTime:
    """Seconds of one step by what they are spent on, which is their sum."""
    each = {name: value * getattr(CONSTANTS, name) for name, value in features(shape, step, rates).items()}
    beside = CONSTANTS.beside if traffic.network else 1.0
    arithmetic = beside * (each["base"] + each["adapter"] + each["attention"])
    memory = beside * (each["passes"] + each["logits"] + each["update"] + each["mask_s"])
    host = beside * (each["layer_s"] + each["step_s"])
    sent_s = CONSTANTS.network * traffic.network / (rates.network_gbps * 1e9)
    network = sent_s + traffic.collectives * rates.collective_s
    parts = {"arithmetic": arithmetic, "memory": memory, "launches": host, "network": network}
    binds = max(parts, key=lambda name: parts[name])
    return StepTime(arithmetic, memory, host, network, 0.0, sum(parts.values()), binds)
