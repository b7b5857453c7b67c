"""A step's time as planned and as measured: ten run files on this CPU, in one process and in two.

    python -m phi3_dist.bench.timing [--rounds 3] [--steps 4] [--only TEXT] [--json FILE] [--markdown FILE]

The rates that the plan counts with are measured here as `phi3-dist doctor --bandwidth` names them: in each round before
and after each run file, by as many processes, since a machine that others share gives other rates a minute later.
A rate is the mean of as long a span as a step takes, since what others do to the machine is in both. Medians count, and
the spread says how quiet it was. The clock of a busy machine measures the others too: then `processor` compares the
time of the processes alone. Ends with 1 where a run's step is off by more than `--worst` (15 %).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from phi3_dist.bench.page_table import put_table
from phi3_dist.bench.timing_runs import RUNS, SHAPES, SUPERVISED, TimedRun, launch_of, time_steps, timed_machine
from phi3_dist.planning.cpu_time import CpuRates, CpuStep, cpu_step_time
from phi3_dist.planning.memory import saved_bytes, stored_bytes
from phi3_dist.planning.timing import StepTime
from phi3_dist.planning.traffic import step_traffic
from phi3_dist.planning.workload import adapter_counts, workload_of

__all__ = ["main", "markdown", "measure_rates", "predicted", "step_of"]

BUSY_LOAD = 1.5
"""Processes that are ready to run beside this one: more, and the clock measures them too."""


def step_of(run: TimedRun) -> CpuStep:
    """What decides the time of the run's step; its packs hold documents of a half, a quarter and two eighths."""
    cfg, shape = run.run(), SHAPES[run.shape]
    load = workload_of(cfg, timed_machine("2.13.0"), launch_of(run), precision="fp32", kernels="torch")
    trainable, _ = adapter_counts(cfg, shape)
    tokens = run.micro_batch * run.length
    return CpuStep(
        tokens=tokens,
        supervised=round(tokens * SUPERVISED),
        squares=run.micro_batch * run.length**2 * (1 / 4 + 1 / 16 + 2 / 64),
        rank=cfg.lora.r,
        trainable=trainable,
        saved_bytes=saved_bytes(shape, trainable, load),
        dropout=cfg.lora.dropout > 0,
        recompute=cfg.model.activation_checkpointing,
        accumulation=run.accumulation,
    )


def predicted(run: TimedRun, rates: CpuRates) -> StepTime:
    """The step's seconds by the plan."""
    cfg, shape, step = run.run(), SHAPES[run.shape], step_of(run)
    load = workload_of(cfg, timed_machine("2.13.0"), launch_of(run), precision="fp32", kernels="torch")
    traffic = step_traffic(
        shape,
        run.strategy,
        run.world,
        base_bytes=stored_bytes(shape, load)[0],
        trainable=step.trainable,
        accumulation=run.accumulation,
        precision="fp32",
        checkpointing=step.recompute,
    )
    return cpu_step_time(shape, step, rates, traffic)


def _seconds(call: Callable[[], Any], times: int) -> tuple[float, float]:
    """Mean seconds of a call on the clock and on this process's processor, after one that warms up."""
    call()
    began, began_cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times, (time.process_time() - began_cpu) / times


def measure_rates(rank: int = 0, port: int = 0, world: int = 1) -> dict[str, float]:
    """This machine's rates for one thread, by the clock and, as `…_processor`, by the processor. Collective."""
    import torch

    torch.set_num_threads(1)
    one, other = torch.randn(1024, 1024), torch.randn(1024, 1024)
    out, source = torch.empty_like(one), torch.ones(2**26)
    target = torch.empty_like(source)
    found: dict[str, float] = {}
    with torch.inference_mode():
        product = _seconds(lambda: torch.mm(one, other, out=out), 40)
        copy = _seconds(lambda: target.copy_(source), 6)
        for name, product_s, copy_s in zip(("", "_processor"), product, copy, strict=True):
            found[f"matrix_fp32_tflops{name}"] = 2 * 1024**3 / product_s / 1e12
            found[f"memory_gbps{name}"] = 2 * source.nbytes / copy_s / 1e9
        if world > 1:
            found |= _network(rank, port, world)
    return found


def _network(rank: int, port: int, world: int) -> dict[str, float]:
    import torch

    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    share = 2**22
    mine, every = torch.ones(share), torch.ones(share * world)
    few, many = torch.ones(1), torch.ones(world)
    gather = _seconds(lambda: torch.distributed.all_gather_into_tensor(every, mine), 8)[0]
    scatter = _seconds(lambda: torch.distributed.reduce_scatter_tensor(mine, every), 8)[0]
    small = _seconds(lambda: torch.distributed.all_gather_into_tensor(many, few), 100)[0]
    torch.distributed.destroy_process_group()
    sent = share * 4 * (world - 1) / 1e9
    return {"network_gbps": min(sent / gather, sent / scatter), "collective_s": small}


