"""A sweep from its file to the ranking: prepare, agree, and round by round build, step, end early, save."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from phi3_dist.config.load import flatten
from phi3_dist.data.prepare import Prepared
from phi3_dist.errors import ConfigError, PlanError, Problem, RunFolderError, TrainingError
from phi3_dist.machine.storage import cache_folder
from phi3_dist.modeling.base import Base
from phi3_dist.modeling.rope import Regime, regime_for
from phi3_dist.modeling.weights_watch import WeightsWatch
from phi3_dist.planning.facts import LaunchFacts, MachineFacts
from phi3_dist.planning.plan import RunPlan
from phi3_dist.sweep.base import load_shared
from phi3_dist.sweep.candidate import CandidateRun, Given
from phi3_dist.sweep.early import Decision, decide, rung_step
from phi3_dist.sweep.file import Candidate, Sweep
from phi3_dist.sweep.forecast import plans_of
from phi3_dist.sweep.joint import JointLoss, install_updates
from phi3_dist.sweep.memory import Sizing, size_sweep
from phi3_dist.sweep.step import joint_step
from phi3_dist.sweep.table import Board, decisions_of
from phi3_dist.training.batch_counts import longest_row, tokens_of_rank
from phi3_dist.training.checkpoints.compatibility import base_fingerprint, identity
from phi3_dist.training.checkpoints.resume_point import find_resume_point
from phi3_dist.training.inputs import find_model, prepare_rows
from phi3_dist.training.monitor.start_clock import StartClock
from phi3_dist.training.preflight.trackers_and_inputs import inputs_of
from phi3_dist.training.process_state import own_process_state
from phi3_dist.training.run_folder import RunFolder, versions
from phi3_dist.training.runtime import Runtime, start_runtime
from phi3_dist.training.same_on_all_ranks import check_same_on_all_ranks
from phi3_dist.training.signals import StopFlag, exit_code_of

__all__ = ["SweepResult", "run_sweep"]


@dataclass(frozen=True)
class SweepResult:
    """What came of a sweep. `best` is the name of the candidate whose adapter lies under best/, or None."""

    folder: Path
    states: Mapping[str, str]
    best: str | None
    stopped_by: int = 0

    @property
    def exit_code(self) -> int:
        if self.stopped_by:
            return exit_code_of(self.stopped_by)
        return 1 if "failed" in self.states.values() else 0


def _plans(sweep: Sweep, base: Base, machine: MachineFacts, launch: LaunchFacts) -> dict[str, RunPlan]:
    """Every candidate's plan. Raises PlanError with all problems; each candidate's by its name."""
    plans = plans_of(sweep, machine, launch, base.config.to_dict())
    # dropout's masks are torch's: Triton's kernels draw theirs for a whole pass, not for a candidate
    return {name: replace(plan, kernels="torch") for name, plan in plans.items()}


def _regime(sweep: Sweep, base: Base, prepared: Mapping[str, Prepared]) -> Regime | None:
    """The one set of LongRoPE's factors that all candidates need. Raises PlanError where they need different ones."""
    if base.config.rope_parameters.get("rope_type") != "longrope":
        return None
    found = {
        one.name: regime_for(base.config, longest_row(prepared[one.name]), one.cfg.model.longrope)
        for one in sweep.candidates
    }
    if len(set(found.values())) > 1:
        what = "would differ between candidates: " + ", ".join(f"{name} {regime}" for name, regime in found.items())
        raise PlanError(Problem("model.longrope", what, "set model.longrope, or make the data alike in length"))
    return next(iter(found.values()))


def _prepare(sweep: Sweep, tokenizer: Any, cache: Path) -> dict[str, Prepared]:
    """The rows of every candidate; those with the same `data` section share them."""
    known: dict[str, Prepared] = {}
    found = {}
    for one in sweep.candidates:
        key = json.dumps(one.cfg.data.model_dump(mode="json"))
        if key not in known:
            known[key] = prepare_rows(one.cfg, tokenizer, cache)
        found[one.name] = known[key]
    return found


def _agreed_facts(
    sweep: Sweep, base: Base, runtime: Runtime, prepared: Mapping[str, Prepared], cache: Path
) -> dict[str, dict[str, Any]]:
    """What each candidate's run is, once all ranks have said that they are in the same sweep. Collective."""
    plan = runtime.plan
    facts: dict[str, dict[str, Any]] = {}
    said: dict[str, str] = {}
    for one in sweep.candidates:
        facts[one.name] = identity(
            one.cfg, prepared[one.name], base, weights="", precision=plan.precision, kernels=plan.kernels
        )
        own = {**flatten(one.cfg.model_dump(mode="json")), **facts[one.name]}
        said |= {f"{one.name}: {key}": str(value) for key, value in own.items()}
    check_same_on_all_ranks(runtime, {**said, **versions()})
    weights = runtime.broadcast(base_fingerprint(base, cache) if runtime.is_main else "")
    return {name: {**own, "base weights": weights} for name, own in facts.items()}


