"""The proof at the first step: what should learn learns, what should not does not, and the ranks are the planned ones.

Shown for each trained tensor, in the first step whose gradient norm is a number: a gradient reached it in backward, it
is not zero everywhere, and the update moved the tensor. Two things can't be shown there. Where a LoRA starts with one
factor at zero (B; of an embedding A) the gradient of the other factor is zero by the product rule, so it first moves in
the second step. A taught row that no pack of the step holds has a gradient of zero. Both are counted and said.

The steps after it run on the engine itself: nothing is left of the proof.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import PlanError, Problem
from phi3_dist.planning.plan import RunPlan
from phi3_dist.training.context import RunContext
from phi3_dist.training.engines.backward_and_update import DeepSpeedEngine, Engine
from phi3_dist.training.engines.optimizer import plain_name, trained
from phi3_dist.training.monitor.against_plan import AgainstPlan
from phi3_dist.training.runtime import Runtime

__all__ = ["FirstStepProof", "Seen", "WatchedEngine", "faults", "meant_to_train", "shard_faults"]

REPORT = "report it with environment.json: a library did something else than it was asked to"
SHOWN = 5
_PARTNERS = (
    (".lora_A.", ".lora_B."),
    (".lora_B.", ".lora_A."),
    (".lora_embedding_A.", ".lora_embedding_B."),
    (".lora_embedding_B.", ".lora_embedding_A."),
)


def meant_to_train(name: str, cfg: RunConfig) -> bool | None:
    """Whether the run file lets the parameter of this name train; None for a bias, which `lora.bias` may choose."""
    if ".lora_A." in name:
        return not cfg.lora.freeze_a
    if ".lora_" in name or ".modules_to_save." in name or "trainable_tokens_delta" in name:
        return True
    return None if name.endswith(".bias") and cfg.lora.bias != "none" else False


def _local(tensor: Tensor) -> Tensor:
    whole: Any = tensor.detach()
    local: Tensor = whole.to_local() if hasattr(whole, "to_local") else whole
    return local


def _held(param: Any) -> Tensor | None:
    """This rank's part of what the optimizer updates, in float32; None where it has no part of this tensor."""
    if hasattr(param, "ds_id"):
        from deepspeed.utils import safe_get_local_fp32_param

        part: Tensor | None = safe_get_local_fp32_param(param)
        return part
    if hasattr(param, "_hp_mapping"):
        fragment: Tensor | None = None if param._hp_mapping is None else param._hp_mapping.hp_fragment.detach()
        return fragment
    return _local(param)


def _largest(tensor: Tensor | None) -> Tensor:
    """The largest absolute value, nan where there is one; 0 of nothing."""
    if tensor is None or not tensor.numel():
        return torch.zeros(())
    largest: Tensor = torch.linalg.vector_norm(tensor, math.inf)
    return largest.float()


def _bits(tensor: Tensor | None) -> Tensor:
    """A number that changes with any bit of the tensor, without a copy of it."""
    if tensor is None or not tensor.numel():
        return torch.zeros((), dtype=torch.int64)
    return tensor.contiguous().view(torch.int32).sum(dtype=torch.int64)


@dataclass
class Seen:
    """What one rank saw of its trained tensors, by name. `lr_ratio` is that of the tensor's group."""

    lr: float
    micro_batches: int
    frozen_with_gradient: tuple[str, ...]
    reached: dict[str, bool] = field(default_factory=dict)
    gradient: dict[str, float] = field(default_factory=dict)
    weight: dict[str, float] = field(default_factory=dict)
    moved: dict[str, bool] = field(default_factory=dict)


class WatchedEngine:
    """An engine for one step that looks at every trained tensor's gradient, and at the tensor before and after."""

    def __init__(self, engine: Engine) -> None:
        self.model, self.optimizer, self._engine = engine.model, engine.optimizer, engine
        self.norm: Tensor | None = None
        self._trained = dict(trained(engine.model))
        self._micro_batches, self._lr = 0, 0.0
        self._gradient: dict[str, Tensor] = {}
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        self._frozen: tuple[str, ...] = ()
        self._handles: list[Any] = []
        if isinstance(engine, DeepSpeedEngine):  # which takes a gradient away as soon as it is there
            for name, param in self._trained.items():
                hooked: Any = param
                self._handles.append(hooked.register_hook(partial(self._saw, name)))

    def _saw(self, name: str, gradient: Tensor) -> None:
        found, known = _largest(_local(gradient)), self._gradient.get(name)
        self._gradient[name] = found if known is None else torch.maximum(known, found)

    def start_micro_batch(self, *, last: bool) -> None:
        self._micro_batches += 1
        self._engine.start_micro_batch(last=last)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def update(self, lr: float) -> Tensor:
        self._lr = lr
        # once more: FSDP2 exchanges its gathered parameters, whose memory it frees, for its shards after backward
        self._trained = dict(trained(self.model))
        if not self._handles:
            for name, param in self._trained.items():
                if param.grad is not None:
                    self._saw(name, param.grad)
        self._frozen = tuple(
            plain_name(name) for name, p in self.model.named_parameters() if not p.requires_grad and p.grad is not None
        )
        held = {name: _held(param) for name, param in self._trained.items()}
        self._before = {name: (_bits(part), _largest(part)) for name, part in held.items()}
        del held
        self.norm = self._engine.update(lr)
        return self.norm

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()

    def seen(self) -> Seen:
        """What was seen, read to the host at once."""
        names = list(self._trained)
        after = [_bits(_held(self._trained[name])) for name in names]
        seen = Seen(self._lr, self._micro_batches, self._frozen)
        zero = torch.zeros(())
        gradients = torch.stack([self._gradient.get(name, zero).cpu() for name in names]).tolist()
        weights = torch.stack([self._before[name][1].cpu() for name in names]).tolist()
        for name, gradient, weight, bits in zip(names, gradients, weights, after, strict=True):
            seen.reached[name] = name in self._gradient
            seen.gradient[name], seen.weight[name] = gradient, weight
            seen.moved[name] = bool(bits != self._before[name][0])
        return seen


