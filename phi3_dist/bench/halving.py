"""What halving costs in wrong decisions: python -m phi3_dist.bench.halving (after make demo)

For each seed twelve candidates (four learning rates, three ranks) train to their ends in one sweep on the demo's task
(`make demo` leaves base and chats). The rule of `sweep.early` is a function of held-out losses alone, and a candidate's
numbers don't depend on who trains beside it, so what halving would have ended is computed from the losses of the full
sweep, for several rules. `--check` also runs the first seed with halving, and holds its decisions against the computed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from phi3_dist.bench.console import say
from phi3_dist.machine.print_encoding import print_in_any_encoding
from phi3_dist.sweep.early import Decision, decide, rung_step
from phi3_dist.sweep.file import EarlyConfig, load_sweep

__all__ = ["main", "replay"]

RATES, RANKS = [3.0e-4, 1.0e-3, 3.0e-3, 1.0e-2], [4, 8, 16]
RULES = {
    "half, from the first loss on": EarlyConfig(rule="halving", keep=0.5, first=1, floor=1),
    "half, from the second loss on": EarlyConfig(rule="halving", keep=0.5, first=2, floor=1),
    "half, never fewer than three": EarlyConfig(rule="halving", keep=0.5, first=1, floor=3),
    "a third, from the first loss on": EarlyConfig(rule="halving", keep=0.34, first=1, floor=1),
}


def replay(early: EarlyConfig, every: int, curves: Mapping[str, Mapping[int, float]], steps: int) -> list[Decision]:
    """The decisions that `early` makes on these held-out losses (name, then steps made), in order."""
    running, order = list(curves), list(curves)
    decisions: list[Decision] = []
    for rung in range(64):
        step = rung_step(early, every, rung)
        if step >= steps or len(running) <= early.floor:
            return decisions
        decisions.append(decide(early, step, {name: curves[name].get(step, math.nan) for name in running}, order))
        running = list(decisions[-1].kept)
    return decisions


def _sweep(folder: Path, seed: int, args: argparse.Namespace, early: dict[str, Any] | None) -> Path:
    """Run one sweep to its end; its folder."""
    name = f"seed_{seed}" + ("_halved" if early else "")
    values: dict[str, Any] = {
        "model": {"source": str(args.base), "precision": "fp32"},
        "data": {
            "train": str(args.chats / "train.jsonl"),
            "validation": str(args.chats / "validation.jsonl"),
            "max_validation_rows": args.held_out,
            "pack_length": 256,
            "cache": str(folder / "cache"),
        },
        "lora": {"alpha": 32, "dropout": 0.0},
        "optim": {"warmup": 3},
        "train": {"max_steps": args.steps, "global_batch": 2, "eval_every": args.every, "seed": seed},
        "save": {"folder": str(folder / name), "every": 0},
        "log": {"trackers": []},
        "sweep": {"axes": {"optim.lr": RATES, "lora.r": RANKS}, **({"early": early} if early else {})},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    env = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), **os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "phi3_dist", "sweep", str(file)], env=env, check=True, stdout=sys.stderr)
    return folder / name


def _curves(folder: Path) -> dict[str, dict[int, float]]:
    """Held-out losses of each candidate by the steps made, in the order of the sweep file."""
    curves = {}
    for one in load_sweep(folder.with_suffix(".yaml")).candidates:
        file = Path(one.cfg.save.folder) / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        curves[one.name] = {row["step"]: row["heldout_loss"] for row in rows if row["kind"] == "eval"}
    return curves


def _costs(curves: Mapping[str, Mapping[int, float]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """For each rule: the winner with and without it, what it lost, and the share of steps that were made."""
    last = {name: curve[args.steps] for name, curve in curves.items()}
    best = min(last, key=lambda name: last[name])
    found = []
    for title, early in RULES.items():
        decisions = replay(early, args.every, curves, args.steps)
        left = decisions[-1].kept if decisions else tuple(curves)
        winner = min(left, key=lambda name: last[name])
        made = sum(decision.step * len(decision.ended) for decision in decisions) + args.steps * len(left)
        found.append(
            {
                "rule": title,
                "winner_of_all": best,
                "winner_with_halving": winner,
                "place_of_all": 1 + sorted(last, key=lambda name: last[name]).index(winner),
                "loss_of_all": round(last[best], 4),
                "loss_with_halving": round(last[winner], 4),
                "share_of_steps": round(made / (args.steps * len(curves)), 3),
            }
        )
    return found


def _checked(folder: Path, curves: Mapping[str, Mapping[int, float]], args: argparse.Namespace) -> bool:
    """Whether a sweep that really halves ends the candidates that were computed, at the same steps."""
    early = next(iter(RULES.values()))
    halved = _sweep(folder, args.seeds[0], args, early.model_dump())
    said = json.loads((halved / "sweep.json").read_text())["early"]
    ours = [(decision.step, list(decision.ended)) for decision in replay(early, args.every, curves, args.steps)]
    return ours == [(one["step"], one["ended"]) for one in said]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line of JSON for each seed and rule."""
    print_in_any_encoding()
    parser = argparse.ArgumentParser(prog="python -m phi3_dist.bench.halving", description=__doc__)
    parser.add_argument("--base", type=Path, default=Path("demo/base"), help="base model (make demo builds it)")
    parser.add_argument("--chats", type=Path, default=Path("demo/chats"), help="chats (make demo writes them)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default 0 1 2)")
    parser.add_argument("--steps", type=int, default=64, help="steps of each candidate (default 64)")
    parser.add_argument("--every", type=int, default=8, help="steps between held-out losses (default 8)")
    parser.add_argument("--held-out", type=int, default=64, help="held-out rows (default 64)")
    parser.add_argument("--check", action="store_true", help="run the first seed with halving too")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="halving_") as name:
        for seed in args.seeds:
            curves = _curves(_sweep(Path(name), seed, args, None))
            for cost in _costs(curves, args):
                say(json.dumps({"seed": seed, **cost}))
            if args.check and seed == args.seeds[0]:
                same = _checked(Path(name), curves, args)
                say(json.dumps({"seed": seed, "halved_for_real_is_the_same": same}))
                if not same:
                    raise SystemExit("the decisions of the sweep that halved are not the computed ones")


if __name__ == "__main__":
    main()
