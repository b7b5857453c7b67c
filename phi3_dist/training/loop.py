"""The training run: prepare, agree, build, step, save. `train` reads as policy; the pieces live beside it."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from phi3_dist.adapters.card import adapter_card
from phi3_dist.adapters.files import AdapterReceipt, recover, save_adapter
from phi3_dist.adapters.loading import rows_fact
from phi3_dist.config.load import flatten, resolved_yaml
from phi3_dist.config.schema import RunConfig
from phi3_dist.data.batches import Order, Prepared, prepare
from phi3_dist.errors import DataError, Problem, RunFolderError
from phi3_dist.modeling.base import Base, find_base, meta_model
from phi3_dist.modeling.fused_lora import declined
from phi3_dist.modeling.lora import count_parameters, peft_config
from phi3_dist.modeling.rope import pinned_regime
from phi3_dist.modeling.tokenizer import load_tokenizer
from phi3_dist.modeling.tokens import enlarged, new_token_ids
from phi3_dist.planning.plan import Choice, LaunchFacts, MachineFacts, RunPlan, make_plan
from phi3_dist.training.agree import agree
from phi3_dist.training.build import build_model
from phi3_dist.training.checkpoint import Checkpoint, read_state
from phi3_dist.training.evaluate import HeldOut, held_out_loss
from phi3_dist.training.folder import RunFolder, cache_folder, versions
from phi3_dist.training.health import Health
from phi3_dist.training.metrics import Metrics
from phi3_dist.training.outlook import Outlook
from phi3_dist.training.profiling import StepProfile
from phi3_dist.training.readout import EvaluationWatch, Readout
from phi3_dist.training.resume import agree_on_checkpoint, base_fingerprint, check_identity, cut_metrics, identity
from phi3_dist.training.runtime import Runtime, start_runtime
from phi3_dist.training.saving import Saver
from phi3_dist.training.signals import StopFlag
from phi3_dist.training.stage import (
    Stage,
    announce,
    card_facts,
    longest_row,
    measured,
    steps_of_an_evaluation,
    tokens_of_rank,
)
from phi3_dist.training.start import adapter_start
from phi3_dist.training.startup import StartClock, compile_notice
from phi3_dist.training.state import import_state
from phi3_dist.training.step import learning_rate, train_step
from phi3_dist.training.strategy import make_engine
from phi3_dist.training.trackers import check_trackers, finish_trackers, start_trackers
from phi3_dist.training.transcript import Transcript

__all__ = ["EXIT_STOPPED", "TrainResult", "train"]

EXIT_STOPPED = 75
"""Exit code of a run that a signal stopped after its checkpoint: sysexits' EX_TEMPFAIL, start it again."""


@dataclass(frozen=True)
class TrainResult:
    """What came of a run. `receipt` is None on ranks other than 0 and for a run that a signal stopped at `steps`."""

    folder: Path
    steps: int
    held_out: HeldOut | None
    receipt: AdapterReceipt | None
    stopped_by: int = 0

    @property
    def exit_code(self) -> int:
        if self.stopped_by == signal.SIGINT:
            return 128 + signal.SIGINT
        return EXIT_STOPPED if self.stopped_by else 0


def _find(cfg: RunConfig) -> tuple[Base, Any, list[int]]:
    """The base with rows for the new tokens, the tokenizer, and the ids of the new tokens."""
    base = find_base(cfg.model.source, cfg.model.revision)
    peft_config(meta_model(base, torch.float32), cfg.lora, base.source)  # wrong targets are said before all else
    tokenizer = load_tokenizer(cfg.model.tokenizer or cfg.model.source, cfg.model.revision, cfg.model.new_tokens)
    token_ids = new_token_ids(tokenizer, cfg.model.new_tokens, base)
    return enlarged(base, token_ids), tokenizer, token_ids


def _prepare(cfg: RunConfig, tokenizer: Any, cache: Path | None) -> Prepared:
    """Tokenize and pack before the process group exists: a long preparation can time out no collective."""
    prepared = prepare(cfg.data, tokenizer, cache)
    if int(prepared.train.targets.sum()) == 0:
        raise DataError(Problem("data.train", "no token is supervised", "every row needs an assistant turn"))
    return prepared


