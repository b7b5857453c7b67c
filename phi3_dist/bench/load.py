"""What it costs to load a base on two ranks of one machine: this toolkit beside `from_pretrained`, by strategy.

    python -m phi3_dist.bench.load

Memory is the proportional set size (PSS) of a rank, in which a page that two ranks map counts half for each, as
`/proc/self/smaps_rollup` tells it: the largest rise above where the rank stood before the load, read by a thread.
`held` is the rise after the load, when every weight has been read once on both ranks.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from phi3_dist.bench.console import say
from phi3_dist.family.variants import Shape
from phi3_dist.machine.print_encoding import print_in_any_encoding

__all__ = ["Load", "PeakPss", "main", "measured_load", "pss_bytes", "start", "write_base"]

GIB = 2**30
TIMEOUT_S = 580
WAYS = ("ours", "peer")
STRATEGIES = ("ddp", "zero3", "fsdp2")


def pss_bytes() -> int:
    """This process's proportional set size. Raises RuntimeError where the kernel does not tell it."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/smaps_rollup has no Pss: Linux 4.14 or newer is needed")


class PeakPss:
    """The largest rise of the proportional set size inside the block, in bytes, read every 5 ms."""

    def __enter__(self) -> PeakPss:
        gc.collect()
        self.before = pss_bytes()
        self.rise = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._end.wait(0.005):
            self.rise = max(self.rise, pss_bytes() - self.before)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()
        self.rise = max(self.rise, pss_bytes() - self.before)


@dataclass(frozen=True)
class Load:
    """One load on one rank, in bytes: the base as a whole, this rank's weights of it, memory at its peak and after."""

    base: int
    resident: int
    peak_pss: int
    held_pss: int
    seconds: float


