"""The verbs as functions, for notebooks and other programs: typed, with errors of the tree in errors.py.

They print what the verbs print, ask for nothing, and never end the process: a signal before a run's first step is a
KeyboardInterrupt (Ctrl-C) or a TrainingError.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_dist.config.load import load_run as _load
from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import ConfigError, Problem, TrainingError

if TYPE_CHECKING:
    from phi3_dist.evaluation.evaluate import Evaluation
    from phi3_dist.planning.plan import RunPlan

__all__ = ["Trained", "evaluate", "generate", "load_run", "plan", "train"]

Overrides = Mapping[str, Any] | Sequence[str]
"""`{"optim.lr": 1e-4}`, or `["optim.lr=1e-4"]` as on the command line."""


@dataclass(frozen=True)
class Trained:
    """What a run has left. `adapter` is None where a signal stopped it; `held_out_loss` in nats a supervised token."""

    folder: Path
    steps: int
    state: str
    """finished, interrupted or preempted."""
    adapter: Path | None
    held_out_loss: float | None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: `kind` is train, eval, save, …; units stand in the keys."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text("utf-8").splitlines()]

    def plot(self) -> Path:
        """Draw the curves; the path of the picture. Raises RunFolderError where there is nothing to draw."""
        from phi3_dist.report.curves import draw_curves

        return draw_curves(self.folder)


def _words(overrides: Overrides) -> list[str]:
    if isinstance(overrides, str):
        raise ConfigError(Problem("overrides", f"is the text {overrides!r}", 'give {"optim.lr": 1e-4} or a list'))
    if not isinstance(overrides, Mapping):
        return list(overrides)
    return [f"{path}={json.dumps(value, default=str)}" for path, value in overrides.items()]


def load_run(run: str | Path | RunConfig, overrides: Overrides = ()) -> RunConfig:
    """A run file, or the one that a run folder holds, with `overrides`, checked.

    Raises ConfigError with every mistake, its place and its fix.
    """
    if isinstance(run, RunConfig):
        if overrides:
            what = "go with a run file, not with one that is loaded"
            raise ConfigError(Problem("overrides", what, "load it with them"))
        return run
    path = Path(run)
    return _load(path / "config.yaml" if (path / "config.yaml").is_file() else path, _words(overrides))


def plan(run: str | Path | RunConfig, overrides: Overrides = ()) -> RunPlan:
    """What would run on this machine in this process, why (`choices`), and the memory it would take. Loads no weight.

    Raises ConfigError, ModelError for a base that isn't there, and PlanError for what cannot run here.
    """
    cfg = load_run(run, overrides)
    from phi3_dist.machine.probe import launch_facts, probe
    from phi3_dist.planning.plan import make_plan
    from phi3_dist.planning.preview import shape_of_source

    return make_plan(cfg, probe(), launch_facts(os.environ), family_or_shape=shape_of_source(cfg))


def train(
    run: str | Path | RunConfig, overrides: Overrides = (), *, overwrite: bool = False, resume: bool = False
) -> Trained:
    """Train an adapter, on one device or on every process of the launcher that started this one, which all call it.

    `overwrite` replaces an existing run, `resume` goes on with it. Raises the errors of the tree: ConfigError,
    DataError, ModelError, PlanError, RunFolderError, MachineError, TrainingError.
    """
    cfg = load_run(run, overrides)
    if overwrite and resume:
        raise ConfigError(Problem("overwrite, resume", "exclude each other", "give one of them"))
    from phi3_dist.machine.probe import launch_facts, probe
    from phi3_dist.training.early_checks import check_early
    from phi3_dist.training.signals import Stopped
    from phi3_dist.training.whole_run import train as run_training

    check_early(cfg, os.environ, overwrite=overwrite, resume=resume)
    try:
        result = run_training(cfg, probe(), launch_facts(os.environ), overwrite=overwrite, resume=resume)
    except Stopped as stop:
        if stop.number == signal.SIGINT:
            raise KeyboardInterrupt from stop
        raise TrainingError(Problem("training", str(stop), "start it again")) from stop
    adapter = result.folder / "adapter"
    loss = result.held_out.loss if result.held_out else None
    there = adapter if not result.stopped_by and adapter.is_dir() else None
    return Trained(result.folder, result.steps, result.state, there, loss)


def evaluate(
    target: str | Path,
    data: str | None = None,
    *,
    base: bool = False,
    against: str | None = None,
    generate: int = 100,
    metrics: Sequence[str] = (),
    max_new_tokens: int = 256,
    batch_size: int = 16,
    base_model: str | None = None,
) -> Evaluation:
    """Held-out loss and scored answers of a run, an adapter, a checkpoint or a base: `phi3-dist eval`.

    `data` are rows, by default the run's own held-out ones; `generate` of them are answered and scored by `metrics`.
    `base` sets the base beside it, `against` another run; then `differences` have intervals. `numbers` are the first
    side's, `asked` the rows with their answers, the worst first; `write(folder)` keeps both. Raises what
    `phi3_dist.evaluation.evaluate.evaluate` does.
    """
    from phi3_dist.evaluation.evaluate import Asking
    from phi3_dist.evaluation.evaluate import evaluate as measure
    from phi3_dist.inference.files import How
    from phi3_dist.inference.opening import Options

    asking = Asking(data, base=base, against=against, generate=generate, metrics=tuple(metrics))
    return measure(str(target), asking, how=How(max_new_tokens, batch_size), options=Options(base_model))


def generate(
    target: str | Path,
    prompts: Sequence[str | Sequence[Mapping[str, str]]],
    *,
    system: str = "",
    max_new_tokens: int = 256,
    batch_size: int = 16,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    base_model: str | None = None,
) -> list[str]:
    """The answer to each prompt, in order, of a run, an adapter, a checkpoint or a base: `phi3-dist generate`.

    A prompt is a question, or turns of `role` and `content` that end with one. Raises DataError for one that can't be
    asked, ConfigError for impossible numbers, and what `open_model` raises.
    """
    from phi3_dist.inference.engine import Sampling
    from phi3_dist.inference.files import How, answer_all
    from phi3_dist.inference.opening import Options, open_model
    from phi3_dist.inference.prompts import Prompt

    if isinstance(prompts, str):
        raise ConfigError(Problem("prompts", "is one text", "give a list of prompts"))
    if min(max_new_tokens, batch_size) < 1:
        raise ConfigError(Problem("max_new_tokens, batch_size", "is below 1", "give 1 or more"))
    try:
        sampling = Sampling(temperature, top_p, top_k, seed)
    except ValueError as error:
        raise ConfigError(Problem("temperature, top_p, top_k", str(error), "")) from error
    asked = []
    for i, prompt in enumerate(prompts):
        place = f"prompts[{i}]"
        asked.append(
            Prompt.of(prompt, system, place) if isinstance(prompt, str) else Prompt(tuple(prompt), None, place)
        )
    return answer_all(open_model(target, Options(base_model)), asked, How(max_new_tokens, batch_size, sampling))
