"""Every way to run a run file on given GPUs: whether it fits, what it moves, how long a step takes; the best one first.

No device is looked at and torch is not imported: 1,024 GPUs are planned on a login node in well under a second.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import PlanError
from phi3_dist.family.variants import Family, Shape
from phi3_dist.planning.auto_fields import RowLengths, auto_fields, get_field, settle
from phi3_dist.planning.facts import Choice, LaunchFacts, MachineFacts
from phi3_dist.planning.fitted_overheads import RESERVE, Overheads
from phi3_dist.planning.gpus import Gpu
from phi3_dist.planning.launch_configs import deepspeed_json
from phi3_dist.planning.memory import GIB, Term, fits, layer_gib, saved_bytes, stored_bytes, total_gib
from phi3_dist.planning.memory_savers import smaller
from phi3_dist.planning.plan import RunPlan, make_plan
from phi3_dist.planning.sequence_parallel import with_exchanges
from phi3_dist.planning.support import QUANTIZATIONS, STRATEGIES
from phi3_dist.planning.timing import Rates, StepTime, step_flops, step_time
from phi3_dist.planning.traffic import Traffic, step_traffic
from phi3_dist.planning.workload import adapter_counts, workload_of

__all__ = ["Advice", "Cluster", "Option", "advise", "launch_on", "machine_of", "time_of_plan"]

PROCESS_GIB = 3.0
"""Host memory of a process with torch and its libraries: about that on Linux, weights aside."""
_SIMPLEST = ("single", "ddp", "zero1", "zero2", "fsdp2", "zero3", "zero2_offload", "fsdp2_offload", "zero3_offload")
ENDLESS_GIB = 2.0**20
_NEAR = 0.02
"""Within this share of the fastest, the simplest strategy is taken."""


@dataclass(frozen=True)
class Cluster:
    """What the run may have. `price` is one GPU's for an hour, in the user's money; `tokens` those of the whole run."""

    nodes: int
    gpus_per_node: int
    memory_gib: float
    host_memory_gib: float
    rates: Rates
    gpu: Gpu | None = None
    price: float | None = None
    tokens: int | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)
    overheads: Overheads | None = None
    """What finished runs on such a card said (`phi3-dist plan --learn`)."""

    def holds(self, terms: Sequence[Term]) -> bool:
        """Whether a rank's tensors fit on its card, beside what the card wants for itself."""
        if self.overheads is None:
            return fits(terms, self.memory_gib, RESERVE)
        return self.overheads.leaves_room(terms, self.memory_gib)

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Option:
    """One strategy and quantisation. Memory in GiB of the worst rank, `host_gib` of a node; traffic of a step."""

    strategy: str
    quantization: str
    state: str
    """`fits`, `too large` or `refused`."""
    why: str
    peak_gib: float = 0.0
    host_gib: float = 0.0
    traffic: Traffic | None = None
    time: StepTime | None = None
    tokens_s: float = 0.0
    run_s: float | None = None
    cost: float | None = None
    terms: tuple[Term, ...] = ()
    kept_layers: int = 0
    settled: Mapping[str, Any] = field(default_factory=dict)
    """What `auto` became here, by dotted path; `reasons` says why."""
    reasons: tuple[Choice, ...] = ()

    @property
    def name(self) -> str:
        return self.strategy if self.quantization == "none" else f"{self.strategy} {self.quantization}"

    def to_dict(self) -> dict[str, Any]:
        out = {key: value for key, value in asdict(self).items() if key not in {"traffic", "time"}}
        out["traffic"] = None if self.traffic is None else asdict(self.traffic)
        out["time"] = None if self.time is None else self.time.to_dict()
        return out


@dataclass(frozen=True)
class Advice:
    """Options, the recommended first and those that do not run last; and why the first is recommended."""

    options: tuple[Option, ...]
    reason: str
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Option | None:
        return self.options[0] if self.options and self.options[0].state == "fits" else None

    def to_dict(self) -> dict[str, Any]:
        return {"reason": self.reason, "notes": list(self.notes), "options": [one.to_dict() for one in self.options]}


def machine_of(cluster: Cluster, packages: Mapping[str, str], *, limit: bool = True) -> MachineFacts:
    """The cluster's node as the plan takes it; without `limit` nothing is too large, and the caller looks."""
    gpu = cluster.gpu
    fast = gpu is None or gpu.fast_bf16
    name = gpu.name if gpu else "the card"
    why = f"{name} is of compute capability {gpu.capability[0]}.{gpu.capability[1]}" if gpu else "assumed of the card"
    return MachineFacts(
        device="cuda",
        device_name=name,
        devices_per_node=cluster.gpus_per_node,
        device_memory_gib=cluster.memory_gib if limit else ENDLESS_GIB,
        host_memory_gib=cluster.host_memory_gib if limit else ENDLESS_GIB,
        cpu_count=16,
        fast_bf16=fast,
        fast_bf16_reason=why,
        packages=packages,
        capability=gpu.capability if gpu else None,
        measured=cluster.measured,
    )