def _agreed(sizing: Sizing, runtime: Runtime) -> Sizing:
    """The smallest of all ranks', whose nodes may differ in memory. Collective."""
    if runtime.world == 1:
        return sizing
    each: list[Sizing] = [sizing] * runtime.world
    torch.distributed.all_gather_object(each, sizing)
    least = min(each, key=lambda one: one.at_once)
    return replace(least, a_pass=min(one.a_pass for one in each))


class _Sweep:
    """A sweep under way on this rank."""

    def __init__(self, sweep: Sweep, runs: Sequence[CandidateRun], board: Board, flag: StopFlag) -> None:
        self.sweep, self.runs, self.board, self.flag = sweep, runs, board, flag

    @property
    def folder(self) -> Path:
        return Path(self.sweep.cfg.save.folder)

    def round(self, runs: Sequence[CandidateRun], given: Given) -> None:
        """Train these candidates to their ends, or to a signal."""
        updates: dict[str, dict[int, Any]] = {}
        for number, run in enumerate(runs):
            for name, update in run.build(number, given).items():
                updates.setdefault(name, {})[number] = update
        install_updates(given.joint.causal_lm, given.joint.present, updates)
        given.watch.loaded(given.joint)
        given.clock.mark("model")
        self.flag.save_first()
        for run in runs:
            self._guarded(run, given, lambda run=run: run.begin(given))
        self._write()
        while waiting := self._waiting(runs, given):
            for run, result in zip(waiting, joint_step(waiting, given), strict=True):
                self._guarded(run, given, lambda run=run, result=result: run.take(result, given))
            self.board.step()
        self._write()

    def _write(self) -> None:
        self.board.write(self.folder)

    def _guarded(self, run: CandidateRun, given: Given, move: Any) -> None:
        """An error of one candidate's numbers or folder ends that candidate. All ranks see the same."""
        try:
            move()
        except (TrainingError, RunFolderError) as error:
            run.fail(f"{error.problems[0].where}: {error.problems[0].what}", given)
            self.board.say(f"{run.name}: failed: {run.why}")

    def _waiting(self, runs: Sequence[CandidateRun], given: Given) -> list[CandidateRun]:
        """Who makes the next step: all that run, or those that are behind where a rung waits for them."""
        early = self.sweep.early
        while True:
            running = [run for run in runs if run.next_step is not None]
            if early.rule == "none" or len(running) <= early.floor:
                return running
            decided = {decision.step for decision in self.board.decisions if set(decision.losses) & _names(runs)}
            every, rung = runs[0].cfg.train.eval_every, 0
            while rung_step(early, every, rung) in decided:
                rung += 1
            step = rung_step(early, every, rung)
            behind = [run for run in running if int(run.next_step or 0) < step]
            if behind or not running:
                return behind
            self._rung(running, step, given)

    def _rung(self, running: Sequence[CandidateRun], step: int, given: Given) -> None:
        losses = {run.name: run.ctx.metrics.held_out.get(step, math.nan) for run in running}
        names = [one.name for one in self.sweep.candidates]
        decision = decide(self.sweep.early, step, losses, names)
        self.board.decisions.append(decision)
        self._write()  # before anyone ends: a kill in between ends the same ones when the sweep goes on
        self.end_early(running, given)

    def end_early(self, running: Sequence[CandidateRun], given: Given) -> None:
        """End those whom a decision ended, with a checkpoint that can go on."""
        for run in running:
            for decision in self.board.decisions:
                if run.name in decision.ended and run.next_step is not None:
                    run.why = decision.why(run.name)
                    self.board.say(f"{run.name}: {run.why}")
                    self._guarded(run, given, lambda run=run: run.take(None, given))


def _names(runs: Sequence[CandidateRun]) -> set[str]:
    return {run.name for run in runs}


def _check_names(sweep: Sweep, revive: Collection[str]) -> None:
    names = {one.name for one in sweep.candidates}
    if unknown := sorted(set(revive) - names):
        fix = f"one of {', '.join(sorted(names))}"
        raise ConfigError(*(Problem("--revive", f"{name} is not a candidate of this sweep", fix) for name in unknown))


@dataclass(frozen=True)
class _Ready:
    """What is known before any process joins another."""

    base: Base
    tokenizer: Any
    watch: WeightsWatch
    plans: Mapping[str, RunPlan]
    prepared: Mapping[str, Prepared]
    regime: Regime | None
    decisions: list[Decision]


def _make_ready(
    sweep: Sweep, machine: MachineFacts, launch: LaunchFacts, cache: Path, clock: StartClock, *, resume: bool
) -> _Ready:
    """Model, plans and rows of every candidate. Raises every mistake that can be seen without a process group."""
    base, tokenizer, _ = find_model(sweep.candidates[0].cfg)
    watch = WeightsWatch(base.folder)
    plans = _plans(sweep, base, machine, launch)
    clock.mark("plan")
    prepared = _prepare(sweep, tokenizer, cache)
    clock.mark("data")
    decisions = decisions_of(Path(sweep.cfg.save.folder)) if resume else []
    return _Ready(base, tokenizer, watch, plans, prepared, _regime(sweep, base, prepared), decisions)