def _evaluate(stage: Stage, step: int) -> tuple[HeldOut | None, int]:
    """The held-out loss after `step` steps, None without held-out rows; and the signal that broke it off, or 0."""
    if stage.validation is None:
        return None, 0
    watch = EvaluationWatch(stage, step)
    found, stop = held_out_loss(stage.engine, stage.runtime, stage.validation, stage.flag, watch.tell)
    if found is None:
        stage.metrics.say(f"the held-out loss after step {step} was broken off by {signal.Signals(stop).name}")
        return None, stop
    stage.outlook.evaluation_s = found.seconds
    stage.metrics.evaluation(
        {
            "step": step,
            "heldout_loss": found.loss,
            "heldout_perplexity": found.perplexity,
            "supervised_tokens": found.supervised_tokens,
            "eval_s": round(found.seconds, 3),
        }
    )
    return found, 0


def _say_first_step(stage: Stage, step: int) -> None:
    """Where the start's time went, and what turned out otherwise than announced."""
    stage.clock.mark("first step")
    stage.metrics.say(stage.clock.line())
    spans = {f"{name.replace(' ', '_')}_s": round(seconds, 3) for name, seconds in stage.clock.spans_s.items()}
    stage.metrics.note("start", {"step": step, **spans, "total_s": round(stage.clock.total_s, 3)})
    for why, layers in declined(stage.engine.model).items():
        stage.metrics.say(f"note: {layers} LoRA linears ran as PEFT's after all: {why}")


def _evaluation_due(stage: Stage, first: int) -> bool:
    """Whether to measure before step `first` is made: in a new run, and what was broken off before the checkpoint."""
    every = stage.cfg.train.eval_every
    if stage.validation is None or first in {0, stage.total}:
        return True
    return bool(every) and first % every == 0 and not measured(stage, first)


def _steps(stage: Stage, first: int, saver: Saver, health: Health) -> tuple[int, HeldOut | None, int]:
    """Steps `first` to the end, with log rows, held-out losses and checkpoints.

    A new run measures the held-out loss before its first step, too. Returns the steps done, the last held-out loss, and
    the signal that stopped the run or 0.
    """
    cfg, held_out, readout = stage.cfg, None, Readout(stage, health)
    if _evaluation_due(stage, first):
        held_out, stop = _evaluate(stage, first)
        stage.clock.mark("held out")
        if stop or first == stage.total:
            return first, held_out, stop
    for step in range(first, stage.total):
        begun, done = time.perf_counter(), step + 1
        lr = learning_rate(step, stage.total, cfg.optim)
        result = train_step(stage.engine, stage.runtime, stage.train, stage.order, step, lr=lr, seed=cfg.train.seed)
        if stage.profile.step():
            done_as = stage.profile.failed or f"{stage.profile.folder}/table.txt and trace.json.gz"
            stage.metrics.say(f"profile: {done_as}")
        readout.add(done, result, begun)
        evaluate = done == stage.total or bool(cfg.train.eval_every and done % cfg.train.eval_every == 0)
        if evaluate or saver.due(done) or readout.stop or step == first:
            readout.read()
        if step == first:
            _say_first_step(stage, done)
        stop = readout.stop
        if evaluate and not stop:
            found, stop = _evaluate(stage, done)
            held_out = found or held_out
        # nothing is left to stop after the last step but the evaluation that it was to end with
        stop = stop if done < stage.total or stage.validation else 0
        if saver.due(done) or stop:
            saver.save(done, held_out)
            stage.outlook.save_s = saver.stood_s / max(saver.saves, 1)
        if stop:
            return done, held_out, stop
    return stage.total, held_out, 0


def _record_start(folder: RunFolder, stage: Stage, first: int, of_model: tuple[Choice, ...]) -> None:
    plan = replace(stage.runtime.plan, steps=stage.total, choices=(*stage.runtime.plan.choices, *of_model))
    folder.write_json("plan.json", plan.to_dict())
    folder.record_environment()
    folder.forget_exit()
    folder.heartbeat(first)


