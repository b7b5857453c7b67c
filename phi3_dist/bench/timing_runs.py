"""Ten run files whose steps are timed on this CPU, and how: each in forked processes, one thread a rank.

Small Phi-3s of random weights in float32; what varies is the model, the pack's length, the adapter's rank, dropout,
accumulation, checkpointing, and the strategy over one process and two.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi3_dist.bench.memory_cells import real_base
from phi3_dist.config.schema import DataConfig, LoraConfig, ModelConfig, RunConfig, TrainConfig
from phi3_dist.family.variants import Shape
from phi3_dist.planning.facts import LaunchFacts, MachineFacts
from phi3_dist.planning.launch_configs import deepspeed_json

__all__ = ["RUNS", "SHAPES", "SUPERVISED", "TimedRun", "launch_of", "time_steps", "timed_machine"]

SUPERVISED = 0.5
SHAPES: Mapping[str, Shape] = {
    "25M": Shape(4, 320, 864, 4, 4, 80, 32064),
    "47M": Shape(6, 480, 1280, 5, 5, 96, 32064),
    "81M": Shape(8, 640, 1728, 8, 8, 80, 32064),
    "134M": Shape(12, 768, 2048, 8, 8, 96, 32064),
}


@dataclass(frozen=True)
class TimedRun:
    """One run file: a model of SHAPES, a launch, and fields of the run file's sections."""

    shape: str = "47M"
    strategy: str = "single"
    world: int = 1
    length: int = 1024
    micro_batch: int = 1
    accumulation: int = 1
    model: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = [self.shape, self.strategy, f"{self.world} rank{'s' * (self.world > 1)}"]
        shown += [f"{self.micro_batch} × {self.length}"]
        shown += [f"accumulation {self.accumulation}"] if self.accumulation > 1 else []
        shown += [f"{key} {value}" for key, value in {**self.model, **self.lora}.items()]
        return ", ".join(shown).replace("activation_checkpointing True", "checkpointing")

    def run(self, source: str = "random") -> RunConfig:
        return RunConfig(
            model=ModelConfig(source=source, **{"precision": "fp32", **self.model}),
            data=DataConfig(train="none", pack_length=self.length),
            lora=LoraConfig(**{"r": 16, "alpha": 32, "dropout": 0.0, **self.lora}),
            train=TrainConfig(
                global_batch=self.micro_batch * self.world * self.accumulation, micro_batch=self.micro_batch
            ),
        )


RUNS = (
    TimedRun("25M", length=256),
    TimedRun("25M", length=2048),
    TimedRun("25M", micro_batch=2, length=256, accumulation=2),
    TimedRun("25M", length=512, lora={"r": 64, "dropout": 0.05}),
    TimedRun("47M", length=512, model={"activation_checkpointing": True}),
    TimedRun("81M", length=256, lora={"r": 4}),
    TimedRun("25M", "ddp", 2, length=512),
    TimedRun("25M", "zero2", 2, length=512),
    TimedRun("25M", "zero3", 2, length=256, accumulation=2),
    TimedRun("47M", "fsdp2", 2, length=512),
)


def launch_of(run: TimedRun) -> LaunchFacts:
    import json

    zero = json.loads(deepspeed_json(run.strategy)) if run.strategy.startswith("zero") else {}
    return LaunchFacts(run.world, 1, run.strategy, zero_settings=zero, use_cpu=True)


def timed_machine(torch: str) -> MachineFacts:
    return MachineFacts("cpu", "this one", 0, 0.0, 64.0, 2, False, "", packages={"torch": torch, "deepspeed": "0"})


def time_steps(run: TimedRun, steps: int, rank: int = 0, port: int = 0) -> dict[str, Any]:
    """Seconds of each step on the clock and on this process's processor, after one that warms up. Collective."""
    import torch

    from phi3_dist.bench.rehearsal import ragged_packs
    from phi3_dist.data.pack_order import Order
    from phi3_dist.modeling.shape_config import config_of_shape
    from phi3_dist.planning.plan import make_plan
    from phi3_dist.training.build import build_model
    from phi3_dist.training.engines.backward_and_update import make_engine
    from phi3_dist.training.runtime import start_runtime
    from phi3_dist.training.train_step import train_step

    torch.set_num_threads(1)
    if run.world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(run.world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(run.world)}
        os.environ |= {"DS_ACCELERATOR": "cpu"} if run.strategy.startswith("zero") else {"ACCELERATE_USE_CPU": "true"}
    wall, cpu = [], []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = config_of_shape(SHAPES[run.shape])
        base = real_base(config, scratch)
        cfg, launch = run.run(str(scratch)), launch_of(run)
        plan = make_plan(cfg, timed_machine(torch.__version__), launch, family_or_shape=config.to_dict())
        zero = launch.zero_settings
        runtime = start_runtime(plan, zero, max_grad_norm=1.0, trackers=(), folder=scratch)
        model = build_model(cfg, base, runtime, longest_row=run.length).model
        engine = make_engine(model, runtime, cfg.optim, cfg.lora.plus_ratio)
        packs = ragged_packs(cfg.train.global_batch, run.length)
        order = Order(len(packs), cfg.train.global_batch, 0, False)
        for step in range(steps + 1):
            began, began_cpu = time.perf_counter(), time.process_time()
            train_step(engine, runtime, packs, order, step, lr=1e-4, seed=0)
            wall.append(time.perf_counter() - began)
            cpu.append(time.process_time() - began_cpu)
        if run.world > 1:
            torch.distributed.destroy_process_group()
    return {"wall_s": wall[1:], "processor_s": cpu[1:]}
