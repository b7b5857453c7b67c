"""A rehearsal: the steps of a run on fake CUDA tensors of its real shapes, on a machine without a GPU.

    python -m phi3_dist.bench.rehearse RUN.yaml --strategy zero3 --world 8 --layers 4
    python -m phi3_dist.bench.rehearse --matrix

The run's own code and libraries take the steps: loading, LoRA, the fused layers, DDP's reducer, FSDP2, DeepSpeed's
engines, the optimizer, a resume. It says where devices mix, where the host waits for the device, and for one rank and
step how many kernels are launched, how many bytes they move, and what lives on the device at the peak. No number is
computed and no time measured. `--matrix` rehearses each cell of `phi3-dist support` on a small model. Ends with 1 where
something would fail, or wait that need not.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_dist.config.load import load_run
from phi3_dist.errors import ConfigError, Phi3DistError, Problem
from phi3_dist.family.variants import TINY_RANDOM, Family, family_of_hub_id
from phi3_dist.machine.print_encoding import print_in_any_encoding
from phi3_dist.planning.auto_fields import auto_fields
from phi3_dist.planning.support import STRATEGIES

__all__ = ["main", "report_json", "report_lines"]

GIB = 2**30


def _config_of_family(family: Family) -> Any:
    """The variant's Phi3Config; LongRoPE's factors, which change no shape, are 1."""
    from phi3_dist.modeling.shape_config import config_of_shape

    shape = family.shape
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if family.rope == "longrope":
        factors = [1.0] * int(shape.head_dim * family.partial_rotary / 2)
        lengths = {"original_max_position_embeddings": family.original_positions, "factor": 32.0}
        rope |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, **lengths}
    return config_of_shape(
        shape,
        max_position_embeddings=family.max_positions,
        original_max_position_embeddings=family.original_positions,
        sliding_window=family.sliding_window,
        rope_parameters={**rope, "partial_rotary_factor": family.partial_rotary},
    )


def config_of_source(source: str) -> Any:
    """The Phi3Config of a hub id that is known, of `tiny-random` or a local folder. Raises ConfigError for others."""
    from phi3_dist.modeling.base import find_base

    family = family_of_hub_id(source)
    if family is not None:
        return _config_of_family(family)
    if source != TINY_RANDOM and not Path(source).is_dir():
        what = f"{source} is neither a folder here nor a hub id whose shape is known"
        raise ConfigError(Problem("model.source", what, "give a folder with config.json, or a Phi-3 of Microsoft's"))
    return find_base(source).config


def report_json(report: Any) -> dict[str, Any]:
    """The report as plain values."""
    tallies = {**report.phases, **report.layer}
    return {
        "strategy": report.plan.strategy,
        "world_size": report.plan.world_size,
        "precision": report.plan.precision,
        "attention": report.plan.attention,
        "kernels": {
            name: {
                "launches": tally.launches,
                "read_bytes": tally.read_bytes,
                "written_bytes": tally.written_bytes,
                "ops": dict(tally.ops.most_common()),
            }
            for name, tally in tallies.items()
        },
        "collectives": dict(report.collectives),
        "waits": [{**vars(wait), "count": count} for wait, count in report.waits.items()],
        "faults": [{**vars(fault), "count": count} for fault, count in report.faults.items()],
        "peak_gib": {device: dict(kinds) for device, kinds in report.peak_gib.items()},
        "held": report.held,
    }


def report_lines(found: Mapping[str, Any]) -> list[str]:
    """The report for a person: kernels by phase, waits, faults and the peak."""
    lines = [f"{found['strategy']}, {found['world_size']} ranks, {found['precision']}, {found['attention']} attention"]
    lines.append(f"{'one rank, one step':<18} {'launches':>9} {'read GiB':>9} {'written':>9}")
    for name, kernels in found["kernels"].items():
        read, written = kernels["read_bytes"] / GIB, kernels["written_bytes"] / GIB
        lines.append(f"{name:<18} {kernels['launches']:>9,} {read:>9.2f} {written:>9.2f}")
    if found["collectives"]:
        lines.append("collectives: " + ", ".join(f"{count} {name}" for name, count in found["collectives"].items()))
    for device, kinds in found["peak_gib"].items():
        parts = sorted(((gib, kind) for kind, gib in kinds.items() if gib >= 0.005), reverse=True)
        total = sum(kinds.values())
        lines.append(f"peak on {device}: {total:.2f} GiB: " + ", ".join(f"{kind} {gib:.2f}" for gib, kind in parts))
    lines.append(found["held"])
    lines += [f"WAITS in {w['phase']}: {w['count']} × {w['what']} at {w['where']}{_why(w)}" for w in found["waits"]]
    lines += [f"FAULT in {f['phase']}: {f['count']} × {f['what']} at {f['where']}" for f in found["faults"]]
    return lines


def _why(wait: Mapping[str, str]) -> str:
    return f" ({wait['by_design']})" if wait.get("by_design") else ""


def _one(options: argparse.Namespace) -> int:
    from phi3_dist.bench.cells import by_design
    from phi3_dist.bench.rehearsal import import_all, rehearse

    cfg = load_run(options.run_file, options.overrides)
    if auto_fields(cfg):
        why = Problem(auto_fields(cfg)[0], "is auto, and a rehearsal has no device to count for", "write a value")
        raise ConfigError(why)
    import_all()
    config = config_of_source(cfg.model.source)
    if options.layers is not None:
        config.num_hidden_layers = options.layers
    world = options.world or (1 if options.strategy == "single" else 8)
    report = rehearse(cfg, config, options.strategy, world=world)
    found = report_json(report)
    quantization = cfg.model.quantization
    for wait, shown in zip(report.waits, found["waits"], strict=True):
        shown["by_design"] = by_design(wait, options.strategy, quantization)
    bad = bool(report.faults) or any(not wait["by_design"] for wait in found["waits"])
    sys.stdout.write(json.dumps(found, indent=2) + "\n" if options.json else "\n".join(report_lines(found)) + "\n")
    return int(bad)


def _matrix(options: argparse.Namespace) -> int:
    from phi3_dist.bench.cells import cells, rehearse_cells

    chosen = [cell for cell in cells() if options.strategy in {None, cell.strategy}]
    outcomes = []
    for outcome in rehearse_cells(chosen, options.jobs):
        outcomes.append(outcome)
        if not options.json:
            state = "sound" if outcome.sound and outcome.verdict == "ran" else ""
            sys.stdout.write(f"{outcome.cell!s:<32} {outcome.verdict:<8} {state}{outcome.why}\n")
            sys.stdout.write("".join(f"    {line}\n" for line in (*outcome.faults, *outcome.waits)))
            sys.stdout.flush()
    if options.json:
        rows = [{**vars(one), "cell": vars(one.cell), "not_rehearsed": one.not_rehearsed} for one in outcomes]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    return int(not all(outcome.sound for outcome in outcomes))


def main(arguments: list[str] | None = None) -> int:
    """Rehearse and print; the exit code."""
    print_in_any_encoding()
    parser = argparse.ArgumentParser(prog="python -m phi3_dist.bench.rehearse", description=__doc__)
    parser.add_argument("run_file", nargs="?", help="RUN.yaml")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    parser.add_argument("--strategy", choices=STRATEGIES, help="default single; with --matrix: all")
    parser.add_argument("--world", type=int, help="ranks (default 8, or 1 for single)")
    parser.add_argument("--layers", type=int, help="decoder layers, where fewer than the base's are enough")
    parser.add_argument("--matrix", action="store_true", help="every cell of the support matrix, on a small model")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time (default 1)")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    options = parser.parse_args(arguments)
    if not options.matrix and options.run_file is None:
        parser.error("give a run file, or --matrix")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if options.matrix:
            return _matrix(options)
        options.strategy = options.strategy or "single"
        return _one(options)
    except Phi3DistError as error:
        for problem in error.problems:
            sys.stderr.write(f"{problem}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
