"""What `--resume` does with the run that it finds: go on, go further than was asked before, finish it, or nothing."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console

from phi3_dist.adapters.files import recover
from phi3_dist.adapters.reading import read_adapter
from phi3_dist.config.schema import OptimConfig
from phi3_dist.errors import AdapterError, Problem, TrainingError
from phi3_dist.training.checkpoints.compatibility import HELD_OUT, STEPS, changed_keys, check_identity
from phi3_dist.training.checkpoints.files import Checkpoint, find_checkpoint
from phi3_dist.training.checkpoints.metrics_rows import cut_metrics
from phi3_dist.training.learning_rate import learning_rate
from phi3_dist.training.run_folder import RunFolder
from phi3_dist.training.runtime import Runtime

__all__ = ["ResumePoint", "find_resume_point"]


@dataclass(frozen=True)
class ResumePoint:
    """Where a run begins: at a checkpoint, or at step 0. `finished`: there is nothing left to do."""

    checkpoint: Checkpoint | None = None
    finished: bool = False


@dataclass(frozen=True)
class _Found:
    """What lies in the run folder, as rank 0 sees it."""

    checkpoint: Checkpoint | None
    passed: tuple[str, ...]
    finished: bool
    damage: str
    """What is wrong with the adapter of a finished run, or an empty text."""
    identity: Mapping[str, Any] | None
    """What the run was, from its checkpoint or else from plan.json."""


def find_resume_point(
    runtime: Runtime, folder: RunFolder, ours: Mapping[str, Any], allowed: Collection[str], optim: OptimConfig
) -> ResumePoint:
    """Where a resumed run goes on, checked against this run. Collective.

    A run that has made all of its steps goes on where more are asked for. Raises TrainingError for other changes that
    `allowed` does not name, on every rank.
    """
    looked = [_inspect(folder) if runtime.is_main else None]
    if runtime.world > 1:
        torch.distributed.broadcast_object_list(looked)
    (found,) = looked
    assert found is not None
    checkpoint, was, wanted = found.checkpoint, (found.identity or {}).get(STEPS), int(ours[STEPS])
    more = isinstance(was, int) and was < wanted
    extended = more and checkpoint is not None and checkpoint.step == was
    if found.identity is not None:
        _refuse_no_way_on(folder, found, wanted, more=more)
        on = f"; or train on from its adapter: model.adapter={folder.adapter}" if found.finished else ""
        check_identity(found.identity, ours, {*allowed, *((STEPS,) if extended else ())}, on)
    changed = changed_keys(found.identity, ours) if checkpoint is not None and found.identity is not None else ()
    done = found.finished and not found.damage and STEPS not in changed
    notices = () if done else _notices_before_resume(found, changed, wanted, optim)
    if runtime.is_main:
        for line in (*found.passed, *notices):
            Console(soft_wrap=True).print(line, markup=False)
    if done:
        return ResumePoint(checkpoint, finished=True)
    if runtime.is_main:
        step = checkpoint.step if checkpoint else -1  # -1: what was measured before the first step goes, too
        cut_metrics(folder.held / folder.metrics.name, step, measured_again=step == wanted)
        if changed:
            _mark(folder, step, changed)
        recover(folder.held / folder.adapter.name)
    if checkpoint is not None and HELD_OUT in changed:
        # a loss over other rows: no later one can be compared with it
        checkpoint = replace(checkpoint, trainer={**checkpoint.trainer, "best": None, "patience": None})
    return ResumePoint(checkpoint)


def _inspect(folder: RunFolder) -> _Found:
    checkpoint, passed = find_checkpoint(folder.checkpoints)
    finished = folder.finished()
    damage = ""
    if finished:
        try:
            read_adapter(folder.adapter)
        except AdapterError as error:
            damage = error.problems[0].what
    identity = checkpoint.trainer["identity"] if checkpoint else _planned_identity(folder) if finished else None
    return _Found(checkpoint, tuple(passed), finished, damage, identity)


def _planned_identity(folder: RunFolder) -> Mapping[str, Any] | None:
    """What plan.json says that the run was; None where it does not."""
    try:
        plan = json.loads((folder.path / "plan.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    said = plan.get("identity") if isinstance(plan, dict) else None
    return said if isinstance(said, dict) else None


def _refuse_no_way_on(folder: RunFolder, found: _Found, wanted: int, *, more: bool) -> None:
    """Raises TrainingError for a number of steps that no checkpoint leads to, whatever is allowed."""
    if found.checkpoint is not None and found.checkpoint.step > wanted:
        what = f"are {wanted}, and {found.checkpoint.folder.name} has made {found.checkpoint.step}"
        raise TrainingError(Problem("train.max_steps, train.epochs", what, "ask for more, or take another save.folder"))
    if more and found.finished and found.checkpoint is None:
        what = "has finished, and keeps no checkpoint to continue from"
        fix = f"model.adapter={folder.adapter} with another save.folder trains on from its adapter; or --overwrite"
        raise TrainingError(Problem(str(folder.path), what, fix))


def _notices_before_resume(found: _Found, changed: Collection[str], wanted: int, optim: OptimConfig) -> list[str]:
    """What a person should know before the run goes on."""
    lines, checkpoint = [], found.checkpoint
    if found.damage:
        where = f"from {checkpoint.folder.name}" if checkpoint else "from the first step on, as there is no checkpoint"
        lines.append(f"the adapter is damaged and made again {where}: {found.damage}")
    if checkpoint is None or found.identity is None:
        return lines
    if STEPS in changed:
        step, was = checkpoint.step, found.identity.get(STEPS)
        then = f"{learning_rate(step - 1, was, optim):.3g} in step {step}" if isinstance(was, int) and step else "new"
        now = f"{learning_rate(step, wanted, optim):.3g} in step {step + 1}" if step < wanted else "at its end"
        lines.append(
            f"steps: {was} were planned and {step} are made, {wanted} are asked for now; the learning rate follows "
            f"{optim.schedule} over {wanted} steps from here on: it was {then}, and is {now}"
        )
    if HELD_OUT in changed:
        lines.append(
            f"the held-out rows differ after step {checkpoint.step}: losses before and after it can't be compared"
        )
    return lines


def _mark(folder: RunFolder, step: int, changed: Collection[str]) -> None:
    """A row of kind `changed` in metrics.jsonl: what this run does otherwise from `step` on."""
    with (folder.held / folder.metrics.name).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "changed", "step": step, "keys": sorted(changed)}) + "\n")
