"""The training run: prepare, agree, build, step, save. `train` reads as policy; the pieces live beside it."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from phi3_dist.adapters.card import adapter_card
from phi3_dist.adapters.files import AdapterReceipt, save_adapter
from phi3_dist.adapters.loading import rows_fact, trained_fact
from phi3_dist.config.load import flatten, resolved_yaml
from phi3_dist.config.schema import RunConfig
from phi3_dist.data.prepare import Prepared, Progress, prepare
from phi3_dist.errors import DataError, Problem, RunFolderError
from phi3_dist.machine.storage import cache_folder
from phi3_dist.modeling.base import Base, find_base, meta_model
from phi3_dist.modeling.lora import count_parameters, peft_config
from phi3_dist.modeling.new_tokens import enlarged, new_token_ids
from phi3_dist.modeling.rope import pinned_regime
from phi3_dist.modeling.tokenizer import load_tokenizer
from phi3_dist.modeling.weights_watch import WeightsWatch
from phi3_dist.planning.facts import Choice, LaunchFacts, MachineFacts
from phi3_dist.planning.plan import RunPlan, make_plan
from phi3_dist.training.batch_counts import longest_row, order_of, steps_of, steps_of_an_evaluation, tokens_of_rank
from phi3_dist.training.build import adapter_values, build_model
from phi3_dist.training.checkpoints.files import Checkpoint, read_state
from phi3_dist.training.checkpoints.identity import base_fingerprint, identity
from phi3_dist.training.checkpoints.resume import ResumePoint, find_resume_point
from phi3_dist.training.checkpoints.saver import Saver
from phi3_dist.training.checkpoints.state import import_state, unrounded_adapter
from phi3_dist.training.context import Stage
from phi3_dist.training.early_checks import check_trackers, inputs_of
from phi3_dist.training.engines.engine import make_engine
from phi3_dist.training.evaluate import HeldOut
from phi3_dist.training.final_adapter import card_contents
from phi3_dist.training.monitor.announce import announce
from phi3_dist.training.monitor.health import Health
from phi3_dist.training.monitor.metrics import Metrics
from phi3_dist.training.monitor.profiling import StepProfile
from phi3_dist.training.monitor.start_clock import StartClock, compile_notice
from phi3_dist.training.monitor.time_left import TimeLeft
from phi3_dist.training.monitor.trackers import finish_trackers, start_trackers
from phi3_dist.training.monitor.transcript import Transcript
from phi3_dist.training.plan_proof import prove_built_dtypes
from phi3_dist.training.run_folder import RunFolder, versions
from phi3_dist.training.run_steps import run_steps
from phi3_dist.training.runtime import Runtime, start_runtime
from phi3_dist.training.same_on_all_ranks import check_same_on_all_ranks
from phi3_dist.training.shared_init import computed_lora_init
from phi3_dist.training.signals import EXIT_STOPPED, StopFlag, exit_code_of, state_of_stop

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
        """The word for how it ended, as `phi3-dist runs` shows it."""
        return state_of_stop(self.stopped_by) if self.stopped_by else "finished"

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


def _record_start(folder: RunFolder, stage: Stage, first: int, of_model: tuple[Choice, ...]) -> None:
    plan = replace(stage.runtime.plan, steps=stage.total, choices=(*stage.runtime.plan.choices, *of_model))
    folder.write_json("plan.json", {**plan.to_dict(), "identity": dict(stage.facts)})
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
    if moved := stage.folder.moved():
        stage.metrics.say(moved)
    with stage.folder.by_name():
        receipt = save_adapter(
            stage.engine.model,
            stage.folder.held / "adapter",
            tokenizer=tokenizer,
            card=adapter_card(card_contents(stage, base, held_out, regime)),
            base_hint={"revision": stage.cfg.model.revision} if stage.cfg.model.revision else None,
            taken_out=begun if stage.cfg.lora.init.startswith("pissa") else None,
            unrounded=unrounded_adapter(stage.engine, keep=stage.runtime.is_main),
            metadata={**({"longrope": regime} if regime else {}), **rows_fact(base), **trained_fact(stage.cfg)},
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
    keep: Callable[[str], None] | None,
) -> TrainResult:
    """Build, train and save. The wrapped model lives in here alone: see `_release`."""
    where, again = folder.held, start is not None
    start_of = partial(
        computed_lora_init, cfg, base=base, runtime=runtime, packs=prepared.train, folder=where, resumed=again
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
    prove_built_dtypes(engine, runtime)
    first, health_then = 0, {}
    if start is not None:
        first, health_then = start.step, start.trainer.get("health", {})
        import_state(engine, read_state(start), first - health_then.get("skipped", 0))
    clock.mark("model")
    flag.save_first()
    with (
        Metrics(where / folder.metrics.name, total, runtime.accelerator, active=runtime.is_main, keep=keep) as metrics,
        StepProfile(cfg.train.profile, where / "profile", active=runtime.is_main) as profile,
    ):
        packs = (prepared.train, prepared.held_out)
        time_left = TimeLeft(cfg, total, evaluation_steps=steps_of_an_evaluation(*packs, order))
        stage = Stage(
            cfg, runtime, engine, *packs, order, total, metrics, folder, facts, clock, profile, flag, time_left
        )
        if runtime.is_main:
            _record_start(folder, stage, first, model.choices)
        announce(metrics, runtime.plan, prepared, count_parameters(model), total, of_model=model.choices)
        if start is not None:
            metrics.say(f"resumed after step {first} of {total}, from {start.folder.name}")
        health = Health(stage, health_then)
        saver = Saver(stage, health, start)
        done, held_out, stopped = run_steps(stage, first, saver, health, watch=watch)
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
        folder=folder.held,  # tensorboard opens its file anew for each write
    )


def _print(line: str) -> None:
    Console(soft_wrap=True).print(line, markup=False)


def _record_exit(folder: RunFolder, result: TrainResult) -> None:
    """A run whose adapter or checkpoint is written has ended well, whether or not there is room to say so."""
    try:
        folder.record_exit(result.exit_code, result.state)
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
    facts = identity(cfg, prepared, base, weights="", precision=runtime.plan.precision, kernels=runtime.plan.kernels)
    said = {**flatten(cfg.model_dump(mode="json")), **facts}
    check_same_on_all_ranks(runtime, {**{key: str(value) for key, value in said.items()}, **versions()})
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
    transcript: Transcript | None = None,
) -> TrainResult:
    """Run what `cfg` asks for on the processes that `launch` describes. Every rank calls it.

    With `resume` the run goes on from its newest checkpoint that verifies, or starts where there is none. What
    `transcript` has heard is kept in the run folder.
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
            transcript=transcript,
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
    transcript: Transcript | None,
) -> TrainResult:
    clock = StartClock()
    clock.mark("imports")
    folder = RunFolder(Path(cfg.save.folder), inputs=inputs_of(cfg))
    if launch.rank == 0:
        folder.check(overwrite=overwrite, resume=resume)
    check_trackers(cfg.log, launch.rank)
    base, tokenizer, token_ids = find_model(cfg)
    watch = WeightsWatch(base.folder)
    plan = make_plan(cfg, machine, launch, family_or_shape=base.config.to_dict())
    clock.mark("plan")
    prepared = prepare_rows(cfg, tokenizer, cache)
    clock.mark("data")
    if launch.rank == 0:
        folder.reopen() if resume else folder.claim(overwrite=overwrite)
    with folder.recording_failure(active=launch.rank == 0):  # what was to be replaced comes back from here on
        runtime = _start(cfg, plan, launch, folder)
        facts = _agreed_facts(cfg, base, runtime, prepared, cache)
        begin = find_resume_point(runtime, folder, facts, allow_changed, cfg.optim) if resume else ResumePoint()
        if begin.finished:
            _release(runtime)
            return TrainResult(folder.path, 0, None, None)
        if runtime.is_main:  # the first file: it makes the folder a run's, which --resume can go on in
            folder.write("config.yaml", resolved_yaml(cfg))
        if transcript:
            transcript.into(folder.held, runtime.rank)
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
            start=begin.checkpoint,
            clock=clock,
            flag=flag,
            watch=watch,
            keep=transcript.line if transcript else None,
        )
        if runtime.is_main:  # before the last barrier: no rank has ended when this stands
            _record_exit(folder, result)
    _release(runtime)
    return result