def run_sweep(
    sweep: Sweep,
    machine: MachineFacts,
    launch: LaunchFacts,
    *,
    overwrite: bool = False,
    resume: bool = False,
    revive: Collection[str] = (),
    cache: Path | None = None,
) -> SweepResult:
    """Train every candidate of `sweep` on the processes that `launch` describes. Every rank calls it.

    With `resume` candidates go on from their newest checkpoints, new ones start, finished ones stay; `revive` names
    candidates that ended early and shall go on to their end. Raises the errors of phi3_dist.errors.
    """
    _check_names(sweep, revive)
    cache = cache or cache_folder(sweep.cfg.data.cache)
    with StopFlag() as flag, own_process_state(), ExitStack() as stack:
        clock = StartClock()
        clock.mark("imports")
        folders = {one.name: _folder(one, launch, overwrite=overwrite, resume=resume) for one in sweep.candidates}
        ready = _make_ready(sweep, machine, launch, cache, clock, resume=resume)
        for folder in folders.values():
            if launch.rank == 0:
                folder.reopen() if resume else folder.claim(overwrite=overwrite)
            stack.enter_context(folder.recording_failure(active=launch.rank == 0))
        plan, where = next(iter(ready.plans.values())), Path(sweep.cfg.save.folder)
        runtime = start_runtime(plan, launch.zero_settings, max_grad_norm=1.0, trackers=(), folder=where)
        facts = _agreed_facts(sweep, ready.base, runtime, ready.prepared, cache)
        runs = [
            CandidateRun(one, ready.plans[one.name], ready.prepared[one.name], folders[one.name], facts[one.name])
            for one in sweep.candidates
        ]
        if resume:
            runs = [_found(run, runtime) for run in runs]
        board = Board(sweep, runs, active=runtime.is_main)
        board.decisions = ready.decisions
        going = _going(runs, ready.decisions, revive)
        clock.mark("processes")
        sizing = _agreed(size_sweep(sweep, ready.plans, len(going), machine, launch.ranks_per_node), runtime)
        board.announce(plan, len(going), sizing.at_once, sizing.a_pass, sizing.why)
        with board:
            _rounds(_Sweep(sweep, runs, board, flag), going, sizing, ready, runtime, clock)
        stopped = next((run.stopped_by for run in runs if run.stopped_by), 0)
        best = None if stopped else board.keep_best(where)
        board.write(where)
        board.show()
        runtime.release()
    return SweepResult(where, {run.name: run.state for run in runs}, best.name if best else None, stopped)


def _rounds(  # noqa: PLR0917 -- called in one place
    one: _Sweep,
    going: Sequence[CandidateRun],
    sizing: Sizing,
    ready: _Ready,
    runtime: Runtime,
    clock: StartClock,
) -> None:
    """Candidates that train together, and then the next of them. The base is loaded again for each round."""
    for first in range(0, len(going), sizing.at_once):
        if any(run.stopped_by for run in going):
            return
        members = going[first : first + sizing.at_once]
        joint = _shared_base(one.sweep, ready.base, runtime, members)
        shared = (ready.watch, one.flag, clock, ready.regime, one.board.say)
        one.round(members, Given(runtime, ready.base, ready.tokenizer, joint, sizing.a_pass, *shared))
        del joint
        gc.collect()


def _shared_base(sweep: Sweep, base: Base, runtime: Runtime, members: Sequence[CandidateRun]) -> JointLoss:
    """The base as loaded for the candidates of one round."""
    longest = max(longest_row(run.prepared) for run in members)
    tokens = sum(
        tokens_of_rank(run.prepared.train, run.total * run.order.global_batch, runtime.world) for run in members
    )

    def compute_starts(causal_lm: Any) -> None:
        for run in members:
            run.compute_start(causal_lm, base, runtime)

    joint, _ = load_shared(
        sweep.candidates[0].cfg, base, runtime, longest_row=longest, tokens=tokens, before_changes=compute_starts
    )
    return joint


def _folder(one: Candidate, launch: LaunchFacts, *, overwrite: bool, resume: bool) -> RunFolder:
    folder = RunFolder(Path(one.cfg.save.folder), inputs=inputs_of(one.cfg))
    if launch.rank == 0:
        folder.check(overwrite=overwrite, resume=resume)
    return folder


def _found(run: CandidateRun, runtime: Runtime) -> CandidateRun:
    """The candidate of a sweep that goes on, where it stands: at its start, a checkpoint, or finished. Collective."""
    begin = find_resume_point(runtime, run.folder, run.facts, (), run.cfg.optim)
    run.start = begin.checkpoint
    if begin.finished:
        run.state, run.done = "finished", run.total
    return run


def _going(runs: Sequence[CandidateRun], decisions: Sequence[Decision], revive: Collection[str]) -> list[CandidateRun]:
    """The candidates that still have steps to make; those that ended early stay so unless they are revived."""
    ended = {name: decision for decision in decisions for name in decision.ended if name not in revive}
    for run in runs:
        if run.name in ended and run.state != "finished" and run.start is not None:
            run.state, run.done, run.why = "ended early", run.start.step, ended[run.name].why(run.name)
    return [run for run in runs if run.state == "waiting"]
