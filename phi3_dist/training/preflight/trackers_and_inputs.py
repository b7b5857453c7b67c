"""Whether a run's trackers and LoRA targets are there, and the files that it reads, in a second and before torch."""

from __future__ import annotations

import configparser
import contextlib
import netrc
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from phi3_dist.config.schema import DataSource, LogConfig, LoraConfig, RunConfig
from phi3_dist.errors import ConfigError, MachineError, ModelError, Problem
from phi3_dist.family.variants import LINEARS, check_targets
from phi3_dist.training.run_folder import RunFolder

__all__ = ["TRACKERS", "check_folder", "check_modules", "check_trackers", "inputs_of", "wandb_can_begin"]

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
WANDB_HOST = "api.wandb.ai"
_MODULES = (*LINEARS, "lm_head", "embed_tokens")


def inputs_of(cfg: RunConfig) -> tuple[str, ...]:
    """What the run reads, as the run file names it: paths, and names of the hub."""
    model, data = cfg.model, cfg.data
    rows = (data.train, data.validation or ())
    several = [one for each in rows for one in ((each,) if isinstance(each, str) else each)]
    named = [one.path if isinstance(one, DataSource) else one for one in several]
    return tuple(name for name in (model.source, model.tokenizer, model.adapter, *named) if name)


def check_folder(cfg: RunConfig, *, overwrite: bool, resume: bool) -> None:
    """Raises RunFolderError for a folder that the run could not take. Writes nothing."""
    RunFolder(Path(cfg.save.folder), inputs=inputs_of(cfg)).check(overwrite=overwrite, resume=resume)


def check_modules(lora: LoraConfig) -> None:
    """Raises ModelError for targets of another family's; the model itself is asked again when it is there."""
    problems = []
    for index, target in enumerate(() if lora.targets == "all-linear" else lora.targets):
        last = target.rsplit(".", 1)[-1]
        for problem in check_targets([last], _MODULES):
            what = problem.what.replace(repr(last), repr(target))
            problems.append(Problem(f"lora.targets[{index}]", what, problem.fix))
    if problems:
        raise ModelError(*problems)


def check_trackers(log: LogConfig, rank: int = 0, environ: Mapping[str, str] = os.environ) -> None:
    """Raises MachineError for a tracker that Accelerate doesn't know, whose package is missing, or without its key.

    Only rank 0 logs, so only there must a key be found.
    Raises ConfigError for a project that tensorboard would make a folder of outside of the run's.
    """
    problems = []
    for name in log.trackers:
        if name not in TRACKERS:
            problems.append(Problem("log.trackers", f"'{name}' is not a tracker", f"one of {', '.join(TRACKERS)}"))
        elif not any(find_spec(package) for package in TRACKERS[name]):
            problems.append(Problem("log.trackers", f"'{name}' is not installed", f"pip install {name}"))
        elif name == "wandb" and rank == 0 and not wandb_can_begin(environ):
            fix = "wandb login, or WANDB_API_KEY=…; WANDB_MODE=offline keeps it in the run folder, to be synced later"
            problems.append(Problem("log.trackers", "'wandb' has no key on this machine", fix))
    if problems:
        raise MachineError(*problems)
    project = Path(log.project)
    if "tensorboard" in log.trackers and (project.is_absolute() or ".." in project.parts or not project.parts):
        what = f"is {log.project!r}, which leads out of the run folder's logs/"
        raise ConfigError(Problem("log.project", what, "a name, such as phi3_dist"))


def wandb_can_begin(environ: Mapping[str, str]) -> bool:
    """Whether wandb needs no key, or finds one where its documentation says: environment, netrc, its settings."""
    settings = _wandb_settings(environ)
    mode = environ.get("WANDB_MODE") or settings.get("mode", "online")
    if mode != "online" or environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    url = environ.get("WANDB_BASE_URL") or settings.get("base_url", "")
    host = urlsplit(url).hostname or WANDB_HOST
    home = Path(environ.get("HOME") or "/")
    named = environ.get("NETRC")
    for path in [Path(named)] if named else [home / ".netrc", home / "_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            if netrc.netrc(path).authenticators(host):
                return True
    return "api_key" in settings


def _wandb_settings(environ: Mapping[str, str]) -> dict[str, str]:
    folder = environ.get("WANDB_CONFIG_DIR") or str(Path(environ.get("HOME") or "/") / ".config" / "wandb")
    parser = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
        parser.read([Path(folder) / "settings", Path("wandb") / "settings"], encoding="utf-8")
    return dict(parser["default"]) if parser.has_section("default") else {}
