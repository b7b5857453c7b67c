"""One row as long as the family's longest window, on one process and on ranks that share it: memory, time, the numbers.

    python -m phi3_dist.bench.long_rows --tokens 131072 --ranks 1 2

A small Phi-3 on CPUs, its layers recomputed and its loss in chunks: one document, all of which is learned. Each rank
runs one real step. `tensors` is the most that live at once, counted by storage (bench/live_bytes.py), of which the
model's weights are a part that sharing does not lessen; `process` is the rise of the rank's resident memory at its
peak, with what a kernel borrows inside itself; `planned` is what `phi3-dist plan` says of the tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from phi3_dist.bench.console import say
from phi3_dist.bench.load import PeakPss
from phi3_dist.bench.memory_cells import free_port
from phi3_dist.family.variants import Shape
from phi3_dist.machine.print_encoding import print_in_any_encoding

__all__ = ["main"]

GIB, MIB = 2**30, 2**20
TIMEOUT_S = 3 * 3600


def _config(options: argparse.Namespace) -> Any:
    from phi3_dist.modeling.shape_config import config_of_shape

    hidden, heads = options.hidden, options.heads
    shape = Shape(options.layers, hidden, options.inner, heads, heads, hidden // heads, 2048)
    return config_of_shape(shape, max_position_embeddings=131072)


def _run_file(options: argparse.Namespace, world: int, base: Path) -> Any:
    from phi3_dist.config.schema import RunConfig

    return RunConfig.model_validate(
        {
            "model": {"source": str(base), "precision": "fp32", "activation_checkpointing": True},
            "data": {"train": "none", "pack_length": options.tokens},
            "lora": {"dropout": options.dropout},
            "train": {"global_batch": 1, "micro_batch": 1, "sequence_parallel": world},
        }
    )


def _work(options: argparse.Namespace) -> dict[str, Any]:
    """One rank's step."""
    import torch
    from transformers import Phi3ForCausalLM

    from phi3_dist.bench.counting import RealWatch
    from phi3_dist.bench.throughput_sides import make_token_packs
    from phi3_dist.data.pack_order import Order
    from phi3_dist.machine.probe import probe
    from phi3_dist.modeling.base import find_base
    from phi3_dist.planning.facts import LaunchFacts
    from phi3_dist.planning.memory import total_gib
    from phi3_dist.planning.plan import make_plan
    from phi3_dist.training.build import build_model
    from phi3_dist.training.engines.backward_and_update import make_engine
    from phi3_dist.training.runtime import start_runtime
    from phi3_dist.training.train_step import train_step

    torch.set_num_threads(1)
    world, rank, config = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0")), _config(options)
    launch = LaunchFacts(world, 1, "single" if world == 1 else "ddp", use_cpu=True, rank=rank)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        torch.manual_seed(1)
        Phi3ForCausalLM(config).save_pretrained(scratch)
        cfg = _run_file(options, world, scratch)
        plan = make_plan(cfg, probe(use_cpu=True), launch, family_or_shape=config.to_dict())
        watch = RealWatch()
        with watch, PeakPss() as process:
            runtime = start_runtime(plan, {}, max_grad_norm=1.0, trackers=(), folder=scratch)
            model = build_model(cfg, find_base(str(scratch)), runtime, longest_row=options.tokens).model
            engine = make_engine(model, runtime, cfg.optim)
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            row = ([5 + i % 2000 for i in range(options.tokens)], 1)
            packs = make_token_packs([row], options.tokens)
            start_s = time.perf_counter()
            done = train_step(engine, runtime, packs, Order(1, 1, 0, False), 0, lr=1e-4, seed=0)
            step_s = time.perf_counter() - start_s
            nll = runtime.sum(done.nll.double())
        runtime.release()
    return {
        "tensors_mib": sum(watch.live.peak["cpu"].values()) / MIB,
        "weights_mib": weights / MIB,
        "planned_mib": total_gib(plan.memory or (), "host") * GIB / MIB,
        "process_mib": process.rise / MIB,
        "step_s": step_s,
        "loss": float(nll) / done.supervised_tokens,
        "grad_norm": float(done.grad_norm),
    }


def _start(world: int, arguments: list[str]) -> list[dict[str, Any]]:
    """What each of `world` ranks found. Raises RuntimeError with the end of the output of a rank that failed."""
    shared = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "phi3_dist.bench.long_rows", "--worker", *arguments]
    ranks = []
    for rank in range(world):
        env = {**os.environ, **shared}
        if world > 1:
            env |= {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    found = []
    for process in ranks:
        output, errors = process.communicate(timeout=TIMEOUT_S)
        if process.returncode:
            raise RuntimeError(f"a rank ended with exit code {process.returncode}:\n{errors[-3000:]}")
        found.append(json.loads(output.splitlines()[-1]))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print its table; `--json FILE` also writes its figures."""
    print_in_any_encoding()
    parser = argparse.ArgumentParser(prog="python -m phi3_dist.bench.long_rows", description=__doc__)
    parser.add_argument("--tokens", type=int, default=131072, help="tokens of the row (default 131072)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="ranks that share it (default 1 2)")
    parser.add_argument("--hidden", type=int, default=32, help="hidden size (default 32)")
    parser.add_argument("--inner", type=int, default=2048, help="width inside the MLP (default 2048)")
    parser.add_argument("--heads", type=int, default=2, help="attention heads (default 2)")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers (default 2)")
    parser.add_argument("--dropout", type=float, default=0.0, help="of LoRA (default 0)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        say(json.dumps(_work(options)))
        return
    shape = ("tokens", "hidden", "inner", "heads", "layers", "dropout")
    passed = [word for name in shape for word in (f"--{name}", str(getattr(options, name)))]
    figures: dict[str, list[dict[str, Any]]] = {}
    say(f"{options.tokens:,} tokens, MiB of the largest rank, seconds of one step on one core a rank")
    say(f"{'ranks':>5} {'tensors':>9} {'weights':>9} {'planned':>9} {'process':>9} {'step':>8}  loss, gradient norm")
    for world in options.ranks:
        ranks = _start(world, passed)
        figures[str(world)] = ranks
        most = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
        sizes = " ".join(f"{most[f'{name}_mib']:9.1f}" for name in ("tensors", "weights", "planned", "process"))
        say(f"{world:>5} {sizes} {most['step_s']:8.1f}  {ranks[0]['loss']:.7f}, {ranks[0]['grad_norm']:.7f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
