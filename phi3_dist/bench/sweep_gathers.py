"""What of a sharded base crosses the network for a candidate's token: a sweep on two processes beside one of its runs.

    python -m phi3_dist.bench.sweep_gathers [--strategies zero3 fsdp2] [--candidates 1 2 4 8] [--length 256]

Each is started as a user would, by `accelerate launch`, with the gathers of every rank counted: the bytes that a rank
receives of the others' shards, in steps without held-out losses. Their tokens are the same for a sweep's candidate and
for the run, so that the quotient is 1 / candidates where one pass serves all.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phi3_dist.bench.console import say
from phi3_dist.bench.load import write_base
from phi3_dist.bench.sweep import sweep_files
from phi3_dist.machine.print_encoding import print_in_any_encoding

__all__ = ["main"]

RANKS = 2


def _counted(folder: Path, words: list[str]) -> None:
    """`phi3-dist WORDS` in this process; writes the bytes that it gathered into `folder`, by rank."""
    import torch.distributed as dist

    received = 0

    def counting(gather: Callable[..., Any]) -> Callable[..., Any]:
        def gathers(output_tensor: Any, input_tensor: Any, *rest: Any, **named: Any) -> Any:
            nonlocal received
            received += output_tensor.nbytes - input_tensor.nbytes
            return gather(output_tensor, input_tensor, *rest, **named)

        return gathers

    for name in ("all_gather_into_tensor", "all_gather_single"):  # DeepSpeed's, and FSDP2's since torch 2.13
        if hasattr(dist, name):
            setattr(dist, name, counting(getattr(dist, name)))
    sys.argv = ["phi3_dist", *words]
    try:
        runpy.run_module("phi3_dist", run_name="__main__", alter_sys=True)
    finally:
        (folder / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(received))


def _launch(strategy: str, words: list[str]) -> int:
    """Bytes that rank 0 received of the others' shards."""
    config = Path(__file__).parents[2] / "configs" / "accelerate" / f"{strategy}.yaml"
    with tempfile.TemporaryDirectory(prefix="gathers_") as counts:
        launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
        launcher += ["--num_processes", str(RANKS), "--main_process_port", "0", "-m", "phi3_dist.bench.sweep_gathers"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [*launcher, "--counts", counts, "--", *words], env=env, text=True, capture_output=True, check=False
        )
        if done.returncode:
            raise SystemExit((done.stdout + done.stderr)[-2000:])
        received: int = json.loads((Path(counts) / "rank_0.json").read_text())
    return received


def _measure(folder: Path, base: Path, strategy: str, candidates: int, args: argparse.Namespace) -> dict[str, Any]:
    together, alone = sweep_files(folder, base, args.length, args.steps, candidates, batch=RANKS, held_out=False)
    one = _launch(strategy, ["train", str(alone[0]), "--overwrite"])
    joint = _launch(strategy, ["sweep", str(together), "--overwrite"])
    return {
        "strategy": strategy,
        "candidates": candidates,
        "steps": args.steps,
        "base_mib": round(sum(file.stat().st_size for file in base.glob("*.safetensors")) / 2**20, 1),
        "run_mib": round(one / 2**20, 1),
        "sweep_mib": round(joint / 2**20, 1),
        "a_candidate_of_a_run": round(joint / candidates / one, 4),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print one line of JSON for each strategy and count of candidates."""
    print_in_any_encoding()
    parser = argparse.ArgumentParser(prog="python -m phi3_dist.bench.sweep_gathers", description=__doc__)
    parser.add_argument("--strategies", nargs="+", default=["zero3", "fsdp2"], help="of configs/accelerate")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 2, 4, 8], help="candidates (default 1 2 4 8)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a pack (default 256)")
    parser.add_argument("--steps", type=int, default=2, help="steps of each candidate (default 2)")
    parser.add_argument("--counts", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.counts:
        _counted(args.counts, args.words)
        return
    with tempfile.TemporaryDirectory(prefix="sweep_") as name:
        base = Path(name) / "base"
        write_base(base, layers=4, hidden=256, shard="1GB")
        for strategy in args.strategies:
            for candidates in args.candidates:
                folder = Path(name) / f"{strategy}_{candidates}"
                folder.mkdir()
                say(json.dumps(_measure(folder, base, strategy, candidates, args)))


if __name__ == "__main__":
    main()
