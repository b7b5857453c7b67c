"""What `phi3-dist plan` was asked for GPUs, and its answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import PlanError, Problem
from phi3_dist.planning.advice import Advice, Cluster, Option, advise
from phi3_dist.planning.advice_table import advice_table, find_option, why_table
from phi3_dist.planning.auto_fields import RowLengths
from phi3_dist.planning.fitted_overheads import Overheads
from phi3_dist.planning.gpus import Gpu, find_gpu
from phi3_dist.planning.memory import total_gib
from phi3_dist.planning.preview import shape_of_source
from phi3_dist.planning.rates_of_machine import with_measured
from phi3_dist.planning.timing import rates_of_gpu
from phi3_dist.planning.write_run import write_run

__all__ = ["PlanRequest", "answer", "cluster_of"]

ASSUMED = "h100-80gb"


@dataclass(frozen=True)
class PlanRequest:
    """The options of the verb; None where one was not given. `own_cards`: this machine's, as (name, GiB)."""

    run_file: Path
    overrides: tuple[str, ...] = ()
    nodes: int | None = None
    gpus_per_node: int | None = None
    gpu: str | None = None
    memory_gib: float | None = None
    host_memory_gib: float | None = None
    network_gbit: float | None = None
    price: float | None = None
    tokens: int | None = None
    why: str | None = None
    write: Path | None = None
    as_json: bool = False
    own_cards: tuple[tuple[str, float], ...] = ()
    rows: RowLengths | None = None
    rates: Mapping[str, Any] = field(default_factory=dict)
    """What `phi3-dist doctor --bandwidth` measured on such a card; empty where nothing was."""
    overheads: Overheads | None = None
    """What `phi3-dist plan --learn` kept of such a card."""


def cluster_of(request: PlanRequest) -> tuple[Cluster, str]:
    """The GPUs that are meant, and in words where they come from. Raises PlanError for a card that is not known."""
    own = request.own_cards
    per_node = request.gpus_per_node or (len(own) if own and request.gpu is None else 1)
    if request.gpu is not None:
        gpu, memory, where = find_gpu(request.gpu), None, "as named"
    elif own:
        gpu, memory, where = _own(own), own[0][1], "this machine's"
    else:
        gpu, memory, where = find_gpu(ASSUMED), None, "assumed, since there is none here: --gpu names another"
    memory = request.memory_gib or memory or gpu.memory_gib
    precision = "bf16" if gpu.fast_bf16 else "fp32"
    cluster = Cluster(
        nodes=request.nodes or 1,
        gpus_per_node=per_node,
        memory_gib=memory,
        host_memory_gib=request.host_memory_gib or float("inf"),
        rates=with_measured(rates_of_gpu(gpu, network_gbit=request.network_gbit), request.rates, precision=precision),
        gpu=gpu,
        price=request.price,
        tokens=request.tokens,
    )
    cluster = _with_overheads(cluster, request.overheads)
    words = f"{cluster.nodes} × {per_node} {gpu.name} of {memory:.0f} GiB ({where}); {cluster.rates.source}"
    if request.overheads is not None:
        words += f"; {request.overheads.words}"
    return cluster, words


def _with_overheads(cluster: Cluster, overheads: Overheads | None) -> Cluster:
    """What was learned of a card of this name; the memory that `--memory-gib` says is still the one that is filled."""
    if overheads is None:
        return cluster
    return replace(cluster, overheads=overheads, rates=overheads.slower(cluster.rates))


def _own(cards: tuple[tuple[str, float], ...]) -> Gpu:
    """The data sheet of this machine's card; of a card without one, that of the assumed card with its memory."""
    try:
        return find_gpu(cards[0][0])
    except PlanError:
        return replace(find_gpu(ASSUMED), name=cards[0][0], source=f"speed taken from {ASSUMED}'s data sheet")


def answer(
    cfg: RunConfig,
    request: PlanRequest,
    packages: Mapping[str, str],
    measured: Mapping[str, Any],
    print_line: Callable[[str], Any],
) -> None:
    """Print the table, the terms or the JSON, and write the files. Raises PlanError where nothing fits."""
    shape = shape_of_source(cfg)
    if shape is None:
        what = f"{cfg.model.source} is neither a folder here nor a hub id whose shape is known"
        raise PlanError(Problem("model.source", what, "give a folder with config.json, or a Phi-3 of Microsoft's"))
    cluster, words = cluster_of(request)
    advice = advise(cfg, replace(cluster, measured=measured), shape, packages, rows=request.rows)
    if request.as_json:
        print_line(json.dumps({"cluster": words, **advice.to_dict()}, indent=2))
    else:
        _print(advice, cluster, words, request)
    if request.write is not None and advice.best is not None:
        chosen = advice.best if request.why is None else find_option(advice, request.why)
        for file in write_run(request.write, chosen, cluster, request.run_file, request.overrides):
            print_line(f"wrote {file}")
    asked_for = cfg.model.quantization
    if not any(one.state == "fits" and one.quantization == asked_for for one in advice.options):
        raise PlanError(_nothing_fits(advice, cluster, asked_for))


def _print(advice: Advice, cluster: Cluster, words: str, request: PlanRequest) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width
        console = Console(highlight=False, width=220)
    console.print(words)
    if request.why is not None:
        console.print(why_table(find_option(advice, request.why), cluster))
        return
    console.print(advice_table(advice, cluster))
    if advice.best is None:
        return
    console.print(f"recommended: {advice.reason}")
    for reason in advice.best.reasons:
        console.print(f"auto: {reason.name}={reason.value}: {reason.why}")
    for note in advice.notes:
        console.print(f"note: {note}")
    if advice.best.run_s is None:
        console.print("time of the run: --tokens N says how many tokens the rows have, or set train.max_steps")
    console.print(
        "step times are estimates; memory assumes that every token is supervised; --why STRATEGY lists its terms"
    )


def _nothing_fits(advice: Advice, cluster: Cluster, quantization: str) -> Problem:
    """Nothing fits as the run file has it; another quantisation may, and is recommended above."""
    large: list[Option] = [
        one for one in advice.options if one.state == "too large" and one.quantization == quantization
    ]
    if not large:
        return Problem("plan", f"nothing runs there: {advice.options[0].why}")
    least = min(large, key=lambda one: one.peak_gib)
    what = (
        f"with model.quantization={quantization} every strategy needs more than {cluster.memory_gib:.1f} GiB a device"
    )
    what += (
        ", of which a tenth is kept free" if cluster.overheads is None else f" has room for ({cluster.overheads.words})"
    )
    what += f"; the smallest, {least.name}, {total_gib(least.terms):.1f} GiB"
    fix = next((one.why for one in large if one.why.startswith("fits with")), least.why)
    return Problem("memory", what, fix)
