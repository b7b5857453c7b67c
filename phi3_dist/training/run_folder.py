"""The run folder: the whole truth about a run, and the only place a run writes to."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from phi3_dist.config.json_text import parse_json
from phi3_dist.errors import Phi3DistError, Problem, RunFolderError
from phi3_dist.machine.installed_versions import versions_of
from phi3_dist.machine.processes import who
from phi3_dist.machine.slurm_cluster import slurm_facts
from phi3_dist.machine.storage import NO_LOCKS, storage_fault
from phi3_dist.machine.terminal import lost_lines
from phi3_dist.training.run_folder_contents import (
    LOCK,
    MARK,
    drop_replaced,
    foreign_entries,
    in_use,
    is_run,
    mark,
    move_aside,
    named,
    put_back,
    unsafe,
)
from phi3_dist.training.signals import Stopped, state_of_stop
from phi3_dist.version import __version__

__all__ = ["PACKAGES", "RunFolder", "versions"]

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


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on; packages that are not installed are left out."""
    return {"python": platform.python_version(), "phi3_dist": __version__, **versions_of(PACKAGES)}


def _is(path: Path, ours: os.stat_result) -> bool:
    """Whether `path` names this very folder."""
    try:
        return os.path.samestat(path.stat(), ours)
    except OSError:
        return False