def _rates(found: Sequence[Mapping[str, float]], kind: str) -> CpuRates:
    def middle(name: str) -> float:
        return statistics.median(one[name] for one in found)

    rates = CpuRates(middle(f"matrix_fp32_tflops{kind}"), middle(f"memory_gbps{kind}"))
    if "network_gbps" not in found[0]:
        return rates
    return replace(rates, network_gbps=middle("network_gbps"), collective_s=middle("collective_s"))


def _row(run: TimedRun, seen: Mapping[str, list[float]], found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"run": str(run)}
    for name, kind in (("wall", ""), ("processor", "_processor")):
        # the processor's too: gloo's bytes are copied by it
        planned_s = predicted(run, _rates(found, kind)).total_s
        quick, real, slow = statistics.quantiles(seen[f"{name}_s"], n=4)
        row |= {f"{name}_s": real, f"{name}_planned_s": planned_s, f"{name}_error": planned_s / real - 1}
        row[f"{name}_spread"] = (slow - quick) / real
    return {**row, "binds": predicted(run, _rates(found, "")).binds}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of a page."""
    heads = ["run", "planned, s", "measured, s", "error", "spread", "processor, s", "error", "binds"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row["run"], f"{row['wall_planned_s']:.3f}", f"{row['wall_s']:.3f}", f"{row['wall_error']:+.0%}"]
        cells += [
            f"{row['wall_spread']:.0%}",
            f"{row['processor_s']:.3f}",
            f"{row['processor_error']:+.0%}",
            row["binds"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def measure(
    runs: Sequence[TimedRun], rounds: int, steps: int
) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, float]]]]:
    """The rows of the runs, and the rates around each. The libraries are imported once, and processes forked."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    from phi3_dist.bench.cells import forked
    from phi3_dist.bench.memory_cells import free_port, quietly

    torch.set_num_threads(1)
    seen: dict[str, dict[str, list[float]]] = {str(run): {"wall_s": [], "processor_s": []} for run in runs}
    rates: dict[str, list[dict[str, float]]] = {str(run): [] for run in runs}

    def note_rates(run: TimedRun) -> None:
        port = free_port()
        ranks = [partial(quietly, measure_rates, rank, port, run.world) for rank in range(run.world)]
        rates[str(run)] += forked(ranks, run.world)

    for run in (run for _ in range(rounds) for run in runs):
        note_rates(run)
        port = free_port()
        ranks = [partial(quietly, time_steps, run, steps, rank, port) for rank in range(run.world)]
        for name, values in _slowest(list(forked(ranks, run.world))).items():
            seen[str(run)][name] += values
        note_rates(run)
    return [_row(run, seen[str(run)], rates[str(run)]) for run in runs], rates


def _slowest(found: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Each step as the slowest rank saw it. Raises RuntimeError with what a rank died of."""
    for one in found:
        if "wall_s" not in one:
            raise RuntimeError(str(one.get("error", one)))
    return {name: [max(times) for times in zip(*(one[name] for one in found), strict=True)] for name in found[0]}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m phi3_dist.bench.timing", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps of a run in a round")
    parser.add_argument("--only", default="", help="runs whose line holds this text")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    parser.add_argument("--page", type=Path, help="a page whose table is replaced by this one")
    parser.add_argument("--worst", type=float, default=0.15)
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    rows, rates = measure([run for run in RUNS if options.only in str(run)], options.rounds, options.steps)
    sys.stdout.write(markdown(rows))
    for name, found in rates.items():
        sys.stdout.write(f"rates around {name}: {_rates(found, '')}\n")
    busy = load > BUSY_LOAD
    sys.stdout.write(f"load average {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    sys.stdout.write("; others were at work: what counts is the processor's time\n" if busy else "\n")
    kind = "processor" if busy else "wall"
    worst = max((abs(row[f"{kind}_error"]) for row in rows), default=1.0)
    sys.stdout.write(f"{len(rows)} run files; worst error {worst:.0%} of the {kind}'s time\n")
    if options.json:
        options.json.write_text(json.dumps({"runs": rows, "rates": rates, "load": load}, indent=1), encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(markdown(rows), encoding="utf-8")
    if options.page:
        put_table(options.page, "bench-timing", markdown(rows))
    return 0 if worst <= options.worst else 1


if __name__ == "__main__":
    sys.exit(main())