def _save(
    stage: Stage,
    base: Base,
    tokenizer: Any,
    held_out: HeldOut | None,
    *,
    begun: Mapping[str, Tensor],
    regime: str | None,
) -> AdapterReceipt | None:
    """Write the adapter; one of PiSSA, which `begun` was taken out of the base for, as one for the plain base."""
    receipt = save_adapter(
        stage.engine.model,
        stage.folder.adapter,
        tokenizer=tokenizer,
        card=adapter_card(card_facts(stage, base, held_out, regime)),
        taken_out=begun if stage.cfg.lora.init.startswith("pissa") else None,
        metadata={**({"longrope": regime} if regime else {}), **rows_fact(base)},
    )
    if receipt is not None:
        size = f"{receipt.bytes / 2**20:.1f} MiB, {receipt.tensors} tensors"
        stage.metrics.say(f"adapter: {stage.folder.adapter} ({size})")
    return receipt


def _run(
    cfg: RunConfig,
    base: Base,
    runtime: Runtime,
    *,
    prepared: Prepared,
    tokenizer: Any,
    token_ids: Sequence[int],
    folder: RunFolder,
    facts: dict[str, Any],
    start: Checkpoint | None,
    clock: StartClock,
    keep: Callable[[str], None] | None,
) -> TrainResult:
    """Build, train and save. The wrapped model lives in here alone: see `_release`."""
    where, again = folder.path, start is not None
    start_of = partial(
        adapter_start, cfg, base=base, runtime=runtime, packs=prepared.train, folder=where, resumed=again
    )
    order = Order(len(prepared.train.packs), cfg.train.global_batch, cfg.train.seed, cfg.train.shuffle)
    total = cfg.train.max_steps or order.steps(cfg.train.epochs or 1.0)
    tokens = tokens_of_rank(prepared.train, total * order.global_batch, runtime.world)
    build = partial(build_model, cfg, base, runtime, start_of=start_of, token_ids=token_ids)
    model = build(longest_row=longest_row(prepared), tokens=tokens)
    regime, begun = pinned_regime(model), model.begun
    engine = make_engine(model, runtime, cfg.optim, cfg.lora.plus_ratio)
    first, health_then = 0, {}
    if start is not None:
        first, health_then = start.step, start.trainer.get("health", {})
        import_state(engine, read_state(start), first - health_then.get("skipped", 0))
    clock.mark("model")
    with (
        StopFlag() as flag,
        Metrics(folder.metrics, total, runtime.accelerator, active=runtime.is_main, keep=keep) as metrics,
        StepProfile(cfg.train.profile, folder.path / "profile", active=runtime.is_main) as profile,
    ):
        packs = (prepared.train, prepared.validation)
        outlook = Outlook(cfg, total, evaluation_steps=steps_of_an_evaluation(*packs, order))
        stage = Stage(cfg, runtime, engine, *packs, order, total, metrics, folder, facts, clock, profile, flag, outlook)
        if runtime.is_main:
            _record_start(folder, stage, first, model.choices)
        announce(metrics, runtime.plan, prepared, count_parameters(model), total, of_model=model.choices)
        if start is not None:
            metrics.say(f"resumed after step {first} of {total}, from {start.folder.name}")
        health = Health(stage, health_then)
        saver = Saver(stage, health, start)
        done, held_out, stopped = _steps(stage, first, saver, health)
        saver.report(done)
        if stopped:
            saver.finish()
            metrics.say(f"stopped by {signal.Signals(stopped).name} after step {done}; go on with --resume")
            return TrainResult(folder.path, done, held_out, None, stopped)
        receipt = _save(stage, base, tokenizer, held_out, begun=begun, regime=regime)
        saver.finish()
    return TrainResult(folder.path, total, held_out, receipt)


def _start(cfg: RunConfig, plan: RunPlan, launch: LaunchFacts, folder: RunFolder) -> Runtime:
    """Join the other processes. Says on rank 0 what takes minutes."""
    if launch.rank == 0:
        for line in compile_notice(plan, os.environ):
            _print(line)
    return start_runtime(
        plan,
        launch.zero_settings,
        max_grad_norm=cfg.optim.max_grad_norm,
        trackers=cfg.log.trackers,
        folder=folder.path,
    )


def _print(line: str) -> None:
    Console(soft_wrap=True).print(line, markup=False)