def launch_on(cluster: Cluster, strategy: str) -> LaunchFacts:
    """The launch of a strategy with the shipped DeepSpeed file."""
    zero = json.loads(deepspeed_json(strategy)) if strategy.startswith("zero") else {}
    return LaunchFacts(cluster.world, cluster.nodes, strategy, zero_settings=zero)


def _ways(cluster: Cluster) -> Iterator[tuple[str, str]]:
    for strategy, quantization in product(STRATEGIES, QUANTIZATIONS):
        if (strategy == "single") != (cluster.world == 1) and not strategy.endswith("_offload"):
            continue
        yield strategy, quantization


def advise(
    cfg: RunConfig,
    cluster: Cluster,
    family_or_shape: Family | Shape | Mapping[str, Any],
    packages: Mapping[str, str],
    *,
    rows: RowLengths | None = None,
) -> Advice:
    """Every option. `rows`: what is known of them, for `data.pack_length: auto`.

    Raises PlanError where the run file can't be run on so many ranks, whatever the strategy.
    """
    machine = machine_of(cluster, packages, limit=False)
    options = []
    refusals: list[PlanError] = []
    for strategy, quantization in _ways(cluster):
        run = cfg.model_copy(update={"model": cfg.model.model_copy(update={"quantization": quantization})})
        launch = launch_on(cluster, strategy)
        try:
            here = machine_of(cluster, packages)
            settled, reasons = settle(run, here, launch, family_or_shape, rows=rows)
            plan = make_plan(settled, machine, launch, family_or_shape=family_or_shape)
        except PlanError as error:
            refusals.append(error)
            options.append(Option(strategy, quantization, "refused", error.problems[0].what))
            continue
        option = _option(settled, cluster, launch, plan, _shape(family_or_shape))
        values = {path: get_field(settled, path) for path in auto_fields(cfg)}
        options.append(replace(option, settled=values, reasons=reasons))
    if len(refusals) == len(options):
        raise refusals[0]
    return _sorted(options, cfg)


def _shape(given: Family | Shape | Mapping[str, Any]) -> Shape:
    if isinstance(given, Shape):
        return given
    return given.shape if isinstance(given, Family) else Shape.of(given)


def _option(cfg: RunConfig, cluster: Cluster, launch: LaunchFacts, plan: RunPlan, shape: Shape) -> Option:
    terms = plan.memory or ()
    peak, per_node = total_gib(terms), cluster.gpus_per_node
    host = per_node * (total_gib(terms, "host") + PROCESS_GIB)
    trainable, _ = adapter_counts(cfg, shape)
    machine = machine_of(cluster, {}, limit=False)
    load = workload_of(cfg, machine, launch, precision=plan.precision, kernels=plan.kernels)
    traffic = step_traffic(
        shape,
        launch.strategy,
        launch.world_size,
        base_bytes=stored_bytes(shape, load)[0],
        trainable=trainable,
        accumulation=plan.accumulation,
        precision=plan.precision,
        checkpointing=load.activation_checkpointing,
    )
    traffic = with_exchanges(traffic, shape, load)
    time = _time(cfg, cluster, plan, shape, traffic)
    tokens_s = cfg.train.global_batch * cfg.data.pack_length / time.total_s
    run_s = _run_s(cfg, cluster, time.total_s)
    cost = None if run_s is None or cluster.price is None else run_s / 3600 * cluster.world * cluster.price
    state, why = "fits", ""
    if not cluster.holds(terms):
        state, why = "too large", _change(cfg, cluster, launch, shape)
    elif host > cluster.host_memory_gib:
        state, why = "too large", f"a node's host has {cluster.host_memory_gib:.0f} GiB; without offload, or more nodes"
    return Option(
        launch.strategy,
        cfg.model.quantization,
        state,
        why,
        peak,
        host,
        traffic,
        time,
        tokens_s,
        run_s,
        cost,
        terms,
        plan.kept_layers,
    )


