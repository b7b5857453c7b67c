"""The training run: prepare, agree, build, step, save. `train` reads as policy; the pieces live beside it."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_dist.adapters.card import adapter_card
from phi3_dist.adapters.files import AdapterReceipt, save_adapter
from phi3_dist.config.load import config_hash, resolved_yaml
from phi3_dist.config.schema import RunConfig
from phi3_dist.data.batches import Order, Packs, Prepared, prepare
from phi3_dist.errors import DataError, MachineError, Problem, TrainingError
from phi3_dist.modeling.base import Base, find_base
from phi3_dist.modeling.lora import Counts, count_parameters
from phi3_dist.modeling.tokenizer import load_tokenizer
from phi3_dist.planning.plan import LaunchFacts, MachineFacts, RunPlan, make_plan
from phi3_dist.training.agree import agree
from phi3_dist.training.build import build_model
from phi3_dist.training.evaluate import HeldOut, held_out_loss
from phi3_dist.training.folder import RunFolder, versions
from phi3_dist.training.metrics import Metrics
from phi3_dist.training.runtime import Runtime, start_runtime
from phi3_dist.training.step import StepResult, learning_rate, train_step
from phi3_dist.training.strategy import Engine, make_engine

__all__ = ["TrainResult", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What came of a run. `receipt` is None on ranks other than 0."""

    folder: Path
    steps: int
    held_out: HeldOut | None
    receipt: AdapterReceipt | None


@dataclass(frozen=True)
class _Stage:
    """Everything that the steps need and nothing that they change."""

    cfg: RunConfig
    runtime: Runtime
    engine: Engine
    train: Packs
    validation: Packs | None
    order: Order
    total: int
    metrics: Metrics
    folder: RunFolder