def _record_exit(folder: RunFolder, result: TrainResult) -> None:
    """A run whose adapter or checkpoint is written has ended well, whether or not there is room to say so."""
    try:
        folder.record_exit(result.exit_code, "preempted" if result.stopped_by else "finished")
    except RunFolderError as error:
        _print(f"the run has ended, which could not be recorded: {error.problems[0].where} {error.problems[0].what}")


def _release(runtime: Runtime) -> None:
    """Free the wrapped model before the process group goes.

    DDP's reducer holds the group. Freed after it, its destructor joins gloo's thread while holding the interpreter's
    lock that this thread waits for: the rank never exits (torch 2.13, seen on two nodes of two ranks).
    """
    for line in finish_trackers(runtime):
        _print(line)
    runtime.accelerator.free_memory()
    gc.collect()
    runtime.barrier()
    runtime.accelerator.end_training()


def _agreed_facts(cfg: RunConfig, base: Base, runtime: Runtime, prepared: Prepared, cache: Path) -> dict[str, Any]:
    """What this run is, once all ranks have said that they are in the same one. Collective."""
    config = {key: str(value) for key, value in flatten(cfg.model_dump(mode="json")).items()}
    agree(runtime, {**config, "data": prepared.fingerprint, **versions()})
    weights = base_fingerprint(base, cache) if runtime.is_main else ""
    return identity(cfg, prepared, runtime.broadcast(weights))


def _start_of(
    runtime: Runtime, folder: RunFolder, facts: dict[str, Any], allowed: Collection[str]
) -> Checkpoint | None:
    """The checkpoint that a resumed run goes on from, checked against this run; None: from the start. Collective."""
    found, passed = agree_on_checkpoint(runtime, folder.checkpoints)
    if found is not None:
        check_identity(found.trainer["identity"], facts, allowed)
    if runtime.is_main:
        for line in passed:
            _print(line)
        cut_metrics(folder.metrics, found.step if found else -1)  # -1: what was measured before the first step, too
        recover(folder.adapter)
    return found


def train(
    cfg: RunConfig,
    machine: MachineFacts,
    launch: LaunchFacts,
    *,
    overwrite: bool = False,
    resume: bool = False,
    allow_changed: Collection[str] = (),
    cache: Path | None = None,
    transcript: Transcript | None = None,
) -> TrainResult:
    """Run what `cfg` asks for on the processes that `launch` describes. Every rank calls it.

    With `resume` the run goes on from its newest checkpoint that verifies, or starts where there is none. What
    `transcript` has heard is kept in the run folder.
    Raises the errors of the tree in phi3_dist.errors; a user's mistakes come before the process group exists.
    """
    clock = StartClock()
    clock.mark("imports")
    folder, cache = RunFolder(Path(cfg.save.folder)), cache or cache_folder()
    check_trackers(cfg.log.trackers, launch.rank)
    base, tokenizer, token_ids = _find(cfg)
    plan = make_plan(cfg, machine, launch, family_or_shape=base.config.to_dict())
    clock.mark("plan")
    prepared = _prepare(cfg, tokenizer, cache)
    clock.mark("data")
    if resume and folder.finished():
        return TrainResult(folder.path, 0, None, None)
    if launch.rank == 0:
        folder.reopen() if resume else folder.claim(overwrite=overwrite)
    runtime = _start(cfg, plan, launch, folder)
    with folder.recording_failure(active=runtime.is_main):
        facts = _agreed_facts(cfg, base, runtime, prepared, cache)
        start = _start_of(runtime, folder, facts, allow_changed) if resume else None
        if runtime.is_main:  # the first file: it makes the folder a run's, which --resume can go on in
            folder.write("config.yaml", resolved_yaml(cfg))
        if transcript:
            transcript.into(folder.path, runtime.rank)
        start_trackers(runtime, cfg.log.trackers, project=cfg.log.project, run=cfg.name, folder=folder.path)
        clock.mark("processes")
        result = _run(
            cfg,
            base,
            runtime,
            prepared=prepared,
            tokenizer=tokenizer,
            token_ids=token_ids,
            folder=folder,
            facts=facts,
            start=start,
            clock=clock,
            keep=transcript.line if transcript else None,
        )
        if runtime.is_main:  # before the last barrier: no rank has ended when this stands
            _record_exit(folder, result)
    _release(runtime)
    return result
