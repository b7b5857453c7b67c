"""Checks on one GPU in about seven minutes: what was written without a card is proven or refuted on it.

    python -m phi3_dist.bench.card --out FOLDER [--cpu] [--budget 420] [--only facts attention …]

Groups: facts (the machine and the plan), attention, kernels (bench/kernels.py), products (rates, the head), runs (every
strategy as a run of its own, resumed and compared), model (Phi-3-mini's real shape). Each group is a process with a
limit of its own, so that an error spoils no other; each check is one line of JSON, on the terminal and in
FOLDER/checks.jsonl. The last line says what the plan should choose on this card, and is kept where plans look for it
(machine/card_measurements.py). `--cpu` rehearses all of it at toy sizes; what needs CUDA says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from phi3_dist.bench.card.checks import Group, say
from phi3_dist.bench.card.choices import choices_of, read_rows
from phi3_dist.machine.card_measurements import write_card

__all__ = ["main"]

REPO = Path(__file__).resolve().parents[3]
GROUPS = ("facts", "model", "attention", "kernels", "products")
LIMIT_S = {"facts": 40, "attention": 90, "kernels": 90, "products": 40, "model": 200}


def _group(name: str) -> Callable[[Group], None]:
    if name == "facts":
        from phi3_dist.bench.card.facts import facts

        return facts
    if name == "attention":
        from phi3_dist.bench.card.attention import attention

        return attention
    if name == "products":
        from phi3_dist.bench.card.products import products

        return products
    from phi3_dist.bench.card.model import model

    return model


def _child(name: str, args: argparse.Namespace, left_s: float) -> None:
    if left_s < 15:
        say(args.out, group=name, check="group", ok=None, skipped="no time left")
        return
    words = [sys.executable, "-m", "phi3_dist.bench.card", "--group", name, "--out", str(args.out)]
    words += ["--layers", str(args.layers), "--checks", args.checks, *(["--cpu"] if args.cpu else [])]
    if name == "kernels":  # a benchmark of its own, which says lines of the same kind
        words = [sys.executable, "-m", "phi3_dist.bench.kernels", "--groups", args.kernels]
        words += ["--toy"] if args.cpu else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    if args.cpu:
        env |= {"CUDA_VISIBLE_DEVICES": "", **({"TRITON_INTERPRET": "1"} if name == "kernels" else {})}
    log = args.out / f"{name}.log"
    start = time.monotonic()
    apart = name == "kernels"  # its lines are no checks of this program's: they are said when it has ended
    with log.open("w") as errors, (args.out / f"{name}.out").open("w") as output:
        process = subprocess.Popen(
            words, cwd=REPO, env=env, stdout=output if apart else None, stderr=errors, start_new_session=True
        )
    try:
        code: int | str = process.wait(timeout=min(LIMIT_S[name] * args.patience, left_s))
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = "killed at its limit"
    if apart:
        for line in (args.out / f"{name}.out").read_text(encoding="utf-8").splitlines():
            if line.startswith("{"):
                say(args.out, **json.loads(line))
    tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-6:] if code != 0 else []
    took_s = round(time.monotonic() - start, 1)
    say(args.out, group=name, check="group", ok=code == 0, code=code, s=took_s, stderr=tail)


def _runs(args: argparse.Namespace, until_s: float) -> None:
    from phi3_dist.bench.card.bases import save_tiny_base
    from phi3_dist.bench.card.runs import Runner, run_all, runs_of

    base = save_tiny_base(args.out / "base")
    runs = [run for run in runs_of(base, cpu=args.cpu) if re.search(args.runs, run.name)]
    run_all(Runner(REPO, args.out, args.cpu, 75 * args.patience, args.parallel, until_s), runs)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m phi3_dist.bench.card", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checks.jsonl and the logs")
    parser.add_argument("--cpu", action="store_true", help="rehearse at toy sizes on a CPU")
    parser.add_argument("--budget", type=float, default=420, help="seconds in all (default 420)")
    parser.add_argument("--patience", type=float, default=1, help="multiplies each group's limit, on a slow machine")
    parser.add_argument("--parallel", type=int, default=8, help="runs side by side (default 8)")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers of the model (default 32)")
    parser.add_argument("--kernels", default="rates,passes,lora,fp8,loss", help="groups of bench/kernels.py")
    parser.add_argument("--runs", default="", help="a regular expression: the runs whose names it finds")
    parser.add_argument("--checks", default="", help="a regular expression: the groups' checks whose names it finds")
    parser.add_argument("--only", nargs="+", default=[*GROUPS, "runs"], help="groups to run")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.group:
        _group(args.group)(Group(args.group, args.out, cpu=args.cpu, layers=args.layers, checks=args.checks))
        return
    end_s = time.monotonic() + args.budget
    for name in GROUPS:
        if name in args.only:
            _child(name, args, end_s - time.monotonic())
    if "runs" in args.only:
        _runs(args, end_s - 30)
    _choose(args)


def _choose(args: argparse.Namespace) -> None:
    """Say what the figures speak for, and keep it where the plans of this machine look."""
    found = choices_of(read_rows(args.out))
    say(args.out, group="all", check="choices", ok=True, **found)
    if not args.cpu and "card" in found:
        sys.stdout.write(f"kept for this machine's plans: {write_card(found['card'], found)}\n")


if __name__ == "__main__":
    main()
