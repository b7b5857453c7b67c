"""The training run: prepare, agree, build, step, save. `train` reads as policy; the pieces live beside it."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi3_dist.adapters.card import adapter_card
from phi3_dist.adapters.files import AdapterReceipt, save_adapter
from phi3_dist.adapters.loading import rows_fact
from phi3_dist.config.load import flatten, resolved_yaml
from phi3_dist.config.schema import RunConfig
from phi3_dist.data.batches import Prepared, prepare
from phi3_dist.data.prepare import Progress
from phi3_dist.errors import DataError, Problem
from phi3_dist.modeling.base import Base, find_base, meta_model
from phi3_dist.modeling.fused_lora import declined
from phi3_dist.modeling.lora import count_parameters, peft_config
from phi3_dist.modeling.rope import pinned_regime
from phi3_dist.modeling.tokenizer import load_tokenizer
from phi3_dist.modeling.tokens import enlarged, new_token_ids
from phi3_dist.modeling.watch import WeightsWatch
from phi3_dist.planning.plan import Choice, LaunchFacts, MachineFacts, make_plan
from phi3_dist.training.agree import agree
from phi3_dist.training.build import adapter_values, build_model
from phi3_dist.training.checkpoint import Checkpoint, read_state
from phi3_dist.training.early import check_trackers, inputs_of
from phi3_dist.training.evaluate import HeldOut, held_out_loss
from phi3_dist.training.folder import RunFolder, cache_folder, versions
from phi3_dist.training.going_on import Beginning, find_beginning
from phi3_dist.training.health import Health
from phi3_dist.training.metrics import Metrics
from phi3_dist.training.profiling import StepProfile
from phi3_dist.training.proof import prove_first_step, prove_start
from phi3_dist.training.readout import Readout
from phi3_dist.training.resume import base_fingerprint, identity, order_of, steps_of
from phi3_dist.training.runtime import Runtime, start_runtime
from phi3_dist.training.saving import Saver
from phi3_dist.training.signals import EXIT_STOPPED, StopFlag, exit_code_of
from phi3_dist.training.stage import Stage, announce, card_facts, longest_row, tokens_of_rank
from phi3_dist.training.start import adapter_start
from phi3_dist.training.startup import StartClock
from phi3_dist.training.state import import_state, unrounded_adapter
from phi3_dist.training.step import learning_rate, train_step
from phi3_dist.training.strategy import make_engine

__all__ = ["EXIT_STOPPED", "TrainResult", "find_model", "prepare_rows", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What came of a run. `receipt` is None on ranks other than 0 and for a run that a signal stopped at `steps`."""

    folder: Path
    steps: int
    held_out: HeldOut | None
    receipt: AdapterReceipt | None
    stopped_by: int = 0

    @property
    def state(self) -> str:
        """The word for how it ended, as `phi3-dist runs` shows it: a person's Ctrl-C is no preemption."""
        if self.stopped_by == signal.SIGINT:
            return "interrupted"
        return "preempted" if self.stopped_by else "finished"

    @property
    def exit_code(self) -> int:
        return exit_code_of(self.stopped_by) if self.stopped_by else 0


def find_model(cfg: RunConfig) -> tuple[Base, Any, list[int]]:
    """The base with rows for the new tokens, the tokenizer, and the ids of the new tokens."""
    base = find_base(cfg.model.source, cfg.model.revision)
    peft_config(meta_model(base, torch.float32), cfg.lora, base.source)  # wrong targets are said before all else
    tokenizer = load_tokenizer(cfg.model.tokenizer or cfg.model.source, cfg.model.revision, cfg.model.new_tokens)
    token_ids = new_token_ids(tokenizer, cfg.model.new_tokens, base)
    base = enlarged(base, token_ids)
    if cfg.model.adapter is not None:
        adapter_values(cfg, base, token_ids)
    return base, tokenizer, token_ids


def prepare_rows(
    cfg: RunConfig, tokenizer: Any, cache: Path | None, *, workers: int = 1, progress: Progress | None = None
) -> Prepared:
    """Tokenize and pack before the process group exists: a long preparation can time out no collective."""
    prepared = prepare(cfg.data, tokenizer, cache, workers=workers, progress=progress)
    if int(prepared.train.targets.sum()) == 0:
        raise DataError(Problem("data.train", "no token is supervised", "every row needs an assistant turn"))
    return prepared


def _evaluate(stage: Stage, step: int) -> HeldOut | None:
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


