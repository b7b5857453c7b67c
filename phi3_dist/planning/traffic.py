"""Bytes that one rank sends in a step, and over what: gradients, gathered weights, and host memory for offloads.

Of a ring over N ranks each sends (N - 1)/N of what is gathered or reduced, twice that for an all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass

from phi3_dist.family.variants import Shape

__all__ = ["Traffic", "step_traffic"]


@dataclass(frozen=True)
class Traffic:
    """Bytes of one rank and step. `gathered` overlaps with computing, `reduced` comes at a step's end."""

    gathered: float
    reduced: float
    host: float
    collectives: int
    exchanged: float = 0.0
    """Of attention's heads and tokens, where ranks share packs; computing waits for it."""

    @property
    def network(self) -> float:
        return self.gathered + self.reduced + self.exchanged


def step_traffic(
    shape: Shape,
    strategy: str,
    world: int,
    *,
    base_bytes: float,
    trainable: int,
    accumulation: int,
    precision: str,
    checkpointing: bool,
) -> Traffic:
    """`base_bytes` are the stored base's, which ZeRO-3 and FSDP2 gather forward and backward of each micro batch."""
    share = (world - 1) / world
    zero, sharded = strategy.startswith("zero"), strategy.startswith(("zero3", "fsdp2"))
    offload = strategy.endswith("_offload")
    gathered = reduced = 0.0
    collectives = 0
    # gradients are summed in float32 whatever the model's dtype
    if strategy == "ddp" or (strategy.startswith("fsdp2") and not sharded):
        reduced, collectives = 2 * share * trainable * 4, max(1, trainable * 4 // (25 << 20))
    elif zero and not sharded:
        back = 2 if precision == "bf16" else 4
        reduced = share * trainable * (8 if strategy == "zero1" else 4) + share * trainable * back
        collectives = 2 * max(1, trainable // 10_000_000)
    elif sharded:
        # the embedding is needed once, the head once, each layer in forward and in backward (and once for both where
        # a layer is recomputed right before it)
        tables = shape.vocab * shape.hidden * (1 if shape.tied else 2) * (4 if precision == "fp32" else 2)
        layers = max(base_bytes - tables, 0.0)
        gathered = accumulation * share * (2 * layers + tables)
        reduced = share * trainable * 4 * (accumulation if zero else 1)
        each = 1 if not zero else 4
        collectives = accumulation * (2 * each * shape.layers + 2) + shape.layers
    host = 0.0
    if offload:
        host = trainable * (4 + 2) / (world if zero or sharded else 1)
        if sharded:
            host += accumulation * 2 * base_bytes / world
    if world == 1:
        gathered = reduced = 0.0
        collectives = 0
    return Traffic(gathered, reduced, host, collectives)
