"""Phi-3-mini's real shape, from memory: tokens/s, share of the matrix rate, memory against the plan, its kernels."""

from __future__ import annotations

import cProfile
import gc
import math
import pstats
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import Phi3Config, Phi3ForCausalLM

from phi3_dist.bench.card.checks import Check, Group, Skip
from phi3_dist.bench.scaling import rows_of_length
from phi3_dist.bench.throughput import step_flops
from phi3_dist.bench.throughput_sides import make_token_packs, matrix_flops_per_s
from phi3_dist.config.schema import DataConfig, LoraConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from phi3_dist.data.pack_order import Order
from phi3_dist.errors import PlanError
from phi3_dist.family.variants import Shape
from phi3_dist.machine.probe import probe
from phi3_dist.modeling.base import Base
from phi3_dist.modeling.shape_config import config_of_shape
from phi3_dist.modeling.weights import Weights
from phi3_dist.planning.facts import LaunchFacts
from phi3_dist.planning.memory import total_gib
from phi3_dist.planning.plan import RunPlan, make_plan
from phi3_dist.training.build import build_model
from phi3_dist.training.engines.backward_and_update import make_engine
from phi3_dist.training.runtime import Runtime, start_runtime
from phi3_dist.training.train_step import train_step

__all__ = ["model"]

WARM = 3
TOP_KERNELS = 30
TORCH, TRITON = {"kernels": "torch"}, {"kernels": "triton"}


def mini(layers: int, *, toy: bool) -> Phi3Config:
    """Phi-3-mini-4k's shape with so many layers; a toy of the same form."""
    shape = Shape(layers, 96, 128, 2, 2, 48, 32064) if toy else Shape(layers, 3072, 8192, 32, 32, 96, 32064)
    return config_of_shape(shape, sliding_window=2047)


