"""What the folders of finished runs say about the card they ran on, for `phi3-dist plan --learn`.

plan.json has the planned memory, the card, and under `first_step` what the first steps measured; metrics.jsonl has the
peak of tensors and each step's time. A run of an earlier release has no `first_step`: its step is planned again here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phi3_dist.config.load import load_run
from phi3_dist.errors import ConfigError, PlanError, Problem, RunFolderError
from phi3_dist.planning.advice import Cluster, Option, advise
from phi3_dist.planning.fitted_overheads import FinishedRun
from phi3_dist.planning.gpus import find_gpu
from phi3_dist.planning.preview import shape_of_source
from phi3_dist.planning.timing import rates_of_gpu
from phi3_dist.report.plain_values import finite, read_object
from phi3_dist.report.run_files import read_metrics

__all__ = ["finished_run", "finished_runs"]

ENOUGH_STEPS = 3
"""Steps whose time is known, beside the first, which warms up."""


def finished_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """All of one card. Raises PlanError with every folder that says nothing, and where the cards differ."""
    found, problems = list[FinishedRun](), list[Problem]()
    for folder in folders:
        try:
            found.append(finished_run(folder))
        except (PlanError, RunFolderError) as error:
            problems += error.problems
    devices = sorted({run.device for run in found})
    if len(devices) > 1:
        what = f"the runs are of different devices: {', '.join(devices)}"
        problems.append(Problem("plan --learn", what, "name the runs of one of them"))
    if problems:
        raise PlanError(*problems)
    return found


def finished_run(folder: Path) -> FinishedRun:
    """What one run says. Raises PlanError if it is not a run, ran on a CPU, or measured nothing to learn from."""
    plan, fault = read_object(folder / "plan.json")
    if fault or not plan:
        what = f"plan.json {fault}" if fault else "has no plan.json: it is not a run folder, or the run never started"
        raise PlanError(Problem(str(folder), what, "name folders of finished runs, such as runs/debug"))
    if plan.get("device") != "cuda":
        what = f"ran on {plan.get('device') or 'an unknown device'}: a plan has overheads of GPUs alone"
        raise PlanError(Problem(str(folder), what, "name runs that were made on a GPU"))
    hardware = _object(plan, "hardware")
    device = hardware.get("device")
    if not isinstance(device, str) or not device:
        raise PlanError(Problem(str(folder), "plan.json does not name the card", "run it again with this release"))
    first = _object(plan, "first_step")
    rows = [row for row in read_metrics(folder) if row.get("kind") == "train"]
    option = _planned_again(folder, plan, device)
    full = _tokens_of_a_step(plan)
    run = FinishedRun(
        folder=str(folder),
        device=device,
        planned_gib=finite(first.get("planned_gib")) or _planned_gib(plan),
        tensors_gib=finite(first.get("measured_gib")) or _largest(rows, "peak_gib"),
        reserved_gib=finite(first.get("reserved_gib")),
        device_used_gib=finite(first.get("device_used_gib")),
        planned_step_s=option.time.total_s if option is not None and option.time is not None else None,
        step_s=_step_s(rows, full),
    )
    if not (run.reserved_gib and run.tensors_gib) and not (run.step_s and run.planned_step_s):
        what = (
            f"has nothing to learn from: no memory under `first_step` in plan.json, no {ENOUGH_STEPS + 1} steps logged"
        )
        raise PlanError(Problem(str(folder), what, "name a run of this release that made more steps"))
    return run


def _object(plan: dict[str, Any], key: str) -> dict[str, Any]:
    value = plan.get(key)
    return value if isinstance(value, dict) else {}


def _planned_gib(plan: dict[str, Any]) -> float | None:
    terms = plan.get("memory")
    if not isinstance(terms, list):
        return None
    sizes = [finite(one.get("gib")) for one in terms if isinstance(one, dict) and one.get("place") == "device"]
    return math.fsum(size for size in sizes if size) or None


def _largest(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    return max((size for row in rows if (size := finite(row.get(key)))), default=None)


def _tokens_of_a_step(plan: dict[str, Any]) -> float | None:
    length = finite(_object(_object(plan, "lengths"), "train").get("pack_length"))
    batch = finite(plan.get("global_batch"))
    return length * batch if length and batch else None


def _step_s(rows: Sequence[dict[str, Any]], full: float | None) -> float | None:
    """The median step in full packs: a pack that is not full takes as much less."""
    seconds = []
    for row in rows[1:]:
        step_s, tokens = finite(row.get("step_s")), finite(row.get("tokens"))
        if step_s and tokens:
            seconds.append(step_s * (full / tokens if full else 1.0))
    return statistics.median(seconds) if len(seconds) >= ENOUGH_STEPS else None


def _planned_again(folder: Path, plan: dict[str, Any], device: str) -> Option | None:
    """The run as it is planned from the card's data sheet; None where its run file or its card is not known."""
    world, nodes = finite(plan.get("world_size")), finite(plan.get("nodes"))
    try:
        cfg, gpu = load_run(folder / "config.yaml"), find_gpu(device)
        shape = shape_of_source(cfg)
        if shape is None or not world or not nodes:
            return None
        cluster = Cluster(int(nodes), int(world // nodes), gpu.memory_gib, math.inf, rates_of_gpu(gpu), gpu)
        packages = {"torch": "2.13.0", "deepspeed": "0", "bitsandbytes": "0", "triton": "3"}
        options = advise(cfg, cluster, shape, packages).options
    except (ConfigError, PlanError):
        return None
    quantization = cfg.model.quantization
    return next((o for o in options if (o.strategy, o.quantization) == (plan.get("strategy"), quantization)), None)
