"""The steps of a run in their order: log rows, held-out losses, checkpoints, and what a signal ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Generator
from dataclasses import replace

from phi3_dist.modeling.fused_lora import declined
from phi3_dist.modeling.weights_watch import WeightsWatch
from phi3_dist.training.checkpoints.metrics_rows import measured
from phi3_dist.training.checkpoints.saver import Saver
from phi3_dist.training.context import RunContext
from phi3_dist.training.engines.backward_and_update import Engine
from phi3_dist.training.first_step_proof import FirstStepProof
from phi3_dist.training.held_out_loss import HeldOut, held_out_loss
from phi3_dist.training.learning_rate import learning_rate
from phi3_dist.training.monitor.bad_steps import Health
from phi3_dist.training.monitor.readout import EvaluationWatch, StepReadout, has_row
from phi3_dist.training.monitor.step_phases import TimedEngine
from phi3_dist.training.plan_proof import prove_updated_dtypes
from phi3_dist.training.train_step import StepResult, train_step

__all__ = ["Steps", "run_steps", "steps_in_order"]


def _evaluate(ctx: RunContext, step: int) -> tuple[HeldOut | None, int]:
    """The held-out loss after `step` steps, None without held-out rows; and the signal that broke it off, or 0."""
    if ctx.held_out is None:
        return None, 0
    watch = EvaluationWatch(ctx, step)
    found, stop = held_out_loss(ctx.engine, ctx.runtime, ctx.held_out, ctx.flag, watch.progress)
    if found is None:
        ctx.metrics.say(f"the held-out loss after step {step} was interrupted by {signal.Signals(stop).name}")
        return None, stop
    answered: dict[str, float | int] = {}
    if ctx.answers is not None:
        scores, stop = ctx.answers.scores(ctx.engine, ctx.runtime, ctx.flag)
        if scores is None:
            ctx.metrics.say(f"the answers after step {step} were interrupted by {signal.Signals(stop).name}")
            return None, stop
        answered = scores
    ctx.time_left.evaluation_s = found.seconds + float(answered.get("answers_s", 0))
    ctx.patience.saw(step, found.loss)
    ctx.metrics.evaluation(
        {
            "step": step,
            "heldout_loss": found.loss,
            "heldout_perplexity": found.perplexity,
            "supervised_tokens": found.supervised_tokens,
            "eval_s": round(found.seconds, 3),
            **answered,
        }
    )
    return found, 0


def _say_first_step(ctx: RunContext, step: int) -> None:
    """Where the start's time went, and what turned out otherwise than announced. Raises PlanError for wrong dtypes."""
    prove_updated_dtypes(ctx.engine)
    ctx.clock.mark("first step")
    ctx.metrics.say(ctx.clock.line())
    spans = {f"{name.replace(' ', '_')}_s": round(seconds, 3) for name, seconds in ctx.clock.spans_s.items()}
    ctx.metrics.note("start", {"step": step, **spans, "total_s": round(ctx.clock.total_s, 3)})
    if ctx.runtime.is_main:
        ctx.folder.drop_replaced_run()
    for why, layers in declined(ctx.engine.model).items():
        ctx.metrics.say(f"note: {layers} LoRA linears fell back to PEFT's forward: {why}")


def _evaluation_due(ctx: RunContext, first: int) -> bool:
    """Whether to measure before step `first` is made: in a new run, and what was broken off before the checkpoint."""
    every = ctx.cfg.train.eval_every
    if ctx.held_out is None or first in {0, ctx.total}:
        return True
    return bool(every) and first % every == 0 and not measured(ctx, first)


Steps = Generator[int, StepResult | None, tuple[int, HeldOut | None, int]]
"""Yields the step to make (from 0), is sent what came of it, and returns the steps done, the last held-out loss and the
stop signal or 0. Sent None in place of a result it writes a checkpoint and ends."""


def steps_in_order(ctx: RunContext, first: int, saver: Saver, health: Health, *, watch: WeightsWatch) -> Steps:
    """Steps `first` to the end, with log rows, held-out losses and checkpoints; who drives it makes the steps.

    A new run measures the held-out loss before its first step, too.
    """
    cfg, held_out, readout = ctx.cfg, None, StepReadout(ctx, health)
    if _evaluation_due(ctx, first):
        held_out, stop = _evaluate(ctx, first)
        ctx.clock.mark("held out")
        if stop or first == ctx.total:
            return first, held_out, stop
    if ctx.patience.exhausted():
        ctx.metrics.say(ctx.patience.line(first))
        return first, held_out, 0
    found = held_out
    for step in range(first, ctx.total):
        watch.check()
        start_s, done = time.perf_counter(), step + 1
        result = yield step
        if result is None:
            saver.save(step, found)
            return step, held_out, 0
        if ctx.profile.step():
            done_as = ctx.profile.failed or f"{ctx.folder.path / 'profile'}/table.txt and trace.json.gz"
            ctx.metrics.say(f"profile: {done_as}")
        readout.add(done, result, start_s)
        evaluate = done == ctx.total or bool(cfg.train.eval_every and done % cfg.train.eval_every == 0)
        if evaluate or saver.due(done) or readout.stop or step == first:
            readout.read()
        if step == first:
            _say_first_step(ctx, done)
        stop, found = readout.stop, None
        if evaluate and not stop:
            found, stop = _evaluate(ctx, done)
            held_out = found or held_out
        early = ctx.patience.exhausted() and done < ctx.total
        # nothing is left to stop after the last step but the evaluation that it was to end with
        stop = stop if done < ctx.total or ctx.held_out else 0
        if saver.due(done, found, early=early) or stop:
            watch.check()
            saver.save(done, found)
            ctx.time_left.save_s = saver.stood_s / max(saver.saves, 1)
        if stop:
            return done, held_out, stop
        if early:
            ctx.metrics.note("early_stop", {"step": done})
            ctx.metrics.say(ctx.patience.line(done))
            return done, held_out, 0
    return ctx.total, held_out, 0


def _make_step(ctx: RunContext, engine: Engine, step: int, lr: float) -> StepResult:
    """Step `step`, its parts timed where it gets a row."""
    seed, timed = ctx.cfg.train.seed, TimedEngine(engine, ctx.runtime.device) if has_row(ctx, step + 1) else None
    result = train_step(timed or engine, ctx.runtime, ctx.train, ctx.order, step, lr=lr, seed=seed)
    return replace(result, seconds=timed.seconds) if timed else result


def run_steps(
    ctx: RunContext, first: int, saver: Saver, health: Health, *, watch: WeightsWatch
) -> tuple[int, HeldOut | None, int]:
    """Make all of a run's steps: see `steps_in_order`."""
    steps, proof = steps_in_order(ctx, first, saver, health, watch=watch), FirstStepProof(ctx)
    try:
        step = next(steps)
        while True:
            lr = learning_rate(step, ctx.total, ctx.cfg.optim)
            with proof.watching(step) as engine:
                result = _make_step(ctx, engine, step, lr)
            step = steps.send(result)
    except StopIteration as end:
        ended: tuple[int, HeldOut | None, int] = end.value
        return ended
