"""The training run: find, agree, build, step, save. `train` is the outline; each piece is a module beside it.

Read in this order, one step from the command to the update of its weights:

1. this file                       what a run does before its first step and after its last
2. step_loop.py                    the steps in their order, what comes between two of them, and what ends them
3. train_step.py                   one step: its packs, forward and backward of each micro batch, one update
4. engines/backward_and_update.py  clipping and the update under each strategy; a bad step is left out

Once a run: inputs.py and build.py before the steps, final_adapter.py after them. Beside the steps: checkpoints/ saves
and resumes, monitor/ writes what the run says about itself.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from phi3_dist.adapters.files import AdapterReceipt
from phi3_dist.config.load import flatten, resolved_yaml
from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import RunFolderError
from phi3_dist.machine.storage import cache_folder
from phi3_dist.modeling.lora import count_parameters
from phi3_dist.modeling.weights_watch import WeightsWatch
from phi3_dist.planning.facts import LaunchFacts, MachineFacts
from phi3_dist.planning.plan import RunPlan
from phi3_dist.training.batch_counts import (
    longest_row,
    order_of,
    steps_of,
    steps_of_an_evaluation,
    tokens_of_rank,
)
from phi3_dist.training.build import Built, build_model
from phi3_dist.training.checkpoints.compatibility import base_fingerprint, identity
from phi3_dist.training.checkpoints.files import Checkpoint
from phi3_dist.training.checkpoints.resume_point import ResumePoint, find_resume_point
from phi3_dist.training.checkpoints.saver import Saver
from phi3_dist.training.checkpoints.state import restore
from phi3_dist.training.context import RunContext, Session
from phi3_dist.training.engines.backward_and_update import make_engine
from phi3_dist.training.final_adapter import save_final_adapter
from phi3_dist.training.held_out_loss import HeldOut
from phi3_dist.training.inputs import RunInputs, prepare_rows
from phi3_dist.training.monitor.announce import announce, record_start
from phi3_dist.training.monitor.bad_steps import Health
from phi3_dist.training.monitor.metrics import Metrics
from phi3_dist.training.monitor.profiling import StepProfile
from phi3_dist.training.monitor.start_clock import StartClock, compile_notice
from phi3_dist.training.monitor.time_left import TimeLeft
from phi3_dist.training.monitor.trackers import finish_trackers, start_trackers
from phi3_dist.training.monitor.transcript import Transcript
from phi3_dist.training.patience import Patience
from phi3_dist.training.plan_proof import prove_built_dtypes
from phi3_dist.training.preflight.across_ranks import node_view, seen_from_all_nodes
from phi3_dist.training.preflight.base_and_plan import plan_start
from phi3_dist.training.preflight.context_window import context_finding
from phi3_dist.training.preflight.trackers_and_inputs import check_trackers, inputs_of
from phi3_dist.training.process_state import own_process_state
from phi3_dist.training.run_folder import RunFolder, versions
from phi3_dist.training.runtime import Runtime, start_runtime
from phi3_dist.training.same_on_all_ranks import check_same_on_all_ranks
from phi3_dist.training.sample_answers import sample_answers
from phi3_dist.training.sequence_parallel import check_packs
from phi3_dist.training.shared_init import computed_lora_init
from phi3_dist.training.signals import StopFlag, exit_code_of, state_of_stop
from phi3_dist.training.step_loop import run_steps

__all__ = ["TrainResult", "train"]


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
    keep_group: bool = False,
) -> TrainResult:
    """Run what `cfg` asks for on the processes that `launch` describes. Every rank calls it.

    With `resume` the run goes on from its newest checkpoint that verifies, or starts where there is none. What
    `transcript` has heard is kept in the run folder; `keep_group` leaves the process group to a next run.
    Raises the errors of the tree in phi3_dist.errors; a user's mistakes come before the process group exists. A signal
    before the first step raises Stopped.
    """
    options = _CommandOptions(
        overwrite, resume, allow_changed, cache or cache_folder(cfg.data.cache), transcript, keep_group
    )
    with StopFlag() as flag, own_process_state():
        return _train(cfg, machine, launch, options, flag)


@dataclass(frozen=True)
class _CommandOptions:
    """What the command says beside the run file, and where its lines are kept."""

    overwrite: bool
    resume: bool
    allow_changed: Collection[str]
    cache: Path
    transcript: Transcript | None
    keep_group: bool


def _train(
    cfg: RunConfig, machine: MachineFacts, launch: LaunchFacts, options: _CommandOptions, flag: StopFlag
) -> TrainResult:
    clock = StartClock()
    clock.mark("imports")
    folder = RunFolder(Path(cfg.save.folder), inputs=inputs_of(cfg))
    if launch.rank == 0:
        folder.check(overwrite=options.overwrite, resume=options.resume)
    check_trackers(cfg.log, launch.rank)
    planned = plan_start(cfg, machine, launch, os.environ, options.cache, folder.path if options.resume else None)
    for line in planned.lines if launch.rank == 0 else ():
        _print(line)
    cfg, plan, auto, (base, tokenizer, token_ids) = planned.cfg, planned.plan, planned.auto, planned.model
    session = Session(folder, clock, flag, WeightsWatch(base.folder), options.transcript)
    clock.mark("plan")
    inputs = RunInputs(cfg, base, tokenizer, token_ids, prepare_rows(cfg, tokenizer, options.cache))
    check_packs(cfg.train.sequence_parallel, inputs.prepared.train, inputs.prepared.held_out)
    clock.mark("data")
    if launch.rank == 0:
        context = context_finding(cfg, base.config, longest_row(inputs.prepared))
        if context.level != "ok":
            _print(f"context: {context.what}; {context.fix}")
        folder.reopen() if options.resume else folder.claim(overwrite=options.overwrite)
    with folder.recording_failure(active=launch.rank == 0):  # what was to be replaced comes back from here on
        inputs, runtime = auto.agree(inputs, _join_processes(cfg, plan, launch, folder), options.cache)
        cfg = inputs.cfg
        ours = _agreed_identity(inputs, runtime, options.cache)
        _report_nodes(runtime, folder)
        resume_point = ResumePoint()
        if options.resume:
            resume_point = find_resume_point(runtime, folder, ours, options.allow_changed, cfg.optim)
        if resume_point.finished:
            _release(runtime, keep_group=options.keep_group)
            return TrainResult(folder.path, 0, None, None)
        if runtime.is_main:  # the first file: it makes the folder a run's, which --resume can go on in
            folder.write("config.yaml", resolved_yaml(cfg))
        if options.transcript:
            options.transcript.into(folder.held, runtime.rank)
        start_trackers(runtime, cfg.log.trackers, project=cfg.log.project, run=cfg.name, folder=folder.path)
        clock.mark("processes")
        result = _run(inputs, session, runtime, ours, resume_point.checkpoint)
        if runtime.is_main:  # before the last barrier: no rank has ended when this stands
            _record_exit(folder, result)
    _release(runtime, keep_group=options.keep_group)
    return result


def _join_processes(cfg: RunConfig, plan: RunPlan, launch: LaunchFacts, folder: RunFolder) -> Runtime:
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


def _report_nodes(runtime: Runtime, folder: RunFolder) -> None:
    """Say on rank 0 what the nodes see of the run folder, and of the time. Collective where there are several."""
    if runtime.plan.nodes == 1:
        return
    gathered: list[Any] = [None] * runtime.world
    per_node = runtime.world // runtime.plan.nodes
    runtime.barrier()
    torch.distributed.all_gather_object(gathered, node_view(folder.path, runtime.rank // per_node))
    for finding in seen_from_all_nodes(gathered, folder.path) if runtime.is_main else ():
        if finding.level != "ok":
            _print(f"{finding.check}: {finding.what}; {finding.fix}")


def _agreed_identity(inputs: RunInputs, runtime: Runtime, cache: Path) -> dict[str, Any]:
    """What this run is, once all ranks have said that they are in the same one. Collective."""
    cfg, base, plan = inputs.cfg, inputs.base, runtime.plan
    ours = identity(cfg, inputs.prepared, base, weights="", precision=plan.precision, kernels=plan.kernels)
    said = {**flatten(cfg.model_dump(mode="json")), **ours}
    check_same_on_all_ranks(runtime, {**{key: str(value) for key, value in said.items()}, **versions()})
    weights = base_fingerprint(base, cache) if runtime.is_main else ""
    return {**ours, "base weights": runtime.broadcast(weights)}


def _build(inputs: RunInputs, session: Session, runtime: Runtime, *, steps: int, resumed: bool) -> Built:
    """The model with its adapter, not yet wrapped. Collective."""
    cfg, base, packs = inputs.cfg, inputs.base, inputs.prepared.train
    where = session.folder.held

    def lora_init_of(causal_lm: Any) -> dict[str, Any]:
        return computed_lora_init(cfg, causal_lm, base, runtime, packs=packs, folder=where, resumed=resumed)

    with session.folder.by_name():
        built = build_model(
            cfg,
            base,
            runtime,
            longest_row=longest_row(inputs.prepared),
            tokens=tokens_of_rank(packs, steps * cfg.train.global_batch, runtime.world),
            lora_init_of=lora_init_of,
            token_ids=inputs.token_ids,
        )
    session.weights.loaded(built.model)
    return built


def _run(
    inputs: RunInputs, session: Session, runtime: Runtime, ours: Mapping[str, Any], checkpoint: Checkpoint | None
) -> TrainResult:
    """Build, train and save. The wrapped model lives in here alone: see `_release`."""
    cfg, prepared, folder = inputs.cfg, inputs.prepared, session.folder
    order = order_of(cfg, prepared.train)
    total = steps_of(cfg, order)
    built = _build(inputs, session, runtime, steps=total, resumed=checkpoint is not None)
    engine = make_engine(built.model, runtime, cfg.optim, cfg.lora.plus_ratio)
    prove_built_dtypes(engine, runtime)
    first = checkpoint.step if checkpoint else 0
    if checkpoint is not None:
        restore(engine, checkpoint)
    session.clock.mark("model")
    session.flag.save_first()
    where, keep = folder.held, session.transcript.line if session.transcript else None
    with (
        Metrics(where / folder.metrics.name, total, runtime.accelerator, active=runtime.is_main, keep=keep) as metrics,
        StepProfile(cfg.train.profile, where / "profile", active=runtime.is_main) as profile,
    ):
        packs = (prepared.train, prepared.held_out)
        ctx = RunContext(
            cfg,
            runtime,
            engine,
            *packs,
            order,
            total,
            metrics,
            folder,
            ours,
            clock=session.clock,
            profile=profile,
            flag=session.flag,
            time_left=TimeLeft(cfg, total, evaluation_steps=steps_of_an_evaluation(*packs, order)),
            patience=Patience(cfg.train, checkpoint.trainer.get("patience") if checkpoint else None),
            answers=sample_answers(cfg, built.model.causal_lm, inputs.tokenizer, inputs.base.folder, prepared.held_out),
        )
        _announce_start(ctx, inputs, built, first)
        health = Health(ctx, checkpoint.trainer.get("health") if checkpoint else None)
        saver = Saver(ctx, health, checkpoint)
        done, held_out, stopped = run_steps(ctx, first, saver, health, watch=session.weights)
        saver.report(done)
        if stopped:
            saver.finish()
            metrics.say(f"stopped by {signal.Signals(stopped).name} after step {done}; continue with --resume")
            return TrainResult(folder.path, done, held_out, None, stopped)
        steps, held_out = saver.settle_on_final(done, held_out)
        receipt = save_final_adapter(ctx, inputs, built, held_out, steps)
        saver.finish()
    return TrainResult(folder.path, done, held_out, receipt)


def _announce_start(ctx: RunContext, inputs: RunInputs, built: Built, first: int) -> None:
    """To the folder and to the person."""
    if ctx.runtime.is_main:
        record_start(ctx, built.choices, first)
    counts = count_parameters(built.model)
    announce(ctx.metrics, ctx.runtime.plan, inputs.prepared, counts, ctx.total, of_model=built.choices)
    if first:
        ctx.metrics.say(f"resumed after step {first} of {ctx.total}, from step_{first:06d}")


def _print(line: str) -> None:
    Console(soft_wrap=True).print(line, markup=False)


def _record_exit(folder: RunFolder, result: TrainResult) -> None:
    """A run whose adapter or checkpoint is written has ended well, whether or not there is room to say so."""
    try:
        folder.record_exit(result.exit_code, result.state)
    except RunFolderError as error:
        _print(f"the run has ended, which could not be recorded: {error.problems[0].where} {error.problems[0].what}")


def _release(runtime: Runtime, *, keep_group: bool) -> None:
    for line in finish_trackers(runtime):
        _print(line)
    runtime.release(keep_group=keep_group)
