"""Memory as planned and as measured: the real family's shapes on fake CUDA tensors, smaller models really run on a CPU.

    python -m phi3_dist.bench.memory [--only TEXT] [--rehearsed | --cpu] [--fitcheck PYTHON] [--markdown FILE]

One line a cell: predicted, measured, error. Ends with 1 where a cell is off by more than `--worst` (3 %) or planned
smaller than measured by more than `--under` (1 %). What is counted are tensors' storages: a CUDA context, what kernels
and libraries allocate below torch, and the allocator's rounding are not among them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from phi3_dist.bench.console import say
from phi3_dist.bench.fitcheck_side import answers, ask_fitcheck, fitcheck_python
from phi3_dist.bench.memory_cells import CPU, REHEARSED, MemoryCell, free_port, measure_on_cpu, quietly, rehearse_cell
from phi3_dist.bench.page_table import put_table

__all__ = ["main", "markdown"]


def _rehearse(cells: Sequence[MemoryCell], jobs: int, python: str | None) -> Iterator[dict[str, Any]]:
    from phi3_dist.bench.cells import forked
    from phi3_dist.bench.rehearsal import import_all
    from phi3_dist.bench.stock_step import rehearse_stock

    import_all()
    asked = [cell for cell in cells if answers(cell)] if python else []
    tensors = ask_fitcheck(python, asked) if python and asked else None
    of_fitcheck = dict(zip(asked, tensors or [], strict=bool(tensors)))
    for cell, found in zip(cells, forked([partial(quietly, rehearse_cell, cell) for cell in cells], jobs), strict=True):
        if cell in of_fitcheck and "measured_gib" in found:
            (stock,) = forked([partial(quietly, rehearse_stock, cell)], 1)
            if "error" not in stock:
                real = sum(stock.values())
                found |= {"stock_gib": real, "fitcheck_gib": of_fitcheck[cell]}
                found["fitcheck_error"] = of_fitcheck[cell] / real - 1
        yield found


def _on_cpu(cells: Sequence[MemoryCell]) -> Iterator[dict[str, Any]]:
    import torch

    from phi3_dist.bench.cells import forked

    torch.set_num_threads(1)
    for cell in cells:
        port = free_port()
        ranks = [partial(quietly, measure_on_cpu, cell, rank, port) for rank in range(cell.world)]
        found = list(forked(ranks, cell.world))
        yield next((one for one in found if "error" in one and "measured_gib" not in one), found[0])


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table, worst first within each way of measuring."""
    lines = ["| measured | run | predicted, GiB | measured, GiB | error | PEFT's own step, GiB | fitcheck of it |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (row["how"], -abs(row.get("error", 9)))):
        if "measured_gib" in row:
            sizes = f"{row['predicted_gib']:.3f} | {row['measured_gib']:.3f} | {row['error']:+.2%}"
            other = "- | -"
            if "fitcheck_gib" in row:
                other = f"{row['stock_gib']:.3f} | {row['fitcheck_gib']:.3f} ({row['fitcheck_error']:+.1%})"
            lines.append(f"| {row['how']} | {row['cell']} | {sizes} | {other} |")
    return "\n".join(lines) + "\n"


def _run(how: str, cells: Sequence[MemoryCell], results: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    before = time.perf_counter()
    for cell, found in zip(cells, results, strict=True):
        now = time.perf_counter()
        row = {"how": how, "cell": str(cell), "seconds": round(now - before, 1), **found}
        before = now
        if "measured_gib" in found:
            sizes = f"{found['predicted_gib']:8.3f} {found['measured_gib']:8.3f} {found['error']:+7.2%}"
            if "fitcheck_gib" in found:
                sizes += f"  PEFT's own {found['stock_gib']:.3f}, fitcheck {found['fitcheck_error']:+.1%}"
        else:
            sizes = f"failed: {found['error'][:120]}"
        say(f"{how:<10} {cell!s:<78} {sizes} {row['seconds']:5.1f} s")
        yield row


def _measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if not options.rehearsed:
        cells = [cell for cell in CPU if options.only in str(cell)]
        yield from _run("CPU", cells, _on_cpu(cells))
    if not options.cpu:
        cells = [cell for cell in REHEARSED if options.only in str(cell)]
        yield from _run("fake CUDA", cells, _rehearse(cells, options.jobs, fitcheck_python(options.fitcheck)))


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m phi3_dist.bench.memory", description=__doc__)
    parser.add_argument("--only", default="", help="cells whose line holds this text")
    parser.add_argument("--rehearsed", action="store_true", help="only those on fake CUDA tensors")
    parser.add_argument("--cpu", action="store_true", help="only those on this CPU")
    parser.add_argument("--jobs", type=int, default=1, help="rehearsals at a time")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    parser.add_argument("--page", type=Path, help="a page whose table is replaced by this one")
    parser.add_argument(
        "--fitcheck", metavar="PYTHON", help="an interpreter that has fitcheck-llm, if this one has not"
    )
    parser.add_argument("--worst", type=float, default=0.03)
    parser.add_argument("--under", type=float, default=0.01)
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for row in _measure(options):
        rows.append(row)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(markdown(rows), encoding="utf-8")
    if options.page:
        put_table(options.page, "bench-memory", markdown(rows))
    errors = [row["error"] for row in rows if "measured_gib" in row]
    if not errors:
        return 1
    worst, lowest = max(errors, key=abs), min(errors)
    sys.stdout.write(f"{len(errors)} of {len(rows)} cells; worst {worst:+.2%}, lowest {lowest:+.2%}\n")
    good = len(errors) == len(rows) and abs(worst) <= options.worst and lowest >= -options.under
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