def check_trackers(names: tuple[str, ...]) -> None:
    """Raises MachineError for a tracker that Accelerate doesn't know or whose package is missing."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, here = sorted(LOGGER_TYPE_TO_CLASS), {str(getattr(t, "value", t)) for t in get_available_trackers()}
    problems = []
    for name in names:
        if name not in known:
            problems.append(Problem("log.trackers", f"'{name}' is not a tracker", f"one of {', '.join(known)}"))
        elif name not in here:
            problems.append(Problem("log.trackers", f"'{name}' is not installed", f"pip install {name}"))
    if problems:
        raise MachineError(*problems)


def _total_steps(cfg: RunConfig, order: Order) -> int:
    return cfg.train.max_steps or order.steps(cfg.train.epochs or 1.0)


def _prepare(cfg: RunConfig, cache: Path | None) -> tuple[Any, Prepared]:
    """Tokenize and pack before the process group exists: a long preparation can time out no collective."""
    tokenizer = load_tokenizer(cfg.model.tokenizer or cfg.model.source, cfg.model.revision)
    prepared = prepare(cfg.data, tokenizer, cache)
    if int(prepared.train.targets.sum()) == 0:
        raise DataError(Problem("data.train", "no token is supervised", "every row needs an assistant turn"))
    return tokenizer, prepared


def _announce(metrics: Metrics, plan: RunPlan, prepared: Prepared, counts: Counts, total: int) -> None:
    for choice in plan.choices:
        metrics.say(f"{choice.name}: {choice.value} ({choice.why})")
    packs = prepared.train
    metrics.say(
        f"data: {len(packs.rows.lengths):,} rows in {len(packs.packs):,} packs, "
        f"{int(packs.targets.sum()):,} supervised of {len(packs.rows.ids):,} tokens"
    )
    for bad in prepared.skipped:
        metrics.say(f"skipped {bad.place}: {bad.reason}")
    for place in prepared.dropped:
        metrics.say(f"dropped {place}: longer than data.pack_length")
    for notice in prepared.notices:
        metrics.say(f"note: {notice}")
    if len(packs.packs) < plan.global_batch:
        metrics.say(
            f"note: a step takes {plan.global_batch} packs and there are {len(packs.packs)}: "
            "each step sees some rows more than once (a smaller train.global_batch or data.pack_length helps)"
        )
    metrics.say(f"model: {counts}")
    metrics.say(
        f"batch: {plan.global_batch} packs a step = {plan.micro_batch} a forward pass "
        f"x {plan.accumulation} accumulation x {plan.world_size} ranks; {total} steps"
    )


def _log_step(stage: _Stage, step: int, result: StepResult, step_s: float) -> None:
    """Sum the loss over ranks and write the row. Collective."""
    loss = float(stage.runtime.sum(result.nll)) / result.supervised_tokens
    packs = len(stage.train.packs)
    stage.metrics.train(
        {
            "step": step,
            "epoch": round(step * stage.order.global_batch / packs, 4),
            "loss": loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "step_s": round(step_s, 4),
            "supervised_tokens": result.supervised_tokens,
            "tokens": result.tokens,
            "supervised_tokens_per_s": round(result.supervised_tokens / step_s, 1),
            "tokens_per_s": round(result.tokens / step_s, 1),
        }
    )
    if stage.runtime.is_main:
        stage.folder.heartbeat(step)


def _evaluate(stage: _Stage, step: int) -> HeldOut | None:
    if stage.validation is None:
        return None
    found = held_out_loss(stage.engine, stage.runtime, stage.validation)
    stage.metrics.evaluation(
        {
            "step": step,
            "heldout_loss": found.loss,
            "heldout_perplexity": found.perplexity,
            "supervised_tokens": found.supervised_tokens,
            "eval_s": round(found.seconds, 3),
        }
    )
    return found


def _check_first(result: StepResult) -> None:
    """A run whose adapter gets no gradient trains nothing, and its loss still looks like a loss."""
    if not math.isfinite(result.grad_norm):
        raise TrainingError(
            Problem("step 1", f"the gradient norm is {result.grad_norm}", "lower optim.lr, or model.precision=fp32")
        )
    if result.grad_norm == 0:
        raise TrainingError(
            Problem("step 1", "no gradient reaches the adapter", "this is a fault of the set-up: please report it")
        )


def _steps(stage: _Stage) -> HeldOut | None:
    """All steps of the run, with their log rows and held-out losses. Returns the last held-out loss."""
    cfg, held_out = stage.cfg, None
    for step in range(stage.total):
        start = time.perf_counter()
        lr = learning_rate(step, stage.total, cfg.optim)
        result = train_step(stage.engine, stage.runtime, stage.train, stage.order, step, lr=lr, seed=cfg.train.seed)
        done = step + 1
        if step == 0:
            _check_first(result)
        if done % cfg.log.every == 0 or done in {1, stage.total}:
            _log_step(stage, done, result, time.perf_counter() - start)
        if done == stage.total or (cfg.train.eval_every and done % cfg.train.eval_every == 0):
            held_out = _evaluate(stage, done)
    return held_out


def _card_facts(stage: _Stage, base: Base, held_out: HeldOut | None, fingerprint: str) -> Mapping[str, Any]:
    return {
        "name": stage.cfg.name,
        "base": base.source,
        "base_is_local": base.folder is not None and Path(base.source).is_dir(),
        "lora": stage.cfg.lora.model_dump(),
        "optim": stage.cfg.optim.model_dump(),
        "steps": stage.total,
        "global_batch": stage.order.global_batch,
        "pack_length": stage.cfg.data.pack_length,
        "rows": len(stage.train.rows.lengths),
        "supervised_tokens": int(stage.train.targets.sum()),
        "data_fingerprint": fingerprint,
        "strategy": stage.runtime.plan.strategy,
        "world_size": stage.runtime.world,
        "heldout_loss": held_out.loss if held_out else None,
        "heldout_perplexity": held_out.perplexity if held_out else None,
        "versions": versions(),
    }


def _record_start(folder: RunFolder, cfg: RunConfig, plan: RunPlan, total: int) -> None:
    folder.write("config.yaml", resolved_yaml(cfg))
    folder.write_json("plan.json", {**plan.to_dict(), "steps": total})
    folder.record_environment()
    folder.heartbeat(0)


def _run(
    cfg: RunConfig, base: Base, runtime: Runtime, *, prepared: Prepared, tokenizer: Any, folder: RunFolder
) -> TrainResult:
    """Build, train and save. The wrapped model lives in here alone: see `_release`."""
    model = build_model(cfg, base, runtime, longest_row=int(prepared.train.rows.lengths.max()))
    counts = count_parameters(model)
    engine = make_engine(model, runtime, cfg.optim)
    order = Order(len(prepared.train.packs), cfg.train.global_batch, cfg.train.seed, cfg.train.shuffle)
    total = _total_steps(cfg, order)
    if runtime.is_main:
        _record_start(folder, cfg, runtime.plan, total)
    with Metrics(folder.metrics, total, runtime.accelerator, active=runtime.is_main) as metrics:
        stage = _Stage(cfg, runtime, engine, prepared.train, prepared.validation, order, total, metrics, folder)
        _announce(metrics, runtime.plan, prepared, counts, total)
        held_out = _steps(stage)
        card = adapter_card(_card_facts(stage, base, held_out, prepared.fingerprint))
        receipt = save_adapter(engine.model, folder.adapter, tokenizer=tokenizer, card=card)
        if receipt is not None:
            metrics.say(f"adapter: {folder.adapter} ({receipt.bytes / 2**20:.1f} MiB, {receipt.tensors} tensors)")
    return TrainResult(folder.path, total, held_out, receipt)


def _release(runtime: Runtime) -> None:
    """Free the wrapped model before the process group goes.

    DDP's reducer holds the group. Freed after it, its destructor joins gloo's thread while holding the interpreter's
    lock that this thread waits for: the rank never exits (torch 2.13, seen on two nodes of two ranks).
    """
    runtime.accelerator.free_memory()
    gc.collect()
    runtime.barrier()
    runtime.accelerator.end_training()


def train(
    cfg: RunConfig, machine: MachineFacts, launch: LaunchFacts, *, overwrite: bool = False, cache: Path | None = None
) -> TrainResult:
    """Run what `cfg` asks for on the processes that `launch` describes. Every rank calls it.

    Raises the errors of the tree in phi3_dist.errors; a user's mistakes come before the process group exists.
    """
    folder = RunFolder(Path(cfg.save.folder))
    check_trackers(cfg.log.trackers)
    base = find_base(cfg.model.source, cfg.model.revision)
    plan = make_plan(cfg, machine, launch, family_or_shape=base.config.to_dict())
    tokenizer, prepared = _prepare(cfg, cache)
    if launch.rank == 0:
        folder.claim(overwrite=overwrite)
    runtime = start_runtime(
        plan,
        launch.zero_settings,
        max_grad_norm=cfg.optim.max_grad_norm,
        trackers=cfg.log.trackers,
        folder=folder.path,
    )
    agree(runtime, {"config": config_hash(cfg), "data": prepared.fingerprint, **versions()})
    runtime.accelerator.init_trackers(cfg.log.project)
    result = _run(cfg, base, runtime, prepared=prepared, tokenizer=tokenizer, folder=folder)
    _release(runtime)
    if runtime.is_main:
        folder.record_exit(0, "finished")
    return result