def shard_faults(engine: Engine, plan: RunPlan) -> Iterator[Problem]:
    """Where the engine has another world size, ZeRO stage or share of a tensor on each rank than planned."""
    model: Any = engine.model
    fix = "compare the Accelerate config with plan.json"
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    found = {"world size": (plan.world_size, world)}
    zero = isinstance(engine, DeepSpeedEngine)
    if zero:
        found["ranks that share ZeRO's states"] = (plan.world_size, int(model.dp_world_size))
        found["ZeRO stage"] = (int(plan.strategy[4]), int(model.zero_optimization_stage()))
        found["accumulation"] = (plan.accumulation, int(model.gradient_accumulation_steps()))
    for what, (planned, real) in found.items():
        if planned != real:
            yield Problem(what, f"{planned} was planned, and the engine has {real}", fix)
    wrong = [(plain_name(name), why) for name, param in model.named_parameters() if (why := _shard_fault(param, plan))]
    more = f" ({len(wrong)} tensors like it)" if len(wrong) > 1 else ""
    yield from (Problem(f"shard of {name}", why + more, REPORT) for name, why in wrong[:1])


def _shard_fault(param: Any, plan: RunPlan) -> str:
    """What is wrong with how this rank holds the tensor; empty where nothing is."""
    if plan.strategy.startswith("zero3"):
        if not hasattr(param, "ds_id"):
            return "is whole on each rank, and ZeRO-3 was to share it"
        share = -(-int(param.ds_numel) // plan.world_size)
        mine = int(param.ds_tensor.numel())
        return "" if mine == share else f"has {mine:,} values on this rank, and {share:,} were planned"
    mesh = getattr(param, "device_mesh", None)
    if plan.strategy.startswith("fsdp2"):
        if mesh is None:
            return "is whole on each rank, and FSDP2 was to share it"
        ranks = int(mesh.size())
        return "" if ranks == plan.world_size else f"is shared by {ranks} ranks, and {plan.world_size} were planned"
    shared = mesh is not None or hasattr(param, "ds_id")
    return f"is shared among ranks, and {plan.strategy} keeps it whole on each" if shared else ""


def _training_faults(model: nn.Module, cfg: RunConfig) -> Iterator[Problem]:
    wrong = []
    for name, param in model.named_parameters():
        meant = meant_to_train(name, cfg)
        if meant is not None and meant != param.requires_grad:
            why = "is frozen, and should train" if meant else "trains, and the run file freezes it"
            wrong.append((plain_name(name), why))
    more = f" ({len(wrong)} tensors like it)" if len(wrong) > 1 else ""
    yield from (Problem(name, what + more, REPORT) for name, what in wrong[:SHOWN])


def _partner(name: str) -> str:
    return next((name.replace(one, other) for one, other in _PARTNERS if one in name), "")


def _can_show(gradient: float, weight: float, lr: float, clip: float, eps: float) -> bool:
    """Whether Adam's first update, about `lr` where the gradient outweighs `eps`, changes a float32 of this size."""
    return gradient * clip >= eps and lr / 4 >= weight * 2.0**-23


def faults(
    ranks: Sequence[Seen], cfg: RunConfig, norm: float, *, accumulation: int | None, scale: float
) -> tuple[list[Problem], dict[str, int]]:
    """Problems with tensors or the step, from what every rank saw; and how many tensors of each kind there are.

    `scale`: what gradients were multiplied by against the step's own, at most.
    """
    clip = min(1.0, cfg.optim.max_grad_norm / norm) if cfg.optim.max_grad_norm and norm else 1.0
    problems: list[Problem] = []
    counts = {"trained": len(ranks[0].reached), "moved": 0, "waiting": 0, "not in this step": 0, "too small": 0}
    weight = {name: max(one.weight[name] for one in ranks) for name in ranks[0].reached}
    missing, still = [], []
    for name in ranks[0].reached:
        gradient = max(one.gradient[name] for one in ranks)
        rate = ranks[0].lr * (cfg.lora.plus_ratio if ".lora_B." in name else 1.0)
        if not all(one.reached[name] for one in ranks):
            where = [number for number, one in enumerate(ranks) if not one.reached[name]]
            missing.append((name, f"no gradient reached it on rank {', '.join(map(str, where[:8]))}"))
        elif any(one.moved[name] for one in ranks):
            counts["moved"] += 1
        elif gradient == 0 and weight.get(_partner(name)) == 0:
            counts["waiting"] += 1
        elif gradient == 0 and "trainable_tokens_delta" in name:
            counts["not in this step"] += 1
        elif gradient == 0:
            missing.append((name, "its gradient is zero everywhere: the loss does not depend on it"))
        elif not _can_show(gradient / scale, weight[name], rate, clip, cfg.optim.eps):
            counts["too small"] += 1
        else:
            still.append(
                (name, f"has a gradient of up to {gradient / scale:.2e}, and the first update left it as it was")
            )
    leave_out = f"take its module out of lora.targets, or {REPORT}"
    for found, fix in ((missing, leave_out), (still, REPORT)):
        more = f" ({len(found)} tensors like it)" if len(found) > 1 else ""
        problems += [Problem(name, what + more, fix) for name, what in found[:SHOWN]]
    frozen = sorted({name for one in ranks for name in one.frozen_with_gradient})
    problems += [Problem(name, "is frozen, and has a gradient", REPORT) for name in frozen[:SHOWN]]
    for number, one in enumerate(ranks):
        if accumulation is not None and one.micro_batches != accumulation:
            what = f"{accumulation} micro batches a step were planned, and rank {number} made {one.micro_batches}"
            problems.append(Problem("accumulation", what, REPORT))
    return problems, counts


def _line(counts: Mapping[str, int], plan: RunPlan) -> str:
    ranks = f"{plan.world_size} ranks" if plan.world_size > 1 else "1 rank"
    reasons = {
        "waiting": "wait for the second step, since their partner starts at zero",
        "not in this step": "are rows of tokens that no pack of this step holds",
        "too small": "changed by less than float32 can show at this learning rate",
    }
    rest = "".join(f", {counts[key]} {why}" for key, why in reasons.items() if counts[key])
    return (
        f"first step as planned: {ranks} of {plan.strategy}; a gradient reached all {counts['trained']} trained "
        f"tensors, {counts['moved']} moved{rest}; no frozen tensor has one"
    )


class FirstStepProof:
    """Hands out the engine for each step; in the first that can be judged, one that watches."""

    def __init__(self, ctx: RunContext, *, alone: bool = True) -> None:
        """`alone`: the run has base and ranks for itself, as no candidate of a sweep has; only then are shards and
        the number of micro batches its own, and memory and time to be held against its plan."""
        self._ctx, self._alone, self._proven = ctx, alone, False
        self._against = AgainstPlan(ctx) if alone else None

    @contextmanager
    def watching(self, step: int = 0) -> Iterator[Engine]:
        """The engine of step `step`. Raises PlanError after it on every rank, where the proof fails. Collective."""
        engine = self._ctx.engine
        if self._against is not None:
            self._against.next_step(step)
        if self._proven:
            yield engine
            return
        watched = WatchedEngine(engine)
        try:
            yield watched
        finally:
            watched.release()
        norm = float("nan") if watched.norm is None else float(watched.norm)
        if math.isfinite(norm):  # else monitor/bad_steps.py skips the step, and the next one is watched
            self._prove(watched.seen(), norm)
            self._proven = True

    def update(self, lr: float) -> Tensor:
        """The engine's update, watched where it is due. Collective."""
        with self.watching() as engine:
            return engine.update(lr)

    def _prove(self, seen: Seen, norm: float) -> None:
        ctx, plan = self._ctx, self._ctx.runtime.plan
        mine = [*_training_faults(ctx.engine.model, ctx.cfg)]
        if self._alone:
            mine += shard_faults(ctx.engine, plan)
        peaks = self._against.peaks() if self._against is not None else {}
        gathered = _from_all(ctx.runtime, (seen, mine, peaks))
        problems = [problem for _, found, _ in gathered for problem in found]
        of_tensors, counts = faults(
            [one for one, _, _ in gathered],
            ctx.cfg,
            norm,
            accumulation=plan.accumulation if self._alone else None,
            scale=float(getattr(ctx.engine, "scale", 1.0)),
        )
        if problems or of_tensors:
            raise PlanError(*dict.fromkeys([*problems, *of_tensors]))
        ctx.metrics.say(_line(counts, plan))
        if self._against is not None:
            self._against.record([peaks for _, _, peaks in gathered], counts)


def _from_all(runtime: Runtime, mine: Any) -> list[Any]:
    """Every rank's value, in the order of ranks. Collective."""
    if runtime.world == 1:
        return [mine]
    gathered: list[Any] = [None] * runtime.world
    torch.distributed.all_gather_object(gathered, mine)
    return gathered
