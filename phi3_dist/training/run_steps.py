"""The steps of a run in their order: log rows, held-out losses, checkpoints, and what a signal ends."""

from __future__ import annotations

import signal
import time

from phi3_dist.modeling.fused_lora import declined
from phi3_dist.modeling.weights_watch import WeightsWatch
from phi3_dist.training.checkpoints.metrics_rows import measured
from phi3_dist.training.checkpoints.saver import Saver
from phi3_dist.training.context import Stage
from phi3_dist.training.evaluate import HeldOut, held_out_loss
from phi3_dist.training.monitor.health import Health
from phi3_dist.training.monitor.readout import EvaluationWatch, StepReadout
from phi3_dist.training.plan_proof import prove_updated_dtypes
from phi3_dist.training.train_step import learning_rate, train_step

__all__ = ["run_steps"]


def _evaluate(stage: Stage, step: int) -> tuple[HeldOut | None, int]:
    """The held-out loss after `step` steps, None without held-out rows; and the signal that broke it off, or 0."""
    if stage.held_out is None:
        return None, 0
    watch = EvaluationWatch(stage, step)
    found, stop = held_out_loss(stage.engine, stage.runtime, stage.held_out, stage.flag, watch.tell)
    if found is None:
        stage.metrics.say(f"the held-out loss after step {step} was broken off by {signal.Signals(stop).name}")
        return None, stop
    answered: dict[str, float | int] = {}
    if stage.answers is not None:
        scores, stop = stage.answers.scores(stage.engine, stage.runtime, stage.flag)
        if scores is None:
            stage.metrics.say(f"the answers after step {step} were broken off by {signal.Signals(stop).name}")
            return None, stop
        answered = scores
    stage.time_left.evaluation_s = found.seconds + float(answered.get("answers_s", 0))
    stage.patience.saw(step, found.loss)
    stage.metrics.evaluation(
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


def _say_first_step(stage: Stage, step: int) -> None:
    """Where the start's time went, and what turned out otherwise than announced. Raises PlanError for wrong dtypes."""
    prove_updated_dtypes(stage.engine)
    stage.clock.mark("first step")
    stage.metrics.say(stage.clock.line())
    spans = {f"{name.replace(' ', '_')}_s": round(seconds, 3) for name, seconds in stage.clock.spans_s.items()}
    stage.metrics.note("start", {"step": step, **spans, "total_s": round(stage.clock.total_s, 3)})
    if stage.runtime.is_main:
        stage.folder.drop_replaced_run()
    for why, layers in declined(stage.engine.model).items():
        stage.metrics.say(f"note: {layers} LoRA linears ran as PEFT's after all: {why}")


def _evaluation_due(stage: Stage, first: int) -> bool:
    """Whether to measure before step `first` is made: in a new run, and what was broken off before the checkpoint."""
    every = stage.cfg.train.eval_every
    if stage.held_out is None or first in {0, stage.total}:
        return True
    return bool(every) and first % every == 0 and not measured(stage, first)


def run_steps(
    stage: Stage, first: int, saver: Saver, health: Health, *, watch: WeightsWatch
) -> tuple[int, HeldOut | None, int]:
    """Steps `first` to the end, with log rows, held-out losses and checkpoints.

    A new run measures the held-out loss before its first step, too. Returns the steps done, fewer than all where
    `train.patience` ended it, the last held-out loss, and the signal that stopped the run or 0.
    """
    cfg, held_out, readout = stage.cfg, None, StepReadout(stage, health)
    if _evaluation_due(stage, first):
        held_out, stop = _evaluate(stage, first)
        stage.clock.mark("held out")
        if stop or first == stage.total:
            return first, held_out, stop
    if stage.patience.exhausted():
        stage.metrics.say(stage.patience.line(first))
        return first, held_out, 0
    for step in range(first, stage.total):
        watch.check()
        begun, done = time.perf_counter(), step + 1
        lr = learning_rate(step, stage.total, cfg.optim)
        result = train_step(stage.engine, stage.runtime, stage.train, stage.order, step, lr=lr, seed=cfg.train.seed)
        if stage.profile.step():
            done_as = stage.profile.failed or f"{stage.folder.path / 'profile'}/table.txt and trace.json.gz"
            stage.metrics.say(f"profile: {done_as}")
        readout.add(done, result, begun)
        evaluate = done == stage.total or bool(cfg.train.eval_every and done % cfg.train.eval_every == 0)
        if evaluate or saver.due(done) or readout.stop or step == first:
            readout.read()
        if step == first:
            _say_first_step(stage, done)
        stop, found = readout.stop, None
        if evaluate and not stop:
            found, stop = _evaluate(stage, done)
            held_out = found or held_out
        early = stage.patience.exhausted() and done < stage.total
        # nothing is left to stop after the last step but the evaluation that it was to end with
        stop = stop if done < stage.total or stage.held_out else 0
        if saver.due(done, found, early=early) or stop:
            watch.check()
            saver.save(done, found)
            stage.time_left.save_s = saver.stood_s / max(saver.saves, 1)
        if stop:
            return done, held_out, stop
        if early:
            stage.metrics.note("early_stop", {"step": done})
            stage.metrics.say(stage.patience.line(done))
            return done, held_out, 0
    return stage.total, held_out, 0
