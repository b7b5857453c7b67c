"""What one candidate of a sweep has of its own: adapter, optimizer, run folder, and the steps of an ordinary run."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from phi3_dist.config.load import resolved_yaml
from phi3_dist.config.schema import RunConfig
from phi3_dist.data.pack_order import Order
from phi3_dist.data.prepare import Prepared
from phi3_dist.modeling.base import Base, meta_model
from phi3_dist.modeling.dequantize import dense, quant_state_of
from phi3_dist.modeling.lora import add_lora, fill_adapter
from phi3_dist.modeling.loss import PackedLoss
from phi3_dist.modeling.rope import Regime
from phi3_dist.modeling.weights_watch import WeightsWatch
from phi3_dist.planning.plan import RunPlan
from phi3_dist.sweep.file import Candidate
from phi3_dist.sweep.joint import JointLoss, Part
from phi3_dist.sweep.peft_rows import Update, row_norms
from phi3_dist.training.batch_counts import order_of, steps_of, steps_of_an_evaluation
from phi3_dist.training.build import Built, adapter_values
from phi3_dist.training.checkpoints.files import Checkpoint
from phi3_dist.training.checkpoints.metrics_rows import rows_of_kind
from phi3_dist.training.checkpoints.saver import Saver
from phi3_dist.training.checkpoints.state import restore
from phi3_dist.training.context import RunContext
from phi3_dist.training.engines.backward_and_update import TorchEngine
from phi3_dist.training.engines.optimizer import make_optimizer
from phi3_dist.training.final_adapter import save_final_adapter
from phi3_dist.training.first_step_proof import FirstStepProof
from phi3_dist.training.held_out_loss import HeldOut
from phi3_dist.training.inputs import RunInputs
from phi3_dist.training.monitor.announce import record_start
from phi3_dist.training.monitor.bad_steps import Health
from phi3_dist.training.monitor.metrics import Metrics
from phi3_dist.training.monitor.profiling import StepProfile
from phi3_dist.training.monitor.start_clock import StartClock
from phi3_dist.training.monitor.time_left import TimeLeft
from phi3_dist.training.patience import Patience
from phi3_dist.training.plan_proof import prove_built_dtypes
from phi3_dist.training.run_folder import RunFolder
from phi3_dist.training.runtime import Runtime
from phi3_dist.training.shared_init import computed_lora_init
from phi3_dist.training.signals import StopFlag, exit_code_of, state_of_stop
from phi3_dist.training.step_loop import Steps, steps_in_order

__all__ = ["CandidateMetrics", "CandidateRun", "CandidateView", "Given", "build_adapter", "updates_of"]


def build_adapter(
    cfg: RunConfig, base: Base, runtime: Runtime, causal_lm: Any, start: Mapping[str, Tensor] | None = None
) -> PackedLoss:
    """The PEFT model of one candidate: its adapter has values and lies on the device, its base has none.

    The adapter is whole on every rank, also where the base, `causal_lm`, is sharded; under a strategy that offloads it
    lies on the host, and so do its gradients and moments. `start`: what `lora.init` computed. Collective.
    """
    device = torch.device("cpu") if runtime.plan.strategy.endswith("offload") else runtime.device
    values = adapter_values(cfg, base, ()) if cfg.model.adapter else None
    model = PackedLoss(add_lora(meta_model(base, runtime.dtype), cfg.lora, base.source))
    for full_name, param in list(model.named_parameters()):
        if ".lora_" in full_name:
            owner, _, name = full_name.rpartition(".")
            made = nn.Parameter(torch.empty_like(param, device=device), requires_grad=param.requires_grad)
            setattr(model.get_submodule(owner), name, made)
    if cfg.lora.dora:
        _start_magnitudes(model, causal_lm, runtime)
    fill_adapter(model, cfg.train.seed, values, start)
    model.train()
    return model


def _start_magnitudes(model: PackedLoss, causal_lm: Any, runtime: Runtime) -> None:
    """DoRA's magnitudes: the norms of the base's rows, each rank all of them. Collective under FSDP2."""
    for name, layer in model.causal_lm.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        linear = causal_lm.get_submodule(name)
        weight: Any = linear.weight
        if hasattr(weight, "full_tensor"):  # a run of its own takes them of its shards, in float32
            norms = row_norms(weight.full_tensor().float())
        else:
            norms = row_norms(dense(weight, quant_state_of(linear), runtime.dtype))
        with torch.no_grad():
            layer.lora_magnitude_vector["default"].weight.copy_(norms)


def updates_of(adapter: PackedLoss) -> dict[str, Update]:
    """The LoRA of each linear, by the linear's name in the base."""
    found = {}
    for name, layer in adapter.causal_lm.named_modules():
        if isinstance(layer, LoraLayer):
            dropout = layer.lora_dropout["default"]
            drop = float(dropout.p) if isinstance(dropout, nn.Dropout) else 0.0
            pair = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            magnitudes = layer.lora_magnitude_vector
            magnitude = magnitudes["default"].weight if "default" in magnitudes else None
            found[name] = Update(*pair, float(layer.scaling["default"]), drop, magnitude)
    return found