class RunFolder:
    """Paths and small atomic writes. Only rank 0 writes, and only through `held`."""

    def __init__(self, path: Path, *, inputs: Iterable[str] = ()) -> None:
        """`inputs`: what the run reads, as the run file names it. A folder that holds one of them is never replaced."""
        self.path = path
        self._inputs = tuple(inputs)
        self._handle: int | None = None
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

    @property
    def held(self) -> Path:
        """The folder to write to, once it is held: itself, wherever it has been moved, and no other under its name.

        Where the system shows handles as paths (Linux), the path of the handle; elsewhere the folder's name. Raises
        RunFolderError where the folder has no name any more (removed, unmounted), or that name is another folder's.
        """
        if self._handle is None:
            return self.path
        through = self._through()
        ours = os.fstat(self._handle)
        if not _is(self.path, ours) and (through is None or self._name_now() is None):
            what = "is not the folder any more that this run writes to: it was removed, moved or unmounted"
            raise RunFolderError(Problem(str(self.path), what, "leave a run's folder in its place"))
        return through or self.path

    def _through(self) -> Path | None:
        """The handle as a path."""
        path = Path(f"/proc/self/fd/{self._handle}")
        return path if self._handle is not None and _is(path, os.fstat(self._handle)) else None

    def _name_now(self) -> Path | None:
        """Where the held folder lies now, as the system says; None where it lies nowhere or nobody says."""
        assert self._handle is not None
        try:
            name = Path(f"/proc/self/fd/{self._handle}").readlink()
        except OSError:
            return None
        return name if _is(name, os.fstat(self._handle)) else None

    def moved(self) -> str:
        """Once after the folder was moved: a line that says where it is, which `path` follows; else empty."""
        if self._handle is None or _is(self.path, os.fstat(self._handle)):
            return ""
        now = self._name_now()
        if now is None:
            return ""
        before, self.path = self.path, now
        return f"{before}: the run folder was moved to {now}, and the run continues there"

    def finished(self) -> bool:
        """Whether the run in here has ended well and left its adapter."""
        try:
            ended = parse_json((self.path / "exit.json").read_text("utf-8"))
        except (OSError, ValueError):
            return False
        return (
            isinstance(ended, dict)
            and ended.get("state") == "finished"
            and (self.adapter / "adapter_model.safetensors").is_file()
        )

    def _hold(self) -> None:
        """Hold the folder until `recording_failure` ends or this process does, however that comes about.

        Ranks whose launcher was killed train on: a second run in their folder would write into their checkpoints. The
        folder itself is locked where its file system can, so that a lock file that somebody removes opens no door.
        Raises RunFolderError where another process holds it.
        """
        if self._handle is not None or not self.path.is_dir():
            return
        handles = []
        try:
            handles.append(os.open(self.path, os.O_RDONLY | os.O_DIRECTORY))
            handles.append(os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666, dir_fd=handles[0]))
        except OSError as error:
            for handle in handles:
                os.close(handle)
            raise RunFolderError(Problem(str(self.path), f"cannot be written: {error.strerror}", "")) from error
        self._handle, self._lock = handles
        for handle in handles:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._release()
                where, what = str(self.path), "another process trains in here"
                fix = "stop it first; heartbeat.json holds its host and pid"
                raise RunFolderError(Problem(where, what, fix)) from None
            except OSError as error:
                what, fix = storage_fault(error)
                if error.errno not in NO_LOCKS:
                    self._release()
                    raise RunFolderError(Problem(str(self.path), what, fix)) from error
                if handle == handles[-1]:  # a folder alone can often not be locked
                    sys.stderr.write(f"phi3-dist: {self.path}: {what}: a second run in it would not be seen; {fix}\n")

    def _release(self) -> None:
        for handle in (self._handle, self._lock):
            if handle is not None:
                os.close(handle)
        self._handle = self._lock = None

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

    def check(self, *, overwrite: bool = False, resume: bool = False) -> None:
        """Raises RunFolderError where `claim` or `reopen` would, but for another process. Writes nothing."""
        try:
            self._refuse_links()
            self._refuse_unwritable()
            if not in_use(self.path):
                return
            if not is_run(self.path):
                what = f"holds no run: {MARK}, which every run leaves, is not in it"
                fix = "choose another save.folder; a run of an earlier version must be removed by you"
                raise RunFolderError(Problem(str(self.path), what, fix))
            if resume:
                return
            if not overwrite:
                fix = "--resume to continue it, another save.folder, or --overwrite to replace it"
                raise RunFolderError(Problem(str(self.path), "holds a run already", fix))
            self._refuse_replacing()
        except OSError as error:
            raise RunFolderError(Problem(str(self.path), f"cannot be read: {error.strerror}", "")) from error

    def _refuse_unwritable(self) -> None:
        there = next((p for p in (self.path, *self.path.absolute().parents) if os.path.lexists(p)), Path("/"))
        if not there.is_dir():
            raise RunFolderError(Problem(str(there), "is a file; expected a folder", "choose another save.folder"))
        if not os.access(there, os.W_OK | os.X_OK):
            what = "cannot be written: Permission denied"
            raise RunFolderError(Problem(str(there), what, "choose another save.folder"))

    def _refuse_replacing(self) -> None:
        """Raises RunFolderError where replacing the run in here could take something else with it."""
        where, problems = str(self.path), []
        if why := unsafe(self.path):
            problems.append(Problem(where, f"{why}: nothing in it is replaced", "name another save.folder"))
        elif others := foreign_entries(self.path):
            what = f"holds {named(others)}, which no run wrote: nothing in it is replaced"
            problems.append(Problem(where, what, "move these files elsewhere, or choose another save.folder"))
        here = self.path.resolve()
        for path in self._inputs:
            if os.path.lexists(path) and Path(path).resolve().is_relative_to(here):
                what = f"holds {path}, which the new run reads: nothing in it is replaced"
                problems.append(Problem(where, what, "choose another save.folder"))
        if problems:
            raise RunFolderError(*problems)

    def reopen(self) -> None:
        """Take a folder to go on in: a run's, or a new one. One whose replacement had made no step is itself again.

        Raises RunFolderError for a folder of something else, one with links, or one in which another process trains.
        """
        self._take(overwrite=False, resume=True)

    def claim(self, *, overwrite: bool) -> None:
        """Make the folder. Raises RunFolderError for a non-empty one without `overwrite`, or where it can't be made.

        Overwriting moves a run aside, in a folder that holds a run and nothing else; see `drop_replaced_run`.
        """
        self._take(overwrite=overwrite, resume=False)

    def _take(self, *, overwrite: bool, resume: bool) -> None:
        self.check(overwrite=overwrite, resume=resume)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._hold()
            self.check(overwrite=overwrite, resume=resume)  # while nobody held it, another run may have come and gone
            if overwrite or resume:
                put_back(self.held)
            if overwrite and in_use(self.held):
                move_aside(self.held)
            if not is_run(self.held) or overwrite:
                mark(self.held)
        except OSError as error:
            self._release()
            raise RunFolderError(
                Problem(str(self.path), f"cannot be made: {error.strerror}", "check save.folder")
            ) from error
        except RunFolderError:
            self._release()
            raise

    def drop_replaced_run(self) -> None:
        """The run has begun: what it replaces goes. A disk that refuses is no reason to stop."""
        with contextlib.suppress(OSError, RunFolderError):
            drop_replaced(self.held)

    @contextlib.contextmanager
    def by_name(self) -> Iterator[None]:
        """Errors of the block name the folder as the person does, and not the handle it is written through."""
        try:
            yield
        except Phi3DistError as error:
            handle = f"/proc/self/fd/{self._handle}"
            if handle not in str(error):
                raise
            raise type(error)(
                *(
                    Problem(*(text.replace(handle, str(self.path)) for text in (p.where, p.what, p.fix)))
                    for p in error.problems
                )
            ) from error

    def write(self, name: str, text: str) -> None:
        """Write a small file so that a reader sees the old or the new text, never half of one."""
        target = self.held / name
        temporary = target.with_name(f".{name}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(target)
        except OSError as error:
            with contextlib.suppress(OSError):  # half of it would keep a full disk full
                temporary.unlink(missing_ok=True)
            where = str(self.path / name)
            raise RunFolderError(Problem(where, f"cannot be written: {error.strerror}", "")) from error

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
        unsaid = {"unsaid_lines": lost_lines()} if lost_lines() else {}
        self.write_json("exit.json", {"code": code, "state": state, "time": time.time(), **who(), **unsaid})

    def forget_exit(self) -> None:
        """A start that goes on has not ended, whatever the one before wrote, and whatever the clock says."""
        with contextlib.suppress(OSError):
            (self.held / "exit.json").unlink(missing_ok=True)

    @contextlib.contextmanager
    def recording_failure(self, *, active: bool) -> Iterator[None]:
        """Whatever ends the block with an error is kept in exit.json, so that `phi3-dist runs` can tell.

        A run that made no step leaves the run that it was to replace as that was.
        """
        try:
            yield
            if active:
                self.drop_replaced_run()
        except BaseException as error:
            # a full disk may be why it failed: `error` is what counts
            with contextlib.suppress(OSError, RunFolderError):
                if active and put_back(self.held):
                    note = "the new run made no step: the run that it was to replace is back"
                    if isinstance(error, Phi3DistError):
                        error.problems += (Problem(str(self.path), note),)
                    error.add_note(f"{self.path}: {note}")
                elif active and (self.held / "config.yaml").is_file() and not self.finished():
                    # a finished run in which a start was refused is finished all the same
                    code = getattr(error, "exit_code", 1)
                    ended = state_of_stop(error.number) if isinstance(error, Stopped) else "failed"
                    self.record_exit(code, ended)
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
