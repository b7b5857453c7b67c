"""What it costs to save an adapter under ZeRO-3: our gather beside `accelerator.get_state_dict`, in the same process.

    python -m phi3_dist.bench.gather

Starts two processes on this machine (CPU, gloo) with a random Phi-3 of about 80 M parameters, then of twice that, with
an adapter of the same tensors. The two ways take turns; times are medians over the rounds, memory is the
largest rise of a rank's resident set above where it stood before the call. The baseline's bytes are those of the
tensors that it hands back: each of them was gathered on every rank, so what really moved is not less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phi3_dist.bench.console import say
from phi3_dist.bench.memory_cells import free_port
from phi3_dist.family.variants import Shape
from phi3_dist.machine.print_encoding import print_in_any_encoding

__all__ = ["SIZES", "Cost", "Size", "main"]

MIB = 2**20
TIMEOUT_S = 400


@dataclass(frozen=True)
class Size:
    """What differs between the bases. The adapter sits on attention alone: it has the same tensors in both."""

    vocab: int
    intermediate: int


SIZES = {"half": Size(vocab=16032, intermediate=512), "full": Size(vocab=32064, intermediate=2048)}
RANK_OF_ADAPTER = 64


@dataclass(frozen=True)
class Cost:
    """One call on one rank."""

    bytes: int
    seconds: float
    peak_mib: float


def _status_kib(name: str) -> int:
    """A field of /proc/self/status, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}: this benchmark needs Linux")


def _measured(call: Callable[[], int]) -> Cost:
    """Run `call`, which returns bytes, on ranks that start together; the peak is the kernel's own high-water mark."""
    import torch.distributed as dist

    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size
    before_kib = _status_kib("VmRSS")
    start_s = time.perf_counter()
    moved = call()
    seconds = time.perf_counter() - start_s
    return Cost(moved, seconds, (_status_kib("VmHWM") - before_kib) / 1024)


def _engine(size: Size) -> tuple[Any, Any, dict[str, int]]:
    """Accelerator, ZeRO-3 engine, and the counts of parameters."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
    from peft import LoraConfig, get_peft_model
    from transformers import Phi3ForCausalLM

    from phi3_dist.modeling.shape_config import config_of_shape

    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    torch.manual_seed(0)
    config = config_of_shape(Shape(16, 768, size.intermediate, 8, 8, 96, size.vocab))
    lora = LoraConfig(r=RANK_OF_ADAPTER, target_modules=["qkv_proj", "o_proj"])
    model = get_peft_model(Phi3ForCausalLM(config), lora)
    trainable = [p for p in model.parameters() if p.requires_grad]
    counts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "adapter": sum(p.numel() for p in trainable),
    }
    engine, _ = accelerator.prepare(model, torch.optim.AdamW(trainable, lr=1e-3))
    return accelerator, engine, counts


def _train_once(engine: Any) -> None:
    """One step, so that the engine's own buffers are there before anything is measured."""
    import torch

    ids = torch.arange(64).reshape(1, 64)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()


def _worker(size: Size, rounds: int) -> dict[str, Any]:
    import torch.distributed as dist

    from phi3_dist.adapters.files import save_adapter
    from phi3_dist.adapters.gather import gather_adapter_with_stats

    accelerator, engine, counts = _engine(size)
    _train_once(engine)
    rank = dist.get_rank()
    costs: dict[str, list[Cost]] = {"gather": [], "save": [], "peer": []}

    def gather() -> int:
        return gather_adapter_with_stats(engine)[1].moved_bytes

    def peer() -> int:
        state = accelerator.get_state_dict(engine)
        return sum(tensor.nbytes for tensor in state.values()) if state else 0

    with tempfile.TemporaryDirectory() as folder:

        def save() -> int:
            save_adapter(engine, Path(folder) / f"rank_{rank}" / "adapter", card="")
            return 0

        for _ in range(rounds):
            costs["gather"].append(_measured(gather))
            costs["save"].append(_measured(save))
            costs["peer"].append(_measured(peer))
    return {**counts, **{name: [asdict(cost) for cost in found] for name, found in costs.items()}}


# --- the side that starts them ----------------------------------------------------------------------------------------