def random_base(config: Phi3Config, device: torch.device, dtype: torch.dtype) -> Base:
    """A base of random weights that lie on `device` already."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Phi3ForCausalLM(config).named_parameters()}
    state = {
        name: torch.ones(shape, device=device, dtype=dtype)
        if "norm" in name
        else torch.randn(shape, device=device, dtype=dtype).mul_(0.02)
        for name, shape in shapes.items()
    }
    return Base("memory", config, None, Weights({}, state))


@dataclass
class _Bench:
    group: Group

    @cached_property
    def config(self) -> Phi3Config:
        return mini(2 if self.group.cpu else self.group.layers, toy=self.group.cpu)

    @cached_property
    def base(self) -> Base:
        return random_base(self.config, self.group.device, torch.float32 if self.group.cpu else torch.bfloat16)

    @cached_property
    def folder(self) -> Path:
        return Path(tempfile.mkdtemp())

    @cached_property
    def rate(self) -> float:
        """FLOP/s of bf16 products of the base's own sizes at 4,096 tokens."""
        return matrix_flops_per_s(self.config.to_dict(), 256 if self.group.cpu else 4096, cuda=not self.group.cpu)[0]

    @cached_property
    def _runtime(self) -> Runtime:
        return start_runtime(self._first, {}, max_grad_norm=1.0, trackers=(), folder=self.folder)

    def runtime(self, plan: RunPlan) -> Runtime:
        self._first = plan
        return replace(self._runtime, plan=plan)

    def plan(self, length: int, model: Mapping[str, Any], dropout: float, train: Mapping[str, Any]) -> Any:
        cfg = RunConfig(
            model=ModelConfig(source="memory", precision="fp32" if self.group.cpu else "bf16", **model),
            data=DataConfig(train="none", pack_length=length),
            lora=LoraConfig(r=16, alpha=32, dropout=dropout),
            optim=OptimConfig(lr=1e-4, schedule="constant"),
            train=TrainConfig(global_batch=1, micro_batch=1, **train),
        )
        machine, launch = probe(use_cpu=self.group.cpu), LaunchFacts(use_cpu=self.group.cpu)
        try:
            return cfg, make_plan(cfg, machine, launch, family_or_shape=self.config.to_dict())
        except PlanError as error:
            raise Skip("; ".join(p.what for p in error.problems)) from error

    def case(
        self,
        length: int,
        model: Mapping[str, Any] | None = None,
        *,
        dropout: float = 0.05,
        steps: int = 6,
        documents: int | None = None,
        profile: bool = False,
        **train: Any,
    ) -> Check:
        """Steps over packs of `length` tokens: of chats' lengths, or of so many documents of one length."""

        def run() -> dict[str, Any]:
            try:
                return self._measure(length, model or {}, dropout, steps, documents, profile, train)
            finally:
                gc.collect()

        return run

    def _measure(  # noqa: PLR0917 -- called in one place, by `case`
        self,
        length: int,
        model: Mapping[str, Any],
        dropout: float,
        steps: int,
        documents: int | None,
        profile: bool,
        train: Mapping[str, Any],
    ) -> dict[str, Any]:
        group = self.group
        cfg, plan = self.plan(length, model, dropout, train)
        runtime = self.runtime(plan)
        self._forget_memory()
        built = build_model(cfg, self.base, runtime, longest_row=length, tokens=10**9)
        engine = make_engine(built.model, runtime, cfg.optim)
        rows = rows_of_length(length)
        if documents:
            ids = [token for row, _ in rows for token in row]
            size = length // documents
            rows = [(ids[at : at + size], size // 2) for at in range(0, size * documents, size)]
        packs = make_token_packs(rows, length)
        order = Order(len(packs.packs), 1, 0, True)
        times, host, losses = [], [], []
        for step in range(steps + WARM):
            group.sync()
            start = time.perf_counter()
            result = train_step(engine, runtime, packs, order, step, lr=1e-4, seed=0)
            host.append(time.perf_counter() - start)
            group.sync()
            times.append(time.perf_counter() - start)
            losses.append(float(result.nll) / result.supervised_tokens)
        step_s, host_s = (sorted(found[WARM:])[len(found[WARM:]) // 2] for found in (times, host))
        flops = step_flops([len(ids) for ids, _ in rows], result.supervised_tokens, self.config.to_dict())
        found: dict[str, Any] = {
            "ok": all(map(math.isfinite, losses)),
            "tokens": result.tokens,
            "documents": len(rows),
            "step_ms": round(step_s * 1e3, 2),
            "host_ms": round(host_s * 1e3, 2),
            "first_step_s": round(times[0], 2),
            "tokens_per_s": round(result.tokens / step_s),
            "tflops": round(flops / step_s / 1e12, 1),
            "share": round(flops / step_s / self.rate, 3),
            "rate_tflops": round(self.rate / 1e12, 1),
            "losses": [round(loss, 4) for loss in losses[:3]],
            "choices": {c.name: c.value for c in (*plan.choices, *built.choices)},
            "planned_gib": round(total_gib(plan.memory), 2) if plan.memory and not group.cpu else None,
        }
        found |= self._memory()
        if profile:

            def one_step() -> None:
                train_step(engine, runtime, packs, order, 99, lr=1e-4, seed=0)

            found["kernels"], found["ops"] = self._kernels(one_step)
            found["host"] = self._functions(one_step)
        return found

    def _forget_memory(self) -> None:
        if not self.group.cpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _memory(self) -> dict[str, float]:
        if self.group.cpu:
            return {}
        peaks = {"peak_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.max_memory_reserved()}
        return {name: round(size / 2**30, 2) for name, size in peaks.items()}

    def _functions(self, step: Any) -> list[Any]:
        """Name, calls and own milliseconds of the Python functions of one step that take the most of the host's time.

        Those of backward run in a thread of their own, which is not seen.
        """
        self.group.sync()
        seen = cProfile.Profile()
        seen.runcall(step)
        self.group.sync()
        stats: dict[tuple[str, int, str], Any] = pstats.Stats(seen).stats  # type: ignore[attr-defined]
        most = sorted(stats.items(), key=lambda item: -item[1][2])[:TOP_KERNELS]
        return [[f"{Path(file).name}:{line} {name}", s[1], round(s[2] * 1e3, 2)] for (file, line, name), s in most]

    def _kernels(self, step: Any) -> tuple[list[Any], list[Any]]:
        """Name, count and milliseconds of the kernels, and of the host's operations, that take most of one step."""
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU] + ([] if self.group.cpu else [ProfilerActivity.CUDA])
        with profile(activities=kinds) as seen:
            step()
            self.group.sync()

        def most(key: str) -> list[Any]:
            events = sorted(seen.key_averages(), key=lambda event: -getattr(event, key))[:TOP_KERNELS]
            return [[event.key[:80], event.count, round(getattr(event, key) / 1e3, 3)] for event in events]

        return most("self_device_time_total"), most("self_cpu_time_total")


def model(group: Group) -> None:
    bench = _Bench(group)
    if group.cpu:
        group.check("LoRA 256", bench.case(256, profile=True, steps=1))
        group.check("LoRA 256, compiled passes", bench.case(256, {"compile": True}, steps=1))
        return
    group.check("LoRA 4096, as planned", bench.case(4096))
    group.check("LoRA 4096, torch's kernels", bench.case(4096, TORCH))
    group.check("LoRA 4096, Triton's kernels", bench.case(4096, TRITON, profile=True))
    group.check("LoRA 4096, FP8 base", bench.case(4096, {"fp8": True}))
    group.check("LoRA 4096, FP8 base, Triton's kernels", bench.case(4096, {"fp8": True, **TRITON}, profile=True))
    group.check("LoRA 4096, no dropout", bench.case(4096, dropout=0.0))
    group.check("LoRA 4096, no dropout, Triton's kernels", bench.case(4096, TRITON, dropout=0.0))
    group.check("LoRA 4096, not deterministic", bench.case(4096, deterministic=False))
    group.check("LoRA 4096, one document, Triton's kernels", bench.case(4096, TRITON, documents=1))
    group.check("LoRA 2048, Triton's kernels", bench.case(2048, TRITON))
    group.check("LoRA 2048", bench.case(2048))
    checkpointing = {"activation_checkpointing": True}
    group.check("LoRA 8192, activation checkpointing", bench.case(8192, checkpointing, steps=3))
    group.check("LoRA 8192, checkpointing, Triton's kernels", bench.case(8192, {**TRITON, **checkpointing}, steps=3))
    group.check("LoRA 4096, compiled passes", bench.case(4096, {**TORCH, "compile": True}))
    group.check("LoRA 4096, one document", bench.case(4096, documents=1))
    plain = {"fused_lora": False, "fused_layers": False}
    group.check("LoRA 4096, PEFT's and transformers' own forwards", bench.case(4096, plain))
