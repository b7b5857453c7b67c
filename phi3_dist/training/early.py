"""What can be said of a run in a second, before torch is imported and data is prepared: folder, targets, trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from phi3_dist.config.families import LINEARS, check_targets
from phi3_dist.config.schema import DataSource, LogConfig, LoraConfig, RunConfig
from phi3_dist.errors import ConfigError, MachineError, ModelError, Problem
from phi3_dist.training.folder import RunFolder

__all__ = ["TRACKERS", "check_early", "check_trackers", "inputs_of"]

TRACKERS: Mapping[str, Sequence[str]] = {
    "aim": ("aim",),
    "clearml": ("clearml",),
    "comet_ml": ("comet_ml",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""Accelerate's trackers, and the packages of which each needs one. A test holds it against Accelerate."""
_MODULES = (*LINEARS, "lm_head", "embed_tokens")


def inputs_of(cfg: RunConfig) -> tuple[str, ...]:
    """What the run reads, as the run file names it: paths, and names of the hub."""
    model, data = cfg.model, cfg.data
    rows = (data.train, data.validation or ())
    several = [one for each in rows for one in ((each,) if isinstance(each, str) else each)]
    named = [one.path if isinstance(one, DataSource) else one for one in several]
    return tuple(name for name in (model.source, model.tokenizer, model.adapter, *named) if name)


def check_early(cfg: RunConfig, environ: Mapping[str, str], *, overwrite: bool, resume: bool) -> None:
    """Raises RunFolderError for a folder that the run could not take, and as `check_trackers` and for targets.

    Only rank 0 looks at the folder: it may hold it by now.
    """
    check_trackers(cfg.log)
    _check_modules(cfg.lora)
    if environ.get("RANK", "0") == "0":
        RunFolder(Path(cfg.save.folder), inputs=inputs_of(cfg)).check(overwrite=overwrite, resume=resume)


def _check_modules(lora: LoraConfig) -> None:
    """Raises ModelError for targets of another family's; the model itself is asked again when it is there."""
    problems = []
    for index, target in enumerate(() if lora.targets == "all-linear" else lora.targets):
        last = target.rsplit(".", 1)[-1]
        for problem in check_targets([last], _MODULES):
            what = problem.what.replace(repr(last), repr(target))
            problems.append(Problem(f"lora.targets[{index}]", what, problem.fix))
    if problems:
        raise ModelError(*problems)


def check_trackers(log: LogConfig) -> None:
    """Raises MachineError for a tracker that Accelerate doesn't know or whose package is missing.

    Raises ConfigError for a project that tensorboard would make a folder of outside of the run's.
    """
    problems = []
    for name in log.trackers:
        if name not in TRACKERS:
            problems.append(Problem("log.trackers", f"'{name}' is not a tracker", f"one of {', '.join(TRACKERS)}"))
        elif not any(find_spec(package) for package in TRACKERS[name]):
            problems.append(Problem("log.trackers", f"'{name}' is not installed", f"pip install {name}"))
    if problems:
        raise MachineError(*problems)
    project = Path(log.project)
    if "tensorboard" in log.trackers and (project.is_absolute() or ".." in project.parts or not project.parts):
        what = f"is {log.project!r}, which leads out of the run folder's logs/"
        raise ConfigError(Problem("log.project", what, "a name, such as phi3_dist"))