def _run(name: str, rounds: int) -> list[dict[str, Any]]:
    """The results of two ranks. Raises RuntimeError with the end of the output of the one that failed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # ninja lies there
    env = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PATH": path,
    }
    env.pop("ACCELERATE_USE_CPU", None)
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        try:
            for rank in range(2):
                out = Path(folder) / f"{rank}.json"
                command = [sys.executable, "-m", "phi3_dist.bench.gather", "--rounds", str(rounds)]
                command += ["--worker", name, "--out", str(out)]
                with (Path(folder) / f"{rank}.log").open("wb") as log:
                    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    processes.append(subprocess.Popen(command, env=env | ranks, stdout=log, stderr=log))
            for rank, process in enumerate(processes):
                if process.wait(timeout=TIMEOUT_S):
                    log_end = (Path(folder) / f"{rank}.log").read_text(errors="replace")[-3000:]
                    raise RuntimeError(f"rank {rank} ended with exit code {process.returncode}:\n{log_end}")
            return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]
        finally:
            for process in processes:
                process.kill()


def _summary(by_rank: list[dict[str, Any]], way: str) -> dict[str, float]:
    """Largest over ranks: bytes, median seconds, peak of each rank."""
    return {
        "bytes": max(max(cost["bytes"] for cost in rank[way]) for rank in by_rank),
        "seconds": max(statistics.median(cost["seconds"] for cost in rank[way]) for rank in by_rank),
        "peak_0": max(cost["peak_mib"] for cost in by_rank[0][way]),
        "peak_1": max(cost["peak_mib"] for cost in by_rank[1][way]),
    }


def _report(results: dict[str, list[dict[str, Any]]], say: Callable[[str], None]) -> dict[str, float]:
    say(f"{'base':>12} {'adapter':>10}  {'way':<28} {'MiB a rank':>10} {'seconds':>8} {'peak MiB, rank 0 / 1':>22}")
    ways = {"gather": "gather_adapter", "save": "save_adapter (to disk)", "peer": "accelerator.get_state_dict"}
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for name, by_rank in results.items():
        for way, label in ways.items():
            row = rows[name, way] = _summary(by_rank, way)
            size = f"{by_rank[0]['parameters'] / 1e6:10.1f} M {by_rank[0]['adapter'] / 1e6:8.2f} M"
            moved = f"{row['bytes'] / MIB:10.1f}" if way != "save" else f"{'':10}"
            say(f"{size}  {label:<28} {moved} {row['seconds']:8.3f} {row['peak_0']:13.1f} / {row['peak_1']:6.1f}")
    ours, saved, peer = rows["full", "gather"], rows["full", "save"], rows["full", "peer"]
    adapter_mib = results["full"][0]["adapter"] * 4 / MIB
    limit_mib = 2 * adapter_mib + 64
    growth = ours["seconds"] / rows["half", "gather"]["seconds"]
    peak_mib = max(row[peak] for row in (ours, saved) for peak in ("peak_0", "peak_1"))
    say(f"peak of a save above training: {peak_mib:.1f} MiB (limit 2 x adapter + 64 = {limit_mib:.1f} MiB)")
    say(f"time of the gather, full base / half base, same adapter: {growth:.2f}")
    bytes_ratio, time_ratio = peer["bytes"] / ours["bytes"], peer["seconds"] / ours["seconds"]
    say(f"bytes ratio: {bytes_ratio:.1f}  time ratio: {time_ratio:.1f}")
    return {
        "bytes_ratio": bytes_ratio,
        "time_ratio": time_ratio,
        "peak_mib": peak_mib,
        "peak_limit_mib": limit_mib,
        "growth": growth,
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print its table; `--json FILE` also writes its figures."""
    print_in_any_encoding()
    parser = argparse.ArgumentParser(prog="python -m phi3_dist.bench.gather", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="calls of each way (default 5)")
    parser.add_argument("--json", type=Path, help="write the ratios here too")
    parser.add_argument("--worker", choices=sorted(SIZES), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        options.out.write_text(json.dumps(_worker(SIZES[options.worker], options.rounds)))
        import torch.distributed as dist

        dist.destroy_process_group()
        return
    results = {name: _run(name, options.rounds) for name in SIZES}
    figures = _report(results, say)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
