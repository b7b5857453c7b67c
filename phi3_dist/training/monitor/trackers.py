"""Accelerate's trackers: checked before anything is loaded, their files in the run folder, their full disks told.

A tracker shows numbers that metrics.jsonl holds too: one that can't begin is a mistake to be named at the start, one
that fails later ends no training.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from phi3_dist.errors import MachineError, Problem
from phi3_dist.training.runtime import Runtime

__all__ = ["finish_trackers", "start_trackers", "tracker_options"]

_SERVICES = ("wandb", "mlflow", "trackio", "comet_ml", "swanlab", "clearml", "aim", "dvclive")


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
        raise MachineError(Problem("log.trackers", what, "fix it, or train with log.trackers=[]")) from error


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
