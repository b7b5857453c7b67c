"""Accelerate's trackers: checked before anything is loaded, their files in the run folder, their full disks told.

A tracker shows numbers that metrics.jsonl holds too: one that can't begin is a mistake to be named at the start, one
that fails later ends no training.
"""

from __future__ import annotations

import configparser
import contextlib
import netrc
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from phi3_dist.errors import MachineError, Problem
from phi3_dist.training.runtime import Runtime

__all__ = ["check_trackers", "finish_trackers", "start_trackers", "tracker_options"]

WANDB_HOST = "api.wandb.ai"
_SERVICES = ("wandb", "mlflow", "trackio", "comet_ml", "swanlab", "clearml", "aim", "dvclive")


def check_trackers(names: tuple[str, ...], rank: int = 0, environ: Mapping[str, str] = os.environ) -> None:
    """Raises MachineError for a tracker that Accelerate doesn't know, whose package is missing, or without its key.

    Only rank 0 logs, so only there must a key be found.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, here = sorted(LOGGER_TYPE_TO_CLASS), {str(getattr(t, "value", t)) for t in get_available_trackers()}
    problems = []
    for name in names:
        if name not in known:
            problems.append(Problem("log.trackers", f"'{name}' is not a tracker", f"one of {', '.join(known)}"))
        elif name not in here:
            problems.append(Problem("log.trackers", f"'{name}' is not installed", f"pip install {name}"))
        elif name == "wandb" and rank == 0 and not wandb_can_begin(environ):
            fix = "wandb login, or WANDB_API_KEY=…; WANDB_MODE=offline keeps it in the run folder, to be synced later"
            problems.append(Problem("log.trackers", "'wandb' has no key on this machine", fix))
    if problems:
        raise MachineError(*problems)


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


def tracker_options(names: tuple[str, ...], name: str, folder: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """What `init_trackers` hands to the trackers, so that their files lie in the run folder."""
    logs = str(folder / "logs")
    wandb = {"name": name, **({} if environ.get("WANDB_DIR") else {"dir": logs})}
    options = {"wandb": wandb, "swanlab": {"logdir": f"{logs}/swanlab"}, "dvclive": {"dir": f"{logs}/dvclive"}}
    return {tracker: options[tracker] for tracker in names if tracker in options}


def start_trackers(runtime: Runtime, names: tuple[str, ...], *, project: str, run: str, folder: Path) -> None:
    """Begin each. Raises MachineError where one can't: no room, no inode, no network, a wrong key."""
    if runtime.is_main and names:
        _quiet_threads()
    options = tracker_options(names, run, folder, os.environ)
    try:
        if runtime.is_main and options:
            (folder / "logs").mkdir(exist_ok=True)
        runtime.accelerator.init_trackers(project, init_kwargs=options)
    except Exception as error:
        theirs = type(error).__module__.split(".")[0] in _SERVICES
        if not (theirs or isinstance(error, OSError)):
            raise
        what = f"{', '.join(names)} can't begin: {error}"
        raise MachineError(Problem("log.trackers", what, "mend it, or train with log.trackers=[]")) from error


def finish_trackers(runtime: Runtime) -> Iterator[str]:
    """End each; a line for one that could not write what it still had."""
    for tracker in runtime.accelerator.trackers:
        try:
            tracker.finish()
        except OSError as error:
            yield f"{tracker.name}: its last rows were not written: {error.strerror or error}"
    runtime.accelerator.trackers = []


def _quiet_threads() -> None:
    """TensorBoard's writing thread dies of a full disk; the next row is told of it. No traceback in between."""
    before = threading.excepthook

    def hook(died: threading.ExceptHookArgs) -> None:
        of_tensorboard = type(died.thread).__module__.startswith("tensorboard")
        if not (of_tensorboard and issubclass(died.exc_type, OSError)):
            before(died)

    threading.excepthook = hook
