"""Going on with a run: what must be the same, where it is checked, and what the run folder must look like."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from phi3_dist.adapters.disk import file_sha256
from phi3_dist.adapters.files import WEIGHTS
from phi3_dist.config.load import flatten
from phi3_dist.config.schema import RunConfig
from phi3_dist.data.batches import Prepared
from phi3_dist.errors import Problem, RunFolderError, TrainingError
from phi3_dist.modeling.base import Base
from phi3_dist.training.checkpoint import Checkpoint, find_checkpoint
from phi3_dist.training.folder import versions
from phi3_dist.training.runtime import Runtime

__all__ = ["agree_on_checkpoint", "base_fingerprint", "check_identity", "cut_metrics", "identity"]

# Keys that change no number of the run, or that a hash of content covers better than a path.
FREE = (
    "name",
    "save.",
    "log.",
    "data.train",
    "data.validation",
    "data.on_",
    "data.format",
    "data.columns",
    "data.split",
    "data.revision",
    "data.max_rows",
    "model.source",
    "model.revision",
    "model.tokenizer",
    "model.adapter",
    "model.attention",
    "model.compile",
    "model.dequantized_layers",
    "model.loss",
    "model.fused_lora",
    "model.fused_layers",
    "model.activation_checkpointing",
    "train.eval_every",
    "train.max_bad_steps",
    "train.micro_batch",
    "train.profile",
)


def base_fingerprint(base: Base, cache: Path) -> str:
    """sha256 over the base's weight files, remembered by path, size and time so that it is computed once."""
    if base.folder is None:
        return base.source
    digest = hashlib.sha256()
    known_file = cache / "weights.json"
    try:
        known = json.loads(known_file.read_text("utf-8"))
    except (OSError, ValueError):
        known = {}
    for path in sorted(base.folder.glob("*.safetensors")):
        facts = path.stat()
        key = f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}"
        if key not in known:
            known[key] = file_sha256(path)
        digest.update(f"{path.name} {known[key]}\n".encode())
    temporary = known_file.with_name(f".{known_file.name}.{os.getpid()}.tmp")
    try:  # a note for the next start alone
        cache.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known), encoding="utf-8")
        temporary.replace(known_file)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return digest.hexdigest()


def identity(cfg: RunConfig, prepared: Prepared, weights: str) -> dict[str, Any]:
    """What a resumed run must share with the first: the config without topology, the data, the base, the libraries."""
    facts = {k: v for k, v in flatten(cfg.model_dump(mode="json")).items() if not k.startswith(FREE)}
    facts["data"] = prepared.fingerprint
    facts["base weights"] = weights
    if cfg.lora.freeze_a and cfg.model.adapter is not None:
        # A is no part of a checkpoint, since it does not train: it has to come from the same file again
        facts["frozen A"] = file_sha256(Path(cfg.model.adapter) / WEIGHTS)
    for name in ("torch", "transformers", "peft"):
        facts[f"{name} major version"] = versions().get(name, "").split(".")[0]
    return facts


def check_identity(saved: Mapping[str, Any], ours: Mapping[str, Any], allowed: Collection[str]) -> None:
    """Raises TrainingError with every difference that `allowed` does not name."""
    problems = [
        Problem(key, f"was {saved.get(key)!r} when the checkpoint was written, is {ours.get(key)!r} now", "")
        for key in sorted({*saved, *ours})
        if saved.get(key) != ours.get(key) and key not in allowed
    ]
    if problems:
        keys = " ".join(f"--allow-changed '{p.where}'" for p in problems)
        raise TrainingError(*problems, Problem("--resume", "the run has changed", f"undo it, or mean it: {keys}"))


def agree_on_checkpoint(runtime: Runtime, root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, as rank 0 finds it, on every rank. Collective."""
    found = [find_checkpoint(root) if runtime.is_main else (None, [])]
    if runtime.world > 1:
        torch.distributed.broadcast_object_list(found)
    return found[0]


def cut_metrics(path: Path, step: int) -> None:
    """Remove the rows of steps after `step`, which will be made again, and lines that are torn or damaged."""
    if not path.exists():
        return
    kept = []
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RunFolderError(Problem(str(path), f"cannot be read: {error.strerror}")) from error
    for line in raw.decode("utf-8", "replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    try:
        if raw.startswith(whole := "".join(kept).encode("utf-8", "replace")):
            os.truncate(path, len(whole))  # needs no room
            return
        temporary.write_bytes(whole)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        what = f"cannot be written, and rows of steps that are made again must go: {error.strerror}"
        raise RunFolderError(Problem(str(path), what, "make room, or make it writable")) from error
