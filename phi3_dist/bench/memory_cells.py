"""The cells of the memory benchmark: which runs, and how each is measured.

On fake CUDA tensors a cell is rank 0's real step (bench/rehearsal.py) with the family's real widths and few layers. On
a CPU it is a real step of a small model, in one process or two. Both count the storages that live (live_bytes.py): not
what a library allocates below torch, nor what an attention kernel borrows inside itself.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phi3_dist.config.schema import DataConfig, LoraConfig, ModelConfig, RunConfig, TrainConfig
from phi3_dist.family.variants import FAMILIES, Shape
from phi3_dist.planning.facts import LaunchFacts, MachineFacts
from phi3_dist.planning.memory import memory_terms, total_gib
from phi3_dist.planning.workload import account, adapter_counts

__all__ = [
    "CPU",
    "GIB",
    "REHEARSED",
    "SHORT",
    "MemoryCell",
    "config_of",
    "free_port",
    "measure_on_cpu",
    "predicted_gib",
    "quietly",
    "real_base",
    "rehearse_cell",
]

GIB = 2**30
SUPERVISED = 0.5
"""Of the tokens of the rehearsal's packs."""


@dataclass(frozen=True)
class MemoryCell:
    """One run. `family` is a name of FAMILIES, or `small` with the shape's numbers; `layers` of them are built."""

    family: str
    strategy: str = "single"
    world: int = 1
    layers: int = 2
    length: int = 2048
    micro_batch: int = 1
    accumulation: int = 1
    quantization: str = "none"
    kernels: str = "torch"
    precision: str = "bf16"
    checkpointing: bool = False
    dropout: float = 0.05
    r: int = 16
    kept: int | None = None
    sharing: int = 1
    """Ranks that share a pack."""
    shape: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)
    """Of a small one: hidden, inner, heads, key heads, vocabulary."""

    def __str__(self) -> str:
        plain = MemoryCell(self.family)
        shown = [self.family, self.strategy, f"{self.world} ranks" if self.world > 1 else "1 rank"]
        shown += [f"{self.layers} layers", f"{self.micro_batch} × {self.length} tokens"]
        if self.family == "small":
            shown.append("×".join(map(str, self.shape)))
        for name in ("quantization", "kernels", "precision", "dropout", "r", "kept", "accumulation", "sharing"):
            if getattr(self, name) != getattr(plain, name):
                shown.append(f"{name} {getattr(self, name)}")
        return ", ".join([*shown, *(["checkpointing"] if self.checkpointing else [])])

    def run(self) -> RunConfig:
        source = next((f.hub_ids[0] for f in FAMILIES if f.name == self.family), "rehearsed")
        return RunConfig(
            model=ModelConfig(
                source=source,
                precision=self.precision,
                quantization=self.quantization,
                kernels=self.kernels,
                activation_checkpointing=self.checkpointing,
                dequantized_layers="auto" if self.kept is None else self.kept,
            ),
            data=DataConfig(train="none", pack_length=self.length),
            lora=LoraConfig(dropout=self.dropout, r=self.r),
            train=TrainConfig(
                global_batch=self.micro_batch * self.world // self.sharing * self.accumulation,
                micro_batch=self.micro_batch,
                sequence_parallel=self.sharing,
            ),
        )


