"""Checkpoints: what is trained and nothing of the base, written aside, renamed when whole, verified before use.

    checkpoints/step_000120/
        state.safetensors    weights and Adam moments, full and float32 (training/checkpoints/state.py)
        trainer.json         step, identity of the run, versions, held-out loss
        manifest.json        size and sha256 of the others; written last

A folder without a manifest, or whose files differ from it, is passed over by name, and set aside as damaged-step_000120
once a newer one stands. Dropout and the order of packs are functions of the step, so no generator's state is needed.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from phi3_dist.adapters.durable_files import file_sha256, sync, write_tensors
from phi3_dist.config.json_text import parse_json
from phi3_dist.errors import Problem, TrainingError
from phi3_dist.machine.storage import as_os_error

__all__ = ["Checkpoint", "CheckpointPruner", "find_checkpoint", "read_state", "verify", "write_checkpoint"]

STATE, TRAINER, MANIFEST = "state.safetensors", "trainer.json", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: `step` optimizer steps are done; `trainer` is trainer.json."""

    folder: Path
    step: int
    trainer: Mapping[str, Any]


def write_checkpoint(root: Path, step: int, state: Mapping[str, Tensor], trainer: Mapping[str, Any]) -> Path:
    """Write `root/step_NNNNNN`. Rank 0 alone. On any error nothing stands under that name and no older one is touched.

    `root` lies in a run folder that exists: under a mount that went no new one is made. A link under one of the two
    names is removed and never followed. Raises OSError (no space, read-only, a mount that went).
    """
    target = root / f"step_{step:06d}"
    partial = root / f"step_{step:06d}.tmp"
    root.mkdir(exist_ok=True)
    try:
        for link in (target, partial):
            if link.is_symlink():
                link.unlink()
        _remove(partial)
        partial.mkdir(exist_ok=True)
        try:
            write_tensors(partial / STATE, state)
        except SafetensorError as error:  # safetensors reports a full disk as its own error
            raise as_os_error(error) from error
        (partial / TRAINER).write_text(json.dumps({"step": step, **trainer}, indent=2) + "\n", encoding="utf-8")
        files = {
            n: {"bytes": (partial / n).stat().st_size, "sha256": file_sha256(partial / n)} for n in (STATE, TRAINER)
        }
        for name in files:
            sync(partial / name)
        (partial / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=2) + "\n", encoding="utf-8")
        sync(partial / MANIFEST)
        sync(partial)
        before = root / f"{target.name}.old"
        if target.exists():
            _remove(before)
            target.rename(before)
        partial.rename(target)
        sync(root)
        _remove(before)
    except OSError:
        with contextlib.suppress(OSError):
            _remove(partial)
        raise
    return target


def _numbered(root: Path) -> Iterator[tuple[int, Path]]:
    if not root.is_dir():
        return
    for path in root.iterdir():
        match = re.fullmatch(r"step_(\d{6,})", path.name)
        if match and path.is_dir() and not path.is_symlink():
            yield int(match.group(1)), path


def verify(folder: Path) -> Checkpoint | str:
    """The checkpoint in `folder`, or in one line why it can't be trusted. Raises nothing."""
    try:
        manifest = parse_json((folder / MANIFEST).read_text("utf-8"))
        for name in (STATE, TRAINER):
            said, path = manifest["files"][name], folder / name
            if path.is_symlink() or path.stat().st_size != said["bytes"]:
                return f"{name} is not the {said['bytes']} bytes that were written"
            if file_sha256(path) != said["sha256"]:
                return f"{name} has changed since it was written"
        trainer = parse_json((folder / TRAINER).read_text("utf-8"))
        step = int(trainer["step"])
        if folder.name != f"step_{step:06d}":
            return f"it holds step {step}"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return Checkpoint(folder, step, trainer)


def find_checkpoint(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that was passed over."""
    passed: list[str] = []
    for _, path in sorted(_numbered(root), reverse=True):
        found = verify(path)
        if isinstance(found, Checkpoint):
            return found, passed
        passed.append(f"passed over {path.name}: {found}")
    return None, passed


def read_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a verified checkpoint. Raises TrainingError where they can't be read."""
    try:
        tensors: dict[str, Tensor] = load_file(checkpoint.folder / STATE)
    except (OSError, SafetensorError) as error:
        raise TrainingError(Problem(str(checkpoint.folder), f"cannot be read: {error}", "resume again")) from error
    return tensors


class CheckpointPruner:
    """Which checkpoints of one run stay. Each is verified once by a process, and again when it has changed."""

    def __init__(self, resumed_from: Path | None = None) -> None:
        """`resumed_from`: the checkpoint that the run goes on from. This process never removes it."""
        self._resumed_from = resumed_from.name if resumed_from else None
        self._known: dict[str, tuple[list[tuple[int, ...]], bool]] = {}

    def prune(self, root: Path, keep: int, best_step: int | None, written: int | None = None) -> list[str]:
        """Remove all but the newest `keep` checkpoints that verify, the best, and the one the run went on from.

        `written`: the step that has just been written. Nothing is removed while it doesn't verify. What doesn't verify
        is renamed and counts for nothing. Leftovers of killed saves go. A line for each that was set aside.
        """
        good, notices = [], []
        for step, path in sorted(_numbered(root), reverse=True):
            if self.verifies(path):
                good.append((step, path))
            else:
                notices.append(_set_aside(path))
        if written is None or any(step == written for step, _ in good):
            stay = {best_step, written, *(step for step, _ in good[:keep])}
            for step, path in good:
                if step not in stay and path.name != self._resumed_from:
                    # without its manifest it is no checkpoint any more, whatever of it a kill leaves behind
                    (path / MANIFEST).unlink(missing_ok=True)
                    _remove(path)
        for path in root.iterdir():
            if re.fullmatch(r"step_\d{6,}\.(tmp|old)", path.name) and path.is_dir() and not path.is_symlink():
                _remove(path)
        return notices

    def verifies(self, folder: Path) -> bool:
        """As `verify`, remembered for as long as no file of it changes."""
        stats: list[tuple[int, ...]] = []
        for name in (STATE, TRAINER, MANIFEST):
            try:
                found = (folder / name).lstat()
            except OSError:
                return False
            stats.append((found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
        known = self._known.get(folder.name)
        if known is None or known[0] != stats:
            known = (stats, isinstance(verify(folder), Checkpoint))
            self._known[folder.name] = known
        return known[1]


def _set_aside(folder: Path) -> str:
    """Give a folder that doesn't verify a name that no checkpoint has."""
    why, number, aside = verify(folder), 1, folder.with_name(f"damaged-{folder.name}")
    while aside.exists():
        number += 1
        aside = folder.with_name(f"damaged-{number}-{folder.name}")
    folder.rename(aside)
    return f"{folder.name} is damaged and now called {aside.name}: {why}"


def _remove(folder: Path) -> None:
    """Remove a checkpoint's folder with the files of one. Others stay, and it stays for them. Raises OSError."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        # safetensors writes beside its file and renames
        if path.name in (MANIFEST, STATE, TRAINER) or re.fullmatch(r"\.tmp\w{6}", path.name):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
