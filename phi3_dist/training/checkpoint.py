"""Checkpoints: what is trained and nothing of the base, written aside, renamed when whole, verified before use.

    checkpoints/step_000120/
        state.safetensors    weights and Adam moments, full and float32 (training/state.py)
        trainer.json         step, identity of the run, versions, held-out loss
        manifest.json        size and sha256 of the others; written last

A folder without a manifest, or whose files differ from it, is passed over by name. Dropout and the order of packs are
functions of the step, so no generator's state is needed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from phi3_dist.adapters.disk import file_sha256, sync, write_tensors
from phi3_dist.errors import Problem, TrainingError

__all__ = ["Checkpoint", "find_checkpoint", "prune", "read_state", "verify", "write_checkpoint"]

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
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            write_tensors(partial / STATE, state)
        except SafetensorError as error:  # safetensors reports a full disk as its own error
            raise OSError(str(error)) from error
        (partial / TRAINER).write_text(json.dumps({"step": step, **trainer}, indent=2) + "\n", encoding="utf-8")
        files = {
            n: {"bytes": (partial / n).stat().st_size, "sha256": file_sha256(partial / n)} for n in (STATE, TRAINER)
        }
        for name in files:
            sync(partial / name)
        (partial / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=2) + "\n", encoding="utf-8")
        sync(partial / MANIFEST)
        sync(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        sync(root)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
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
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        for name in (STATE, TRAINER):
            said, path = manifest["files"][name], folder / name
            if path.is_symlink() or path.stat().st_size != said["bytes"]:
                return f"{name} is not the {said['bytes']} bytes that were written"
            if file_sha256(path) != said["sha256"]:
                return f"{name} has changed since it was written"
        trainer = json.loads((folder / TRAINER).read_text("utf-8"))
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


def prune(root: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one; leftovers of killed saves go too."""
    numbered = sorted(_numbered(root), reverse=True)
    for step, path in numbered[keep:]:
        if step != best_step:
            # without its manifest it is no checkpoint any more, whatever of it a kill leaves behind
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
    for path in root.glob("step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