def config_of(cell: MemoryCell) -> Any:
    """The base's Phi3Config."""
    from phi3_dist.bench.rehearse import config_of_source
    from phi3_dist.modeling.shape_config import config_of_shape

    if cell.family != "small":
        config = config_of_source(cell.run().model.source)
        config.num_hidden_layers = cell.layers
        return config
    hidden, inner, heads, kv_heads, vocab = cell.shape
    return config_of_shape(Shape(cell.layers, hidden, inner, heads, kv_heads, hidden // heads, vocab))


def predicted_gib(cell: MemoryCell, machine: MachineFacts, launch: LaunchFacts, config: Any) -> dict[str, float]:
    """GiB by term, with the share of supervised tokens that the cell has; the host's and the device's together."""
    cfg, shape = cell.run(), Shape.of(config.to_dict())
    load, _, _ = account(cfg, machine, launch, shape, precision=cell.precision, kernels=cell.kernels)
    trainable, frozen = adapter_counts(cfg, shape)
    terms = memory_terms(shape, trainable, replace(load, supervised=SUPERVISED), frozen)
    place = "host" if machine.device == "cpu" else "device"
    found: dict[str, float] = {}
    for term in terms:
        if term.place == place:
            found[term.name] = found.get(term.name, 0.0) + term.gib
    assert abs(sum(found.values()) - total_gib(terms, place)) < 1e-9
    return found


def rehearse_cell(cell: MemoryCell) -> dict[str, Any]:
    """The cell on fake CUDA tensors: GiB measured and predicted. For a process that has called `import_all`."""
    from phi3_dist.bench.rehearsal import launch_of, machine, rehearse

    config = config_of(cell)
    report = rehearse(cell.run(), config, cell.strategy, world=cell.world)
    measured = dict(report.peak_gib["cuda"])
    return _result(measured, predicted_gib(cell, machine(cell.world), launch_of(cell.strategy, cell.world), config))


def _result(measured: dict[str, float], predicted: dict[str, float]) -> dict[str, Any]:
    real, planned = sum(measured.values()), sum(predicted.values())
    error = planned / real - 1
    return {
        "measured_gib": real,
        "predicted_gib": planned,
        "error": error,
        "measured": measured,
        "predicted": predicted,
    }


def real_base(config: Any, folder: Path) -> Any:
    """A base of this shape with weights of zeros that are there."""
    import numpy as np
    import torch
    from safetensors.numpy import save_file
    from transformers import Phi3ForCausalLM
    from transformers.initialization import no_init_weights

    from phi3_dist.modeling.base import find_base

    with torch.device("meta"), no_init_weights():
        shapes = {name: param.shape for name, param in Phi3ForCausalLM(config).named_parameters()}
    config.architectures = ["Phi3ForCausalLM"]
    config.save_pretrained(folder)
    draw = np.random.default_rng(0)
    tensors = {name: draw.standard_normal(shape, dtype=np.float32) * 0.02 for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return find_base(str(folder))


def measure_on_cpu(cell: MemoryCell, rank: int = 0, port: int = 0) -> dict[str, Any]:
    """The cell's second step, really run. Of two processes each calls this, with the same free port."""
    import torch

    from phi3_dist.bench.counting import RealWatch
    from phi3_dist.bench.rehearsal import _Phases, ragged_packs
    from phi3_dist.data.pack_order import Order
    from phi3_dist.planning.plan import make_plan
    from phi3_dist.training.build import build_model
    from phi3_dist.training.engines.backward_and_update import make_engine
    from phi3_dist.training.runtime import start_runtime
    from phi3_dist.training.train_step import train_step

    torch.set_num_threads(1)
    if cell.world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(cell.world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    config = config_of(cell)
    host = MachineFacts("cpu", "this one", 0, 0.0, 64.0, 2, False, "", packages={"torch": torch.__version__})
    launch = LaunchFacts(cell.world, 1, cell.strategy)
    cfg, watch = cell.run(), RealWatch(resizes=cell.strategy.startswith("fsdp2"))
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = real_base(config, scratch)
        cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"source": str(scratch)})})
        plan = make_plan(cfg, host, launch, family_or_shape=config.to_dict())
        stack.enter_context(watch)
        runtime = start_runtime(plan, {}, max_grad_norm=1.0, trackers=(), folder=scratch)
        model = build_model(cfg, base, runtime, longest_row=cell.length).model
        engine = make_engine(model, runtime, cfg.optim, cfg.lora.plus_ratio)
        packs = ragged_packs(cfg.train.global_batch, cell.length)
        order, phases = Order(len(packs), cfg.train.global_batch, 0, False), _Phases(engine, watch)
        watch.phase = "step"
        train_step(phases, runtime, packs, order, 0, lr=1e-4, seed=0)
        watch.name_tensors(engine.model, engine.optimizer)
        watch.restart()
        train_step(phases, runtime, packs, order, 1, lr=1e-4, seed=0)
        measured = {kind: size / GIB for kind, size in watch.live.peak["cpu"].items() if size}
        if cell.world > 1:
            torch.distributed.destroy_process_group()
    return _result(measured, predicted_gib(cell, host, launch, config))


