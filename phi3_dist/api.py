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
    from phi3_dist.exports.checking import Trial
    from phi3_dist.exports.exporting import Exported, Kind
    from phi3_dist.exports.gguf_model import Stored
    from phi3_dist.exports.merged import Into
    from phi3_dist.exports.pushing import Pushed
    from phi3_dist.planning.plan import RunPlan
    from phi3_dist.serving.rules import Server, Verdict

__all__ = [
    "Checked",
    "Taken",
    "Trained",
    "adapter_of_checkpoint",
    "check",
    "evaluate",
    "export",
    "generate",
    "load_run",
    "plan",
    "push",
    "report_page",
    "train",
]

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
        """The rows of metrics.jsonl: `kind` is train, eval, save, …; units are part of the keys."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text("utf-8").splitlines()]

    def plot(self) -> Path:
        """Draw the curves; the path of the picture. Raises RunFolderError where there is nothing to draw."""
        from phi3_dist.report.curves_png import draw_curves

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
    from phi3_dist.planning.auto_fields import plan_with_auto
    from phi3_dist.planning.preview import shape_of_source

    return plan_with_auto(cfg, probe(), launch_facts(os.environ), shape_of_source(cfg))[1]


def train(
    run: str | Path | RunConfig, overrides: Overrides = (), *, overwrite: bool = False, resume: bool = False
) -> Trained:
    """Train an adapter, on one device or on every process of the launcher that started this one, which all call it.

    `overwrite` replaces an existing run, `resume` continues it. The process group stays for the next run of these
    processes, until they end. Raises the errors of the tree: ConfigError,
    DataError, ModelError, PlanError, RunFolderError, MachineError, TrainingError.
    """
    cfg = load_run(run, overrides)
    if overwrite and resume:
        raise ConfigError(Problem("overwrite, resume", "cannot be combined", "give one of them"))
    from phi3_dist.machine.probe import launch_facts, probe
    from phi3_dist.training.preflight.before_torch import check_before_torch
    from phi3_dist.training.signals import Stopped
    from phi3_dist.training.whole_run import train as run_training

    check_before_torch(cfg, os.environ, overwrite=overwrite, resume=resume)
    try:
        result = run_training(
            cfg, probe(), launch_facts(os.environ), overwrite=overwrite, resume=resume, keep_group=True
        )
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
    tasks: Sequence[str] = (),
    limit: int | None = None,
    split: str = "test",
    max_new_tokens: int = 256,
    batch_size: int = 16,
    base_model: str | None = None,
    precision: str = "auto",
    quantization: str | None = None,
    device: str | None = None,
) -> Evaluation:
    """Held-out loss and scored answers of a run, an adapter, a checkpoint or a base: `phi3-dist eval`.

    `data` are rows (`split` of them), by default the run's own held-out ones; `generate` of them are answered and
    scored by `metrics`. `tasks` are lm-eval's, with `limit` rows of each. `base` sets the base beside it, `against`
    another run; then `differences` have intervals. `numbers` are the first side's, losses in nats a supervised token
    and scores from 0 to 1; `asked` the rows with their answers, the worst first; `write(folder)` keeps both.
    Every process of a launcher calls it, and each returns the whole. Raises what
    `phi3_dist.evaluation.evaluate.evaluate` does.
    """
    from phi3_dist.evaluation.evaluate import EvaluationRequest
    from phi3_dist.evaluation.evaluate import evaluate as measure
    from phi3_dist.evaluation.ranks import joined
    from phi3_dist.inference.answers_file import How
    from phi3_dist.inference.open_model import Options

    request = EvaluationRequest(data, split, base, against, generate, tuple(metrics), tuple(tasks), limit)
    options = Options(base_model, None, precision, quantization, device)
    with joined(device) as ranks:
        return measure(str(target), request, how=How(max_new_tokens, batch_size), options=options, ranks=ranks)


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
    precision: str = "auto",
    quantization: str | None = None,
    device: str | None = None,
) -> list[str]:
    """The answer to each prompt, in order, of a run, an adapter, a checkpoint or a base: `phi3-dist generate`.

    A prompt is a question, or turns of `role` and `content` that end with one. Raises DataError for one that can't be
    asked, ConfigError for impossible numbers, and what `open_model` raises.
    """
    from phi3_dist.inference.answers_file import How, answer_all
    from phi3_dist.inference.engine import Sampling
    from phi3_dist.inference.open_model import Options, open_model
    from phi3_dist.inference.prompts import Prompt

    if isinstance(prompts, str):
        raise ConfigError(Problem("prompts", "is one text", "give a list of prompts"))
    if min(max_new_tokens, batch_size) < 1:
        raise ConfigError(Problem("max_new_tokens, batch_size", "is below 1", "give 1 or more"))
    try:
        sampling = Sampling(temperature, top_p, top_k, seed)
    except ValueError as error:
        raise ConfigError(Problem("temperature, top_p, top_k", str(error), "")) from error
    parsed = []
    for i, prompt in enumerate(prompts):
        place = f"prompts[{i}]"
        parsed.append(
            Prompt.of(prompt, system, place) if isinstance(prompt, str) else Prompt(tuple(prompt), None, place)
        )
    options = Options(base_model, None, precision, quantization, device)
    return answer_all(open_model(target, options), parsed, How(max_new_tokens, batch_size, sampling))


@dataclass(frozen=True)
class Taken:
    """An adapter out of a checkpoint. `held_out_loss` in nats a supervised token, where that step was evaluated."""

    folder: Path
    step: int
    tensors: int
    held_out_loss: float | None


def adapter_of_checkpoint(run: str | Path, out: str | Path, *, step: int | None = None, best: bool = False) -> Taken:
    """Write the adapter that a checkpoint of `run` holds to the new folder `out`: `phi3-dist adapter`.

    `step` counts from 1, `best` is the least held-out loss, and without either it is the last that verifies. Raises
    ConfigError for both, RunFolderError, ModelError and AdapterError.
    """
    if best and step is not None:
        raise ConfigError(Problem("--best --step", "cannot be combined", "give one of them"))
    from phi3_dist.exports.from_checkpoint import adapter_of_checkpoint as write_it

    receipt, checkpoint = write_it(run, out, step=step, best=best)
    return Taken(Path(out), checkpoint.step, receipt.tensors, checkpoint.trainer.get("heldout_loss"))


def export(
    source: str | Path,
    out: str | Path,
    kind: Kind,
    *,
    base: str | None = None,
    into: Into | None = None,
    stored: Stored | None = None,
    data: str | None = None,
    others: Sequence[str | Path] = (),
    weights: Sequence[float] = (),
    method: str = "cat",
    density: float | None = None,
) -> Exported:
    """Write a run's or a folder's adapter to the new folder `out` in another form: `phi3-dist export`.

    `kind` is merged, split, one-rank, gguf, gguf-merged or combine (then `others`, `weights`, PEFT's `method` and
    `density`, the share of values that TIES and DARE keep). `base` in place of the one that the adapter names; `into`
    the base's or the dequantised nf4 weights; `stored`, of gguf-merged, f32, f16 or bf16; `data` the rows to compare
    on. The result's `drift` says how far its logits are from the live model's. Raises ConfigError for a word that isn't
    one of these, AdapterError, RunFolderError, ModelError, DataError, MachineError; nothing is left of `out` then.
    """
    from phi3_dist.exports.exporting import export as write_export

    return write_export(
        source,
        out,
        kind,
        base=base,
        into=into,
        stored=stored,
        data=data,
        others=others,
        weights=weights,
        method=method,
        density=density,
    )


@dataclass(frozen=True)
class Checked:
    """What a server will do with an adapter by its rules, and, where it was started, what it did."""

    verdict: Verdict
    trial: Trial | None

    @property
    def right(self) -> bool:
        """Whether it loads and answers as trained, by the rules and, where it was asked, in fact."""
        return self.verdict.right and (self.trial is None or self.trial.right)


def check(
    source: str | Path,
    server: Server,
    *,
    base: str | None = None,
    run: bool = False,
    server_python: str | None = None,
    server_base: str | None = None,
    data: str | None = None,
) -> Checked:
    """Say whether `server` (vllm, llama.cpp, transformers, peft) loads an adapter and answers as it was trained:
    `phi3-dist check`.

    `run` starts the server with the Python `server_python` (by default this one), gives it `server_base` as the base
    (for llama.cpp a GGUF file) and compares greedy answers on rows of `data` with the live model's. An adapter that
    does not serve is a result, not an error: `right`, `verdict.findings`, `verdict.command`. Raises ConfigError for
    another server, MachineError for one that is not installed or can't be started, and what `export` does.
    """
    import sys

    from phi3_dist.exports import checking

    opened, verdict = checking.check(source, server, base=base)
    if not run:
        return Checked(verdict, None)
    python = server_python or sys.executable
    checking.require(server, python)
    return Checked(verdict, checking.try_server(opened, server, python, server_base=server_base, data=data))


def push(
    source: str | Path,
    repo: str,
    *,
    base: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    languages: Sequence[str] = (),
    datasets: Sequence[str] = (),
    public: bool = False,
    upload: bool = False,
) -> Pushed:
    """List what of an adapter would go to the hub's `repo`, and with `upload` send it: `phi3-dist push`.

    Raises ConfigError for a name that is not a hub id, AdapterError for a damaged adapter, a secret or a path in its
    files, or a card that the hub would refuse, and MachineError for a hub that can't be reached or that refuses.
    """
    from phi3_dist.exports.pushing import push as send

    return send(
        source,
        repo,
        base=base,
        revision=revision,
        license=license,
        languages=languages,
        datasets=datasets,
        public=public,
        upload=upload,
    )


def report_page(runs: str | Path | Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the page of a run, of a sweep, or of several runs with what differs as the legend: `phi3-dist report`.

    Returns its path: report.html in the run's folder, sweep.html in the sweep's; of several, `output`, by default
    comparison.html. Raises ConfigError for an `output` with one, and RunFolderError for a folder without metrics or a
    file that is not a page.
    """
    from phi3_dist.report.page import write_comparison, write_page
    from phi3_dist.report.sweep_file import is_sweep
    from phi3_dist.report.sweeps import write_sweep_page

    folders = [Path(runs)] if isinstance(runs, str | Path) else [Path(run) for run in runs]
    if not folders:
        raise ConfigError(Problem("runs", "is empty", "name a run folder, or several"))
    if len(folders) > 1:
        return write_comparison(folders, Path(output or "comparison.html"))
    if output is not None:
        what = "is for the page of several runs"
        raise ConfigError(Problem("--output", what, f"the page of one is {folders[0]}/report.html"))
    return write_sweep_page(folders[0]) if is_sweep(folders[0]) else write_page(folders[0])