class CandidateView(nn.Module):
    """A candidate as an ordinary model: its adapter's names, and a forward that runs the shared base for it alone."""

    def __init__(self, number: int, adapter: PackedLoss, joint: JointLoss, runtime: Runtime) -> None:
        super().__init__()
        self.adapter = adapter
        self._number, self._runtime = number, runtime
        self._joint = (joint,)  # in a tuple: its parameters are no candidate's

    def forward(self, **batch: Any) -> Tensor:
        """The summed negative log likelihood of a batch, as `PackedLoss` gives it. Without dropout's generator."""
        (joint,) = self._joint
        joint.present.set([Part(self._number, batch)], self._runtime.device)
        with self._runtime.accelerator.autocast():
            nll: Tensor = joint(**batch)[0]
        return nll.float()

    def train(self, mode: bool = True) -> CandidateView:
        super().train(mode)
        self._joint[0].train(mode)
        return self


class _Engine(TorchEngine):
    """`TorchEngine` of an adapter that is whole on every rank: its gradients are added up here, once a step."""

    def __init__(self, view: nn.Module, optimizer: torch.optim.Optimizer, runtime: Runtime, max_grad_norm: float):
        super().__init__(view, optimizer, 1, max_grad_norm)
        self._runtime = runtime

    def update(self, lr: float) -> Tensor:
        if self._runtime.world > 1:
            grads = [param.grad for param in self.params if param.grad is not None]
            flat = torch.cat([grad.reshape(-1) for grad in grads]).to(self._runtime.device)
            self._runtime.sum(flat)
            sizes = [grad.numel() for grad in grads]
            for grad, part in zip(grads, torch.split(flat, sizes), strict=True):
                grad.copy_(part.view_as(grad))
        return super().update(lr)


class CandidateMetrics(Metrics):
    """metrics.jsonl of one candidate; what a person sees is the sweep's table, and lines with the candidate's name."""

    def __init__(self, path: Path, total: int, name: str, tell: Callable[[str], None], *, active: bool) -> None:
        super().__init__(path, total, _NoTracker(), active=active)
        self._progress = None
        self._name, self._tell_person = name, tell
        self.loss = math.nan
        self.held_out: dict[int, float] = {}
        for row in rows_of_kind(path, "eval"):
            if isinstance(row.get("heldout_loss"), int | float):
                self.held_out[int(row["step"])] = float(row["heldout_loss"])

    def say(self, text: str) -> None:
        if self.active:
            self._tell_person(f"{self._name}: {text}")

    def train(self, row: dict[str, Any], left_s: float) -> None:
        self.loss = float(row["loss"])
        super().train(row, left_s)

    def evaluation(self, row: dict[str, Any]) -> None:
        self.held_out[int(row["step"])] = float(row["heldout_loss"])
        super().evaluation(row)

    def _show_step(self, row: dict[str, Any], left_s: float) -> None:
        """Nothing: the table says how far all are."""

    def _show_evaluation(self, row: dict[str, Any]) -> None:
        """Nothing: the table has it."""

    def evaluating(self, share: float, left_s: float) -> None:
        """Nothing: the table says how far all are."""


