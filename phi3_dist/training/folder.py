"""The run folder: the whole truth about a run, and the only place a run writes to."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from phi3_dist.errors import Problem, RunFolderError
from phi3_dist.machine.cluster import slurm_facts
from phi3_dist.machine.processes import who

__all__ = ["PACKAGES", "RunFolder", "cache_folder", "versions"]

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "bitsandbytes",
    "datasets",
    "flash-attn",
    "flash-attn-3",
)


def cache_folder() -> Path:
    """Where tokens and hashes of weights are kept between runs: `$XDG_CACHE_HOME/phi3_dist`, or below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phi3_dist"


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on; packages that are not installed are left out."""
    found = {"python": platform.python_version(), "phi3_dist": metadata.version("phi3-dist")}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class RunFolder:
    """Paths and small atomic writes. Only rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def finished(self) -> bool:
        """Whether the run in here has ended well and left its adapter."""
        try:
            ended = json.loads((self.path / "exit.json").read_text("utf-8"))
        except (OSError, ValueError):
            return False
        return ended.get("state") == "finished" and (self.adapter / "adapter_model.safetensors").is_file()

    def _in_use(self) -> bool:
        """Whether the folder holds anything but what a run leaves that ended before its first file."""
        return self.path.is_dir() and any(p.name not in {".lock", ".config.yaml.tmp"} for p in self.path.iterdir())

    def _hold(self) -> None:
        """Hold the folder until `recording_failure` ends or this process does, however that comes about.

        Ranks whose launcher was killed train on: a second run in their folder would write into their checkpoints.
        Raises RunFolderError where another process holds it.
        """
        if self._lock is not None or not self.path.is_dir():
            return
        try:
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise RunFolderError(Problem(str(self.path), f"cannot be written: {error.strerror}", "")) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            where, what = str(self.path), "another process trains in here"
            raise RunFolderError(Problem(where, what, "stop it first; heartbeat.json holds its host and pid")) from None
        except OSError:
            os.close(handle)  # a file system without locks
            return
        self._lock = handle

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _refuse_links(self) -> None:
        """Raises RunFolderError for links by which a run would write, or remove, outside of its folder's parent."""
        problems = []
        if self.path.is_symlink() and not self.path.resolve().is_relative_to(self.path.parent.resolve()):
            what = f"is a link to {self.path.resolve()}, outside of the folder it lies in"
            problems.append(Problem(str(self.path), what, "name that folder itself in save.folder"))
        elif self.path.is_dir():
            links = sorted(p for p in self.path.iterdir() if p.is_symlink())
            problems += [
                Problem(str(p), "is a link, and a run writes only into its own folder", "remove it") for p in links
            ]
        if problems:
            raise RunFolderError(*problems)

    def reopen(self) -> None:
        """Take a folder to go on in: a run's, or a new one.

        Raises RunFolderError for a folder of something else, one with links, or one in which another process trains.
        """
        self._refuse_links()
        if self._in_use() and not (self.path / "config.yaml").is_file():
            raise RunFolderError(
                Problem(str(self.path), "--resume goes on in a run folder, and this holds no config.yaml", "")
            )
        if not (self.path / "config.yaml").is_file():
            self.claim(overwrite=False)
        self._hold()

    def claim(self, *, overwrite: bool) -> None:
        """Make the folder. Raises RunFolderError for a non-empty one without `overwrite`, or where it can't be made.

        Overwriting removes only what looks like a run of ours: a folder with a config.yaml.
        """
        where = str(self.path)
        self._refuse_links()
        try:
            if self.path.exists() and (not self.path.is_dir() or self._in_use()):
                if not overwrite:
                    raise RunFolderError(
                        Problem(where, "exists and is not empty", "choose another save.folder, or pass --overwrite")
                    )
                if not (self.path / "config.yaml").is_file():
                    raise RunFolderError(
                        Problem(where, "--overwrite only replaces a run folder, and this holds no config.yaml", "")
                    )
                self._hold()
                shutil.rmtree(self.path)
                self._release()
            self.path.mkdir(parents=True, exist_ok=True)
            self._hold()
        except OSError as error:
            raise RunFolderError(Problem(where, f"cannot be made: {error.strerror}", "check save.folder")) from error

    def write(self, name: str, text: str) -> None:
        """Write a small file so that a reader sees the old or the new text, never half of one."""
        target = self.path / name
        temporary = target.with_name(f".{name}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(target)
        except OSError as error:
            with contextlib.suppress(OSError):  # half of it would keep a full disk full
                temporary.unlink(missing_ok=True)
            raise RunFolderError(Problem(str(target), f"cannot be written: {error.strerror}", "")) from error

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self.write(name, json.dumps(value, indent=2, default=str) + "\n")

    def heartbeat(self, step: int) -> None:
        """Who runs here and how far: `phi3-dist runs` tells a living run from a dead one by it.

        A disk that is full or gone ends no training here: the next checkpoint tells of it, and may find room.
        """
        job = slurm_facts()
        beat = {
            **who(),
            "host": socket.gethostname(),
            "time": time.time(),
            "step": step,
            "job_id": job.job_id if job else None,
            "nodes": job.nodes if job else None,
        }
        with contextlib.suppress(RunFolderError):
            self.write_json("heartbeat.json", beat)

    def record_exit(self, code: int, state: str) -> None:
        self.write_json("exit.json", {"code": code, "state": state, "time": time.time(), **who()})

    def forget_exit(self) -> None:
        """A start that goes on has not ended, whatever the one before wrote, and whatever the clock says."""
        with contextlib.suppress(OSError):
            (self.path / "exit.json").unlink(missing_ok=True)

    @contextlib.contextmanager
    def recording_failure(self, *, active: bool) -> Iterator[None]:
        """Whatever ends the block with an error is kept in exit.json, so that `phi3-dist runs` can tell."""
        try:
            yield
        except BaseException as error:
            if active and (self.path / "config.yaml").is_file():
                with contextlib.suppress(RunFolderError):  # a full disk may be why it failed: `error` is what counts
                    self.record_exit(getattr(error, "exit_code", 1), "failed")
            raise
        finally:
            self._release()

    def record_environment(self, command: list[str] | None = None) -> None:
        self.write_json(
            "environment.json",
            {
                "versions": versions(),
                "platform": platform.platform(),
                "command": command if command is not None else sys.argv,
            },
        )