def write_base(folder: Path, *, layers: int, hidden: int, shard: str) -> int:
    """Save a random Phi-3 in float32 as several safetensors files of at most `shard`; its bytes."""
    import torch
    from transformers import Phi3ForCausalLM

    from phi3_dist.modeling.shape_config import config_of_shape

    config = config_of_shape(Shape(layers, hidden, 2 * hidden, hidden // 64, hidden // 64, 64, 8000))
    torch.manual_seed(0)
    model = Phi3ForCausalLM(config)
    model.save_pretrained(folder, max_shard_size=shard)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def start(strategy: str, folder: Path) -> tuple[Any, Any]:
    """The run's config and the runtime of this rank, as training has them."""
    from phi3_dist.config.schema import RunConfig
    from phi3_dist.machine.probe import probe
    from phi3_dist.planning.facts import LaunchFacts
    from phi3_dist.planning.launch_configs import deepspeed_json
    from phi3_dist.planning.plan import make_plan
    from phi3_dist.training.runtime import start_runtime

    world = int(os.environ["WORLD_SIZE"])
    zero = json.loads(deepspeed_json(strategy)) if strategy.startswith("zero") else {}
    values = {
        "model": {"source": str(folder), "precision": "fp32"},
        "data": {"train": "none.jsonl"},
        "train": {"global_batch": world, "micro_batch": 1},
    }
    cfg = RunConfig.model_validate(values)
    facts = LaunchFacts(world, 1, strategy, world, "this benchmark", zero, True, int(os.environ["RANK"]))
    plan = make_plan(cfg, probe(use_cpu=True), facts)
    return cfg, start_runtime(plan, zero, max_grad_norm=1.0, trackers=(), folder=folder)


def _local(param: Any) -> Any:
    """The values of a parameter that this rank holds."""
    if hasattr(param, "ds_tensor"):
        return param.ds_tensor
    return param.to_local() if hasattr(param, "to_local") else param.data


def measured_load(runtime: Any, load: Callable[[], Any]) -> tuple[Any, Load]:
    """The model that `load` gives, and what it took on this rank. Collective."""
    runtime.barrier()
    with PeakPss() as memory:
        start_s = time.perf_counter()
        model = load()
        seconds = time.perf_counter() - start_s
        frozen = [p for p in model.parameters() if not p.requires_grad]
        shards = [_local(p) for p in frozen]
        for shard in shards:
            shard.sum()  # a mapped page counts only when it has been read
    runtime.barrier()  # both ranks have mapped what they share
    held = pss_bytes() - memory.before
    runtime.barrier()
    whole = sum((getattr(p, "ds_numel", None) or p.numel()) * p.element_size() for p in frozen)
    resident = sum(s.numel() * s.element_size() for s in shards)
    return model, Load(whole, resident, memory.rise, held, seconds)


def _ours(strategy: str, folder: Path) -> Load:
    from phi3_dist.modeling.base import find_base
    from phi3_dist.training.build import build_model

    cfg, runtime = start(strategy, folder)
    return measured_load(runtime, lambda: build_model(cfg, find_base(str(folder)), runtime, longest_row=64).model)[1]


def _peer(strategy: str, folder: Path) -> Load:
    """What a user writes by hand: `from_pretrained` on each rank, then the wrapping."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Phi3ForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from phi3_dist.modeling.loss import PackedLoss
    from phi3_dist.training.engines.fsdp2 import shard_fsdp2

    _, runtime = start(strategy, folder)
    # transformers reads inside zero.Init as long as this object lives
    kept = HfDeepSpeedConfig(dict(runtime.ds_config)) if runtime.ds_config else None

    def load() -> Any:
        base = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = PackedLoss(get_peft_model(base, LoraConfig(r=8, target_modules="all-linear")))
        return shard_fsdp2(model, runtime) if strategy == "fsdp2" else model

    found = measured_load(runtime, load)[1]
    del kept
    return found


# --- the side that starts them ----------------------------------------------------------------------------------------


def _run(way: str, strategy: str, folder: Path) -> list[Load]:
    """What the load took on each of two ranks. Raises RuntimeError with the end of the output of a run that failed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "DS_"))}
    env |= {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",  # ninja lies there
    }
    env |= {"DS_ACCELERATOR": "cpu"} if strategy.startswith("zero") else {"ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += ["-m", "phi3_dist.bench.load", "--worker", way, strategy, str(folder), out]
        done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=TIMEOUT_S, check=False)
        if done.returncode:
            raise RuntimeError(f"{way} {strategy} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
        return [Load(**json.loads((Path(out) / f"{rank}.json").read_text())) for rank in range(2)]


def _work(way: str, strategy: str, folder: str, out: str) -> None:
    found = {"ours": _ours, "peer": _peer}[way](strategy, Path(folder))
    (Path(out) / f"{os.environ['RANK']}.json").write_text(json.dumps(asdict(found)))
    import torch.distributed as dist

    dist.destroy_process_group()


def _row(strategy: str, way: str, ranks: list[Load]) -> str:
    def pair(values: list[int]) -> str:
        return " / ".join(f"{value / GIB:5.2f}" for value in values)

    label = "phi3_dist" if way == "ours" else "from_pretrained"
    return (
        f"{strategy:<9} {label:<16} {ranks[0].base / GIB:8.2f} {pair([r.resident for r in ranks]):>15} "
        f"{pair([r.peak_pss for r in ranks]):>15} {pair([r.held_pss for r in ranks]):>15} "
        f"{max(r.seconds for r in ranks):8.1f}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print its table; `--json FILE` also writes its figures."""
    print_in_any_encoding()
    parser = argparse.ArgumentParser(prog="python -m phi3_dist.bench.load", description=__doc__)
    parser.add_argument("--layers", type=int, default=24, help="decoder layers of the base (default 24)")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size, a multiple of 64 (default 1024)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        _work(*options.worker)
        return
    figures: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "base"
        write_base(folder, layers=options.layers, hidden=options.hidden, shard="400MB")
        say("memory in GiB, rank 0 / rank 1")
        say(
            f"{'strategy':<9} {'loaded by':<16} {'base':>8} {'its weights':>15} {'peak PSS':>15} "
            f"{'held PSS':>15}  seconds"
        )
        for strategy in STRATEGIES:
            for way in WAYS:
                ranks = _run(way, strategy, folder)
                figures[f"{strategy}/{way}"] = [asdict(rank) for rank in ranks]
                say(_row(strategy, way, ranks))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