class _NoTracker:
    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Nothing."""


def _last(path: Path, kind: str, key: str) -> float:
    """The newest number of that kind in metrics.jsonl, or nan."""
    values = [row.get(key) for row in rows_of_kind(path, kind)]
    last = values[-1] if values else None
    return float(last) if isinstance(last, int | float) else math.nan


@dataclass(frozen=True)
class Given:
    """What the sweep gives each of its candidates."""

    runtime: Runtime
    base: Base
    tokenizer: Any
    joint: JointLoss
    a_pass: int
    """Candidates that share a forward pass."""
    watch: WeightsWatch
    flag: StopFlag
    clock: StartClock
    regime: Regime | None
    tell: Callable[[str], None]


@dataclass
class CandidateRun:
    """A candidate while it runs. `next_step` is the step it waits to make, None once it has ended."""

    candidate: Candidate
    plan: RunPlan
    prepared: Prepared
    folder: RunFolder
    facts: Mapping[str, Any]
    start: Checkpoint | None = None
    computed: Mapping[str, Tensor] = field(default_factory=dict)
    """What `lora.init` computed, by saved name; empty for the default."""
    state: str = "waiting"
    why: str = ""
    next_step: int | None = None
    done: int = 0
    held_out: HeldOut | None = None
    stopped_by: int = 0
    ctx: Any = None
    engine: Any = None
    proof: Any = None
    number: int = -1
    _steps: Steps | None = None
    _ended_early: bool = False
    _stack: ExitStack = field(default_factory=ExitStack)

    @property
    def name(self) -> str:
        return self.candidate.name

    @property
    def cfg(self) -> RunConfig:
        return self.candidate.cfg

    @cached_property
    def order(self) -> Order:
        return order_of(self.cfg, self.prepared.train)

    @cached_property
    def total(self) -> int:
        return steps_of(self.cfg, self.order)

    def losses(self) -> tuple[float, float]:
        """The newest training loss and the newest held-out loss, nan where there is none."""
        if self.ctx is None:
            path = self.folder.metrics
            return _last(path, "train", "loss"), _last(path, "eval", "heldout_loss")
        known = self.ctx.metrics.held_out
        return self.ctx.metrics.loss, known[max(known)] if known else math.nan

    def compute_start(self, causal_lm: Any, base: Base, runtime: Runtime) -> None:
        """What `lora.init` computes from the base as it was loaded. Collective."""
        packs, folder = self.prepared.train, self.folder.held
        self.computed = computed_lora_init(
            self.cfg, causal_lm, base, runtime, packs=packs, folder=folder, resumed=self.start is not None
        )

    def build(self, number: int, given: Given) -> dict[str, Update]:
        """Adapter and optimizer, at the start or as the checkpoint has them; the updates that the base is to apply."""
        runtime = replace(given.runtime, plan=self.plan)
        adapter = build_adapter(self.cfg, given.base, runtime, given.joint.causal_lm, self.computed)
        view = CandidateView(number, adapter, given.joint, runtime)
        optimizer = make_optimizer(adapter, self.cfg.optim, runtime.device, self.cfg.lora.plus_ratio)
        self.number, self.engine = number, _Engine(view, optimizer, runtime, self.cfg.optim.max_grad_norm)
        if self.start is not None:
            restore(self.engine, self.start)
        prove_built_dtypes(self.engine, runtime)
        return updates_of(adapter)

    def begin(self, given: Given) -> None:
        """Open the folder's files, measure what is to be measured before the first step, and wait for it."""
        runtime, where = replace(given.runtime, plan=self.plan), self.folder.held
        path = where / self.folder.metrics.name
        metrics = CandidateMetrics(path, self.total, self.name, given.tell, active=runtime.is_main)
        self._stack.enter_context(metrics)
        profile = self._stack.enter_context(StepProfile(0, where / "profile", active=False))
        packs = (self.prepared.train, self.prepared.held_out)
        time_left = TimeLeft(self.cfg, self.total, evaluation_steps=steps_of_an_evaluation(*packs, self.order))
        self.ctx = RunContext(
            self.cfg,
            runtime,
            self.engine,
            *packs,
            self.order,
            self.total,
            metrics,
            self.folder,
            self.facts,
            clock=given.clock,
            profile=profile,
            flag=given.flag,
            time_left=time_left,
            patience=Patience(self.cfg.train, self.start.trainer.get("patience") if self.start else None),
        )
        self.proof = FirstStepProof(self.ctx, alone=False)
        first = self.start.step if self.start else 0
        if runtime.is_main:
            self.folder.write("config.yaml", resolved_yaml(self.cfg))
            record_start(self.ctx, (), first)
        health = Health(self.ctx, self.start.trainer.get("health") if self.start else None)
        self._saver = Saver(self.ctx, health, self.start)
        self._steps = steps_in_order(self.ctx, first, self._saver, health, watch=given.watch)
        self.state, self.done = "running", first
        self._advance(next, given)

    def take(self, result: Any, given: Given) -> None:
        """What came of the step that this candidate waited for; None ends it with a checkpoint."""
        self._ended_early = result is None
        self._advance(lambda steps: steps.send(result), given)

    def _advance(self, move: Callable[[Any], int], given: Given) -> None:
        assert self._steps is not None
        try:
            self.next_step = move(self._steps)
            self.done = self.next_step
        except StopIteration as end:
            self.next_step = None
            self.done, held_out, self.stopped_by = end.value
            self.held_out = held_out or self.held_out
            self._finish(given)

    def _finish(self, given: Given) -> None:
        """Save what there is to save, and record how it ended."""
        self._saver.report(self.done)
        if self.stopped_by:
            self.state = state_of_stop(self.stopped_by)
            self.why = f"stopped by {signal.Signals(self.stopped_by).name} after step {self.done}"
        elif self._ended_early:
            self.state = "ended early"
        else:
            self.state = "finished"
            steps, self.held_out = self._saver.settle_on_final(self.done, self.held_out)
            inputs = RunInputs(self.cfg, given.base, given.tokenizer, (), self.prepared)
            built = Built(self.engine.model.adapter, (), self.computed, given.regime)
            save_final_adapter(self.ctx, inputs, built, self.held_out, steps)
        self._saver.finish()
        if given.runtime.is_main:
            self.folder.record_exit(exit_code_of(self.stopped_by) if self.stopped_by else 0, self.state)
        self.close()

    def fail(self, why: str, given: Given) -> None:
        """An error of this candidate alone: the others go on."""
        self.state, self.why, self.next_step = "failed", why, None
        if given.runtime.is_main:
            self.folder.record_exit(1, "failed")
        self.close()

    def close(self) -> None:
        self._stack.close()