def _time(cfg: RunConfig, cluster: Cluster, plan: RunPlan, shape: Shape, traffic: Traffic) -> StepTime:
    launch = launch_on(cluster, plan.strategy)
    machine = machine_of(cluster, {}, limit=False)
    load = workload_of(cfg, machine, launch, precision=plan.precision, kernels=plan.kernels)
    trainable, _ = adapter_counts(cfg, shape)
    tokens = load.micro_batch * load.pack_length // load.sequence_parallel
    again = 2 if plan.kept_layers < shape.layers else 1
    dense = layer_gib(shape, load.precision) * shape.layers * GIB * 1.25 * again if load.quantization == "nf4" else 0.0
    by = "library" if not load.fused else "triton" if load.kernels == "triton" else "torch"
    flops = step_flops(
        shape,
        trainable,
        tokens=tokens,
        length=load.pack_length,
        supervised=1.0,
        recompute=load.activation_checkpointing,
    )
    return step_time(
        shape,
        cluster.rates,
        traffic,
        flops=flops,
        saved_bytes=saved_bytes(shape, trainable, replace(load, activation_checkpointing=False)),
        accumulation=plan.accumulation,
        by=by,
        recompute=load.activation_checkpointing,
        dequantized_bytes=dense,
        nodes=cluster.nodes,
        on_gpu=True,
        shared_inside=cluster.gpus_per_node % load.sequence_parallel == 0,
    )


def _run_s(cfg: RunConfig, cluster: Cluster, step_s: float) -> float | None:
    if cfg.train.max_steps is not None:
        return cfg.train.max_steps * step_s
    if cluster.tokens is None:
        return None
    steps = cluster.tokens * (cfg.train.epochs or 1.0) / (cfg.train.global_batch * cfg.data.pack_length)
    return max(1.0, steps) * step_s


def _change(cfg: RunConfig, cluster: Cluster, launch: LaunchFacts, shape: Shape) -> str:
    """The smallest change that makes it fit, in words."""
    machine = machine_of(cluster, {}, limit=False)
    machine = replace(machine, packages={"deepspeed": "0", "bitsandbytes": "0"})
    for name, changed, other in smaller(cfg, launch):
        try:
            plan = make_plan(changed, machine, other, family_or_shape=shape)
        except PlanError:
            continue
        if cluster.holds(plan.memory or ()):
            return f"fits with {name}"
    return "nothing smaller fits: more ranks, or a card with more memory"


def _sorted(options: list[Option], cfg: RunConfig) -> Advice:
    able = [one for one in options if one.state == "fits"]
    rest = sorted(
        (one for one in options if one.state != "fits"), key=lambda one: (one.state == "refused", one.peak_gib)
    )
    if not able:
        return Advice(tuple(rest), "nothing fits as the run file says")
    most = max(one.tokens_s for one in able)
    near = [one for one in able if one.tokens_s >= most * (1 - _NEAR)]
    asked = cfg.model.quantization
    best = min(
        near, key=lambda one: (one.quantization != asked, one.quantization != "none", _SIMPLEST.index(one.strategy))
    )
    others = sorted((one for one in able if one is not best), key=lambda one: -one.tokens_s)
    return Advice((best, *others, *rest), _reason(best, able, most), _notes(able, best))


def _reason(best: Option, able: list[Option], most: float) -> str:
    fastest = (
        "the fastest that fits" if best.tokens_s >= most else f"within {_NEAR:.0%} of the fastest, and the simplest"
    )
    words = f"{best.name}: {fastest}, {best.peak_gib:.1f} GiB at its peak"
    moved = best.traffic.network / GIB if best.traffic else 0.0
    other = max(able, key=lambda one: one.traffic.network if one.traffic else 0.0)
    if other.traffic and other.traffic.network / GIB > 2 * moved and other.strategy != best.strategy:
        words += f", and moves {moved:.2f} GiB a step where {other.name} moves {other.traffic.network / GIB:.1f}"
    return words


def _notes(able: list[Option], best: Option) -> tuple[str, ...]:
    notes = []
    plain = {one.strategy: one for one in able if one.quantization == "none"}
    for one in able:
        full = plain.get(one.strategy)
        if one.quantization == "none" or full is None or one.peak_gib < 1.02 * full.peak_gib:
            continue
        if one.settled != full.settled:  # more packs at a time, in memory that the weights left free
            continue
        if one.quantization == "int8":
            why = "PEFT's LoRA beside LLM.int8() keeps each linear's input once more, with its dropout"
        else:
            why = f"{one.kept_layers} layers keep dequantised weights; model.dequantized_layers=0 keeps none"
        notes.append(f"{one.name} takes {one.peak_gib:.1f} GiB, more than {full.name} with {full.peak_gib:.1f}: {why}")
    if best.time is not None and best.time.binds == "launches":
        notes.append(
            "the host bounds the step: longer packs or a larger micro_batch give the card more to do at a time"
        )
    return tuple(notes)


def time_of_plan(
    cfg: RunConfig,
    cluster: Cluster,
    launch: LaunchFacts,
    plan: RunPlan,
    family_or_shape: Family | Shape | Mapping[str, Any],
) -> StepTime:
    """How long a step of this plan takes on such a cluster."""
    time = _option(cfg, cluster, launch, plan, _shape(family_or_shape)).time
    assert time is not None
    return time
