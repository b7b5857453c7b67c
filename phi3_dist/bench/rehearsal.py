"""One rehearsal: the steps of a run, as `phi3-dist train` takes them, on fake CUDA tensors of the real shapes."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phi3_dist.bench.counting import Fault, Tally, Wait, Watch
from phi3_dist.bench.fake_device import CAPABILITY, MEMORY_GIB, NAME, fake_cuda, fake_group, install
from phi3_dist.bench.fake_weights import fake_base, fake_quantized_loading
from phi3_dist.bench.throughput_sides import make_token_packs
from phi3_dist.config.schema import RunConfig
from phi3_dist.data.pack.packs import Packs
from phi3_dist.data.pack_order import Order
from phi3_dist.machine.probe import package_versions
from phi3_dist.machine.storage import cache_folder
from phi3_dist.modeling.base import load_full, load_quantized
from phi3_dist.planning.facts import LaunchFacts, MachineFacts
from phi3_dist.planning.launch_configs import deepspeed_json
from phi3_dist.planning.plan import RunPlan, make_plan
from phi3_dist.training.build import build_model
from phi3_dist.training.checkpoints.state import export_state, import_state
from phi3_dist.training.engines.backward_and_update import Engine, make_engine
from phi3_dist.training.plan_proof import prove_built_dtypes, prove_updated_dtypes
from phi3_dist.training.runtime import Runtime, start_runtime
from phi3_dist.training.train_step import train_step

__all__ = ["Report", "import_all", "launch_of", "load_on_host", "machine", "ragged_packs", "rehearse"]

GIB = 2**30


@dataclass(frozen=True)
class Report:
    """What a rehearsal found. Bytes and launches are one rank's in one step, `layer` those of one decoder layer."""

    plan: RunPlan
    phases: Mapping[str, Tally]
    layer: Mapping[str, Tally]
    waits: Mapping[Wait, int]
    faults: Mapping[Fault, int]
    collectives: Mapping[str, int]
    peak_gib: Mapping[str, Mapping[str, float]]
    """For `cuda` and `cpu`: GiB that live at the peak, by kind."""
    held: str
    """The devices of what is trained, its gradients, moments and step counts."""


class _Phases:
    """An engine that tells the watch whether it is in forward, backward or update."""

    def __init__(self, engine: Engine, watch: Watch) -> None:
        self._engine, self._watch = engine, watch
        self.model, self.optimizer = engine.model, engine.optimizer

    def start_micro_batch(self, *, last: bool) -> None:
        self._watch.phase = "forward"
        self._engine.start_micro_batch(last=last)

    def backward(self, loss: Tensor) -> None:
        self._watch.phase, self._watch.section = "backward", ""
        self._engine.backward(loss)
        self._watch.phase, self._watch.section = "step", ""
        self._watch.name_gradients(self.model)

    def update(self, lr: float) -> Tensor:
        self._watch.phase = "update"
        norm = self._engine.update(lr)
        self._watch.phase = "step"
        return norm


def machine(devices: int) -> MachineFacts:
    """A node of the GPU that is played, with this machine's packages."""
    return MachineFacts(
        device="cuda",
        device_name=NAME,
        devices_per_node=devices,
        device_memory_gib=MEMORY_GIB,
        host_memory_gib=1024.0,
        cpu_count=16,
        fast_bf16=True,
        fast_bf16_reason=f"{NAME} is of compute capability {CAPABILITY[0]}.{CAPABILITY[1]}",
        packages=package_versions(),
        capability=CAPABILITY,
    )


def launch_of(strategy: str, world: int) -> LaunchFacts:
    """The launch of a strategy with the shipped DeepSpeed file."""
    zero = json.loads(deepspeed_json(strategy)) if strategy.startswith("zero") else {}
    return LaunchFacts(world_size=world, nodes=1, strategy=strategy, zero_settings=zero)