def _say_first_step(stage: Stage, step: int) -> None:
    """Where the start's time went, and what turned out otherwise than announced. Raises PlanError for wrong dtypes."""
    prove_first_step(stage.engine)
    stage.clock.mark("first step")
    stage.metrics.say(stage.clock.line())
    spans = {f"{name.replace(' ', '_')}_s": round(seconds, 3) for name, seconds in stage.clock.spans_s.items()}
    stage.metrics.note("start", {"step": step, **spans, "total_s": round(stage.clock.total_s, 3)})
    if stage.runtime.is_main:
        stage.folder.settle()
    for why, layers in declined(stage.engine.model).items():
        stage.metrics.say(f"note: {layers} LoRA linears ran as PEFT's after all: {why}")


def _steps(
    stage: Stage, first: int, saver: Saver, health: Health, flag: StopFlag, *, watch: WeightsWatch
) -> tuple[int, HeldOut | None, int]:
    """Steps `first` to the end, with log rows, held-out losses and checkpoints.

    Returns the steps done, the last held-out loss, and the signal that stopped the run or 0.
    """
    cfg, held_out, readout = stage.cfg, None, Readout(stage, health, flag)
    for step in range(first, stage.total):
        watch.check()
        begun, done = time.perf_counter(), step + 1
        lr = learning_rate(step, stage.total, cfg.optim)
        result = train_step(stage.engine, stage.runtime, stage.train, stage.order, step, lr=lr, seed=cfg.train.seed)
        if stage.profile.step():
            stage.metrics.say(f"profile: {stage.folder.path / 'profile'}/table.txt and trace.json.gz")
        readout.add(done, result, begun)
        evaluate = done == stage.total or bool(cfg.train.eval_every and done % cfg.train.eval_every == 0)
        if evaluate or saver.due(done) or readout.stop or step == first:
            readout.read()
        if step == first:
            _say_first_step(stage, done)
        if evaluate:
            held_out = _evaluate(stage, done)
        stop = readout.stop if done < stage.total else 0
        if saver.due(done) or stop:
            watch.check()
            saver.save(done, held_out)
        if stop:
            return done, held_out, stop
    if first == stage.total:
        held_out = _evaluate(stage, first)
    return stage.total, held_out, 0


def _record_start(folder: RunFolder, stage: Stage, first: int, of_model: tuple[Choice, ...]) -> None:
    plan = replace(stage.runtime.plan, steps=stage.total, choices=(*stage.runtime.plan.choices, *of_model))
    folder.write_json("plan.json", {**plan.to_dict(), "identity": dict(stage.facts)})
    folder.record_environment()
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
    if moved := stage.folder.moved():
        stage.metrics.say(moved)
    with stage.folder.by_name():
        receipt = save_adapter(
            stage.engine.model,
            stage.folder.held / "adapter",
            tokenizer=tokenizer,
            card=adapter_card(card_facts(stage, base, held_out, regime)),
            base_hint={"revision": stage.cfg.model.revision} if stage.cfg.model.revision else None,
            taken_out=begun if stage.cfg.lora.init.startswith("pissa") else None,
            unrounded=unrounded_adapter(stage.engine, keep=stage.runtime.is_main),
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
    flag: StopFlag,
    watch: WeightsWatch,
) -> TrainResult:
    """Build, train and save. The wrapped model lives in here alone: see `_release`."""
    where, again = folder.held, start is not None
    start_of = partial(
        adapter_start, cfg, base=base, runtime=runtime, packs=prepared.train, folder=where, resumed=again
    )
    order = order_of(cfg, prepared.train)
    total = steps_of(cfg, order)
    tokens = tokens_of_rank(prepared.train, total * order.global_batch, runtime.world)
    build = partial(build_model, cfg, base, runtime, start_of=start_of, token_ids=token_ids)
    with folder.by_name():
        model = build(longest_row=longest_row(prepared), tokens=tokens)
    regime, begun = pinned_regime(model), model.begun
    watch.loaded(model)
    engine = make_engine(model, runtime, cfg.optim, cfg.lora.plus_ratio)
    prove_start(engine, runtime)
    first, health_then = 0, {}
    if start is not None:
        first, health_then = start.step, start.trainer.get("health", {})
        import_state(engine, read_state(start), first - health_then.get("skipped", 0))
    clock.mark("model")
    flag.save_first()
    with (
        Metrics(where / folder.metrics.name, total, runtime.accelerator, active=runtime.is_main) as metrics,
        StepProfile(cfg.train.profile, where / "profile", active=runtime.is_main) as profile,
    ):
        packs = (prepared.train, prepared.validation)
        stage = Stage(cfg, runtime, engine, *packs, order, total, metrics, folder, facts, clock, profile)
        if runtime.is_main:
            _record_start(folder, stage, first, model.choices)
        announce(metrics, runtime.plan, prepared, count_parameters(model), total, of_model=model.choices)
        if start is not None:
            metrics.say(f"resumed after step {first} of {total}, from {start.folder.name}")
        health = Health(stage, health_then)
        saver = Saver(stage, health, start)
        done, held_out, stopped = _steps(stage, first, saver, health, flag, watch=watch)
        saver.report(done)
        if stopped:
            saver.finish()
            metrics.say(f"stopped by {signal.Signals(stopped).name} after step {done}; go on with --resume")
            return TrainResult(folder.path, done, held_out, None, stopped)
        receipt = _save(stage, base, tokenizer, held_out, begun=begun, regime=regime)
        saver.finish()
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