def quietly(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """In a forked process: what libraries say there goes nowhere."""
    with Path(os.devnull).open("w") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    return function(*arguments)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rehearsed() -> Iterator[MemoryCell]:
    mini, medium, phi4_mini, phi4 = "mini-4k", "medium-4k", "Phi-4-mini", "Phi-4"
    for family in (mini, medium, phi4_mini, phi4):
        one = MemoryCell(family)
        yield one
        yield replace(one, length=4096, kernels="triton")
        yield replace(one, checkpointing=True)
        yield replace(one, quantization="nf4")
        yield replace(one, quantization="nf4", checkpointing=True, kernels="triton")
        yield replace(one, micro_batch=2, dropout=0.0, length=1024)
        for strategy in ("ddp", "zero1", "zero2", "fsdp2"):
            yield replace(one, strategy=strategy, world=8, layers=2 if strategy[-1] in "p1" else 3)
        # how far ZeRO-3 has fetched ahead differs from layer to layer, and its buffers repeat after some
        yield replace(one, strategy="zero3", world=8, length=4096, layers=6)
        yield replace(one, strategy="zero3", world=8, checkpointing=True, length=4096, layers=8)
        yield replace(one, strategy="fsdp2", world=16, checkpointing=True, kernels="triton")
    one = MemoryCell(mini)
    # all of the model, as fitcheck was fitted on: depth adds up
    yield replace(one, quantization="nf4", checkpointing=True, dropout=0.0, length=1024, layers=32)
    yield replace(one, length=512, accumulation=2, layers=3)
    yield replace(one, length=4096, checkpointing=True, kernels="triton", layers=4)
    yield replace(one, quantization="nf4", kept=2, layers=3)
    yield replace(one, quantization="nf4", kept=2, checkpointing=True)
    yield replace(one, r=64)
    yield replace(one, quantization="int8")
    yield replace(one, strategy="zero2_offload", world=8)
    yield replace(one, strategy="zero3_offload", world=8, layers=4)
    yield replace(one, strategy="zero3", world=64, layers=8)
    yield replace(one, strategy="fsdp2", world=8, quantization="nf4", accumulation=2)
    yield replace(one, strategy="zero3", world=8, quantization="nf4", layers=4)
    yield replace(one, strategy="ddp", world=8, kernels="triton", micro_batch=2, accumulation=2)
    yield replace(one, strategy="zero2", world=8, checkpointing=True)


def _on_cpu() -> Iterator[MemoryCell]:
    small = MemoryCell("small", layers=4, shape=(256, 768, 8, 4, 2000), length=512, precision="fp32", accumulation=2)
    for world, strategy in ((1, "single"), (2, "ddp")):
        one = replace(small, world=world, strategy=strategy)
        yield one
        yield replace(one, dropout=0.0)
        yield replace(one, checkpointing=True)
        yield replace(one, shape=(256, 768, 8, 4, 32064))
        yield replace(one, micro_batch=2)
        yield replace(one, layers=8, r=4)
        yield replace(one, shape=(512, 1024, 8, 8, 4000), length=256)
        yield replace(one, length=1024, accumulation=1)
        yield replace(one, length=1024, checkpointing=True, dropout=0.0)
        yield replace(one, shape=(192, 512, 4, 1, 512), length=2048)
        yield replace(one, precision="bf16")
        yield replace(one, layers=2, micro_batch=4)
    yield replace(small, strategy="fsdp2", world=2)
    yield replace(small, strategy="fsdp2", world=2, checkpointing=True)
    shared = replace(small, strategy="ddp", world=2, sharing=2, length=1024)
    yield shared
    yield replace(shared, dropout=0.0)
    yield replace(shared, checkpointing=True, dropout=0.0)
    yield replace(shared, shape=(256, 768, 8, 4, 32064))
    yield replace(shared, strategy="fsdp2", checkpointing=True)


REHEARSED = tuple(_rehearsed())
CPU = tuple(_on_cpu())
SHORT = (
    replace(CPU[0], layers=3),
    replace(CPU[0], layers=3, checkpointing=True, dropout=0.0),
    replace(CPU[3], layers=2, length=256),
)
"""Those of `make test`: one process, real tensors."""