def import_all() -> None:
    """Import every library before the GPU is there, and let autograd take fake CUDA tensors; for this process."""
    os.environ |= {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": ""}  # a real GPU is left alone
    os.environ.setdefault("ACCELERATE_DISABLE_RICH", "true")
    warnings.simplefilter("ignore")  # of the libraries about what is fake
    logging.disable(logging.WARNING)
    for name in ("peft", "transformers", "bitsandbytes", "deepspeed"):
        if find_spec(name) is not None:
            import_module(name)
    install(cache_folder())


def load_on_host(cfg: RunConfig, config: Any) -> str:
    """Load the base onto the CPU of a machine that has a GPU; the devices that it then lies on."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(fake_cuda(lambda _: None))
        base, host = fake_base(config, scratch / "base"), torch.device("cpu")
        stack.enter_context(fake_quantized_loading(base))
        stack.enter_context(Watch())
        if cfg.model.quantization == "none":
            model = load_full(base, torch.float32, host)
        else:
            model = load_quantized(base, cfg.model.quantization, torch.float32, host)
        found = sorted({param.device.type for param in model.parameters()})
    return f"weights on {' and '.join(found)}"


def ragged_packs(count: int, length: int) -> Packs:
    """Packs of ragged documents, half of whose tokens are supervised."""
    documents = [length // 2, length // 4, length // 8, length // 8]
    packs: Packs = make_token_packs([([5] * tokens, tokens // 2) for tokens in documents] * count, length)
    return packs


class _NoLog:
    """DDP's logger would ask the device for times."""

    def set_runtime_stats_and_log(self) -> None: ...


class _FirstBuckets:
    """DDP's reducer with the buckets of its first step: to lay them out anew it compares lists of all ranks."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def _answer_buckets(model: Any) -> None:
    """Let DDP's own reducer go on after each bucket: the group's ranks that are not there give it no result."""
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return

    def hook(_: object, bucket: Any) -> Any:
        torch.distributed.all_reduce(bucket.buffer())
        done: Any = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    hook.__annotations__.clear()  # DDP compares them with its own classes, and here they are text
    model.register_comm_hook(None, hook)
    wrapped: Any = model
    wrapped.logger, wrapped.reducer = _NoLog(), _FirstBuckets(model.reducer)


def _devices(engine: Engine) -> str:
    """Where what is trained lies: weights, gradients, moments and step counts, in words."""
    found: dict[str, set[str]] = {}
    for param in engine.model.parameters():
        if param.requires_grad:
            found.setdefault("weights", set()).add(param.device.type)
    for state in getattr(engine.optimizer, "state", {}).values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                found.setdefault(name, set()).add(value.device.type)
    return ", ".join(f"{name} on {' and '.join(sorted(devices))}" for name, devices in found.items())


def _steps(engine: Engine, runtime: Runtime, watch: Watch, packs: Packs, global_batch: int) -> tuple[Any, ...]:
    order, phases = Order(len(packs), global_batch, 0, False), _Phases(engine, watch)
    watch.phase = "step"
    train_step(phases, runtime, packs, order, 0, lr=1e-4, seed=0)
    prove_updated_dtypes(engine)
    watch.phase = "resume"
    import_state(engine, export_state(engine, keep=True), 1)
    watch.phase = "step"
    watch.name_tensors(engine.model, engine.optimizer)
    watch.restart()
    train_step(phases, runtime, packs, order, 1, lr=1e-4, seed=0)
    return dict(watch.tallies), dict(watch.collectives), {k: dict(v) for k, v in watch.live.peak.items()}


def rehearse(cfg: RunConfig, config: Any, strategy: str, *, world: int) -> Report:
    """Plan, load, build and step as one rank of `world` under `strategy`; `config` is the base's Phi3Config.

    Raises the errors of phi3_dist.errors, among them PlanError where the plan refuses, and whatever a GPU would stumble
    over.
    """
    watch = Watch(resizes=strategy.startswith(("fsdp2", "zero3")))
    plan = make_plan(cfg, machine(world), launch_of(strategy, world), family_or_shape=config.to_dict())
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(fake_group(world))
        stack.enter_context(fake_cuda(watch.wait))
        base = fake_base(config, scratch / "base")
        cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"source": base.source})})
        stack.enter_context(fake_quantized_loading(base))
        stack.enter_context(watch)
        zero = launch_of(strategy, world).zero_settings
        runtime = start_runtime(plan, zero, max_grad_norm=cfg.optim.max_grad_norm, trackers=(), folder=scratch)
        length = cfg.data.pack_length
        model = build_model(cfg, base, runtime, longest_row=length).model
        layers: nn.ModuleList = model.causal_lm.model.layers
        watch.watch_layer(layers[len(layers) // 2 - 1])
        engine = make_engine(model, runtime, cfg.optim, cfg.lora.plus_ratio)
        prove_built_dtypes(engine, runtime)
        _answer_buckets(engine.model)
        packs = ragged_packs(cfg.train.global_batch, length)
        phases, collectives, peak = _steps(engine, runtime, watch, packs, cfg.train.global_batch)
        held = _devices(engine)
    layer = {name: phases.pop(name) for name in ("layer forward", "layer backward") if name in phases}
    gib = {device: {k: n / GIB for k, n in kinds.items() if n} for device, kinds in peak.items()}
    return Report(plan, phases, layer, Counter(watch.waits), Counter(watch.faults), collectives, gib, held)
