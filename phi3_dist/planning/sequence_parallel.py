"""Ranks that share their packs (`train.sequence_parallel`): what can be shared, why not, and what is exchanged.

docs/long-rows.md has the engine and what others lack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import gcd
from typing import Any

from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import Problem
from phi3_dist.family.variants import Shape
from phi3_dist.planning.facts import Choice, LaunchFacts
from phi3_dist.planning.memory import Workload
from phi3_dist.planning.support import No, support_sharing
from phi3_dist.planning.traffic import Traffic

__all__ = ["exchanged_bytes", "sharing_choice", "sharing_problems", "why_not_kernels", "with_exchanges"]

_KEY = "train.sequence_parallel"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _nearest(asked: int, world: int, shape: Shape | None) -> int:
    common = world if shape is None else gcd(world, shape.heads, shape.kv_heads)
    return min(_divisors(common), key=lambda n: (abs(n - asked), -n))


def _layout(parts: int, world: int, shape: Shape | None) -> str:
    if world % parts:
        return f"is {parts}, and the launch has {world} process{'es' if world > 1 else ''}, not a multiple of {parts}"
    if shape is not None and (shape.heads % parts or shape.kv_heads % parts):
        heads = f"{shape.heads} heads and {shape.kv_heads} key/value heads"
        return f"is {parts}, and {heads} do not divide among {parts} ranks"
    return ""


def sharing_problems(
    cfg: RunConfig, launch: LaunchFacts, model: Mapping[str, Any] | Any, shape: Shape | None
) -> Iterator[Problem]:
    """Why ranks can't share packs as the run file asks; nothing where it asks for no sharing."""
    ranks, lora = cfg.train.sequence_parallel, cfg.lora
    if ranks == 1:
        return
    wrong = _layout(ranks, launch.world_size, shape)
    if wrong:
        near = _nearest(ranks, launch.world_size, shape)
        yield Problem(_KEY, wrong, f"nearest: {_KEY}={near}")
    answer = support_sharing(launch.strategy, "fp8" if cfg.model.fp8 else cfg.model.quantization)
    if isinstance(answer, No) and not (wrong and launch.strategy == "single"):
        yield Problem(_KEY, f"is {ranks}: {answer.reason}", f"nearest: {answer.nearest}")
    by_peft = "lora.dora is true" if lora.dora else "" if cfg.model.fused_lora else "model.fused_lora is false"
    if lora.dropout > 0 and by_peft:
        what = f"is {lora.dropout:g}, and {by_peft}: PEFT's own forward draws for a rank's part alone"
        yield Problem("lora.dropout", what, f"nearest: lora.dropout=0, or {_KEY}=1")
    of_attention = (model.get("attention_dropout") or 0.0) if isinstance(model, Mapping) else 0.0
    if of_attention:
        what = f"has attention_dropout {of_attention:g}, which ranks that share a pack would draw each for itself"
        yield Problem("model.source", what, f"set it to 0 in the base's config.json, or {_KEY}=1")


def sharing_choice(cfg: RunConfig, launch: LaunchFacts) -> Choice | None:
    """How packs are shared, and what that means; None where they are not."""
    ranks = cfg.train.sequence_parallel
    if ranks == 1:
        return None
    inside = launch.ranks_per_node % ranks == 0
    where = "inside a node" if inside else "between nodes, which is slower: neighbouring ranks of one node are best"
    why = f"as the run file says; each has 1/{ranks} of its tokens, and in attention 1/{ranks} of the heads, exchanged"
    return Choice("sequence parallel", f"{ranks} ranks share a pack", f"{why} {where}")


def why_not_kernels(cfg: RunConfig) -> str:
    """Why Triton's kernels don't run where packs are shared; empty where they are not."""
    if cfg.train.sequence_parallel == 1:
        return ""
    return "ranks share packs, and Triton's kernels draw dropout for a rank's own rows, and take at least one row"


def exchanged_bytes(shape: Shape, ranks: int, tokens: int, *, precision: str, recompute: bool) -> float:
    """Bytes that one rank sends in the exchanges of a micro batch of `tokens`, over all of its ranks.

    Queries, keys and values one way and attention's output back; as much for their gradients, and the forward's once
    more where layers are recomputed.
    """
    each = 2 * shape.q_out + 2 * shape.kv_out
    passes = 3 if recompute else 2
    width = 4 if precision == "fp32" else 2
    return shape.layers * passes * tokens / ranks * each * width * (ranks - 1) / ranks


def with_exchanges(traffic: Traffic, shape: Shape, load: Workload) -> Traffic:
    """What a rank sends in a step, with the exchanges of shared packs."""
    parts = load.sequence_parallel
    if parts == 1:
        return traffic
    recompute, tokens = load.activation_checkpointing, load.micro_batch * load.pack_length
    exchanged = exchanged_bytes(shape, parts, tokens, precision=load.precision, recompute=recompute)
    # there and back in forward, and again in backward
    calls = load.accumulation * shape.layers * (6 if recompute else 4)
    collectives = traffic.collectives + calls
    return replace(traffic, exchanged=load.accumulation * exchanged, collectives=collectives)