def _agreed_facts(cfg: RunConfig, base: Base, runtime: Runtime, prepared: Prepared, cache: Path) -> dict[str, Any]:
    """What this run is, once all ranks have said that they are in the same one. Collective."""
    facts = identity(cfg, prepared, base, weights="", precision=runtime.plan.precision)
    said = {**flatten(cfg.model_dump(mode="json")), **facts}
    agree(runtime, {**{key: str(value) for key, value in said.items()}, **versions()})
    weights = base_fingerprint(base, cache) if runtime.is_main else ""
    return {**facts, "base weights": runtime.broadcast(weights)}


def train(
    cfg: RunConfig,
    machine: MachineFacts,
    launch: LaunchFacts,
    *,
    overwrite: bool = False,
    resume: bool = False,
    allow_changed: Collection[str] = (),
    cache: Path | None = None,
) -> TrainResult:
    """Run what `cfg` asks for on the processes that `launch` describes. Every rank calls it.

    With `resume` the run goes on from its newest checkpoint that verifies, or starts where there is none.
    Raises the errors of the tree in phi3_dist.errors; a user's mistakes come before the process group exists. A signal
    before the first step raises Stopped.
    """
    with StopFlag() as flag:
        return _train(
            cfg,
            machine,
            launch,
            overwrite=overwrite,
            resume=resume,
            allow_changed=allow_changed,
            cache=cache or cache_folder(cfg.data.cache),
            flag=flag,
        )


def _train(
    cfg: RunConfig,
    machine: MachineFacts,
    launch: LaunchFacts,
    *,
    overwrite: bool,
    resume: bool,
    allow_changed: Collection[str],
    cache: Path,
    flag: StopFlag,
) -> TrainResult:
    clock = StartClock()
    clock.mark("imports")
    folder = RunFolder(Path(cfg.save.folder), inputs=inputs_of(cfg))
    if launch.rank == 0:
        folder.check(overwrite=overwrite, resume=resume)
    check_trackers(cfg.log)
    base, tokenizer, token_ids = find_model(cfg)
    watch = WeightsWatch(base.folder)
    plan = make_plan(cfg, machine, launch, family_or_shape=base.config.to_dict())
    clock.mark("plan")
    prepared = prepare_rows(cfg, tokenizer, cache)
    clock.mark("data")
    if launch.rank == 0:
        folder.reopen() if resume else folder.claim(overwrite=overwrite)
    runtime = start_runtime(
        plan,
        launch.zero_settings,
        max_grad_norm=cfg.optim.max_grad_norm,
        trackers=cfg.log.trackers,
        folder=folder.held,  # tensorboard opens its file anew for each write
    )
    with folder.recording_failure(active=runtime.is_main):
        facts = _agreed_facts(cfg, base, runtime, prepared, cache)
        begin = find_beginning(runtime, folder, facts, allow_changed, cfg.optim) if resume else Beginning()
        if begin.finished:
            _release(runtime)
            return TrainResult(folder.path, 0, None, None)
        if runtime.is_main:  # the first file: it makes the folder a run's, which --resume can go on in
            folder.write("config.yaml", resolved_yaml(cfg))
        runtime.accelerator.init_trackers(cfg.log.project)
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
            start=begin.checkpoint,
            clock=clock,
            flag=flag,
            watch=watch,
        )
        if runtime.is_main:  # before the last barrier: no rank has ended when this stands
            folder.record_exit(result.exit_code, result.state)
    _release(runtime)
    return result
