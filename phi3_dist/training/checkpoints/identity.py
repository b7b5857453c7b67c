"""Going on with a run: what must be the same, where it is checked, and what the run folder must look like."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from phi3_dist.adapters.disk import file_sha256
from phi3_dist.adapters.reading import WEIGHTS
from phi3_dist.config.load import flatten
from phi3_dist.config.schema import RunConfig
from phi3_dist.data.batch import Order
from phi3_dist.data.pack.packs import Packs
from phi3_dist.data.prepare import Prepared
from phi3_dist.errors import ModelError, Problem, RunFolderError, TrainingError
from phi3_dist.machine.file_state import state_of
from phi3_dist.modeling.base import Base
from phi3_dist.modeling.rope import regime_for
from phi3_dist.training.batch_counts import longest_row
from phi3_dist.training.run_folder import versions

__all__ = [
    "HELD_OUT",
    "STEPS",
    "base_fingerprint",
    "changed_keys",
    "check_identity",
    "cut_metrics",
    "identity",
    "order_of",
    "steps_of",
]

STEPS, HELD_OUT = "steps", "held-out data"
"""Facts of the identity that may change in a way of their own (training/checkpoints/resume.py)."""

# Keys that change no number of the run, or that another fact covers better: the content of a path, what `auto` became.
FREE = (
    "name",
    "save.",
    "log.",
    "data.cache",
    "data.train",
    "data.validation",
    "data.on_",
    "data.format",
    "data.columns",
    "data.split",
    "data.subset",
    "data.ignore",
    "data.reasoning",
    "data.revision",
    "data.max_rows",
    "model.source",
    "model.revision",
    "model.tokenizer",
    "model.adapter",
    "model.precision",
    "model.longrope",
    "model.attention",
    "model.compile",
    "model.dequantized_layers",
    "model.loss",
    "model.fused_lora",
    "model.fused_layers",
    "model.kernels",
    "model.activation_checkpointing",
    "train.epochs",
    "train.max_steps",
    "train.eval_every",
    "train.patience",
    "train.min_improvement",
    "eval.",
    "train.max_bad_steps",
    "train.micro_batch",
    "train.profile",
)
# Keys of a base's config.json that make no number of it.
_IDLE = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
_SHOWN_CHARACTERS = 80


def base_fingerprint(base: Base, cache: Path) -> str:
    """sha256 over the base's weight files, remembered by path and inode's state so that it is computed once.

    Raises ModelError for a file that changes while it is read.
    """
    if base.folder is None:
        return base.source
    digest = hashlib.sha256()
    known_file = cache / "weights.json"
    try:
        known = json.loads(known_file.read_text("utf-8"))
    except (OSError, ValueError):
        known = {}
    for path in sorted(base.folder.glob("*.safetensors")):
        state = state_of(path)
        key = " ".join(map(str, (path.resolve(), *state)))
        if key not in known:
            known[key] = file_sha256(path)
            if state_of(path) != state:
                raise ModelError(Problem(str(path), "was changed while it was hashed", "start again when it is whole"))
        digest.update(f"{path.name} {known[key]}\n".encode())
    temporary = known_file.with_name(f".{known_file.name}.{uuid.uuid4().hex}.tmp")  # other runs start beside this one
    try:  # a note for the next start alone
        cache.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known), encoding="utf-8")
        temporary.replace(known_file)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return digest.hexdigest()


def order_of(cfg: RunConfig, packs: Packs) -> Order:
    """The order in which a run takes its packs."""
    return Order(len(packs.packs), cfg.train.global_batch, cfg.train.seed, cfg.train.shuffle)


def steps_of(cfg: RunConfig, order: Order) -> int:
    """The optimizer steps that a run file asks for."""
    return cfg.train.max_steps or order.steps(cfg.train.epochs or 1.0)


def identity(
    cfg: RunConfig, prepared: Prepared, base: Base, *, weights: str, precision: str, kernels: str
) -> dict[str, Any]:
    """What a resumed run must share with the first: the config without topology, the data, the base, the libraries.

    `weights` is the base's fingerprint, `precision` and `kernels` what the plan has made of `auto`.
    """
    facts = {k: v for k, v in flatten(cfg.model_dump(mode="json")).items() if not k.startswith(FREE)}
    facts["data"] = prepared.fingerprint
    facts[HELD_OUT] = prepared.held_out.fingerprint if prepared.held_out else None
    facts[STEPS] = steps_of(cfg, order_of(cfg, prepared.train))
    facts["precision"] = precision
    if cfg.lora.dropout > 0:
        facts["dropout masks"] = kernels  # torch's generator and Triton's draw other ones
    facts["base weights"] = weights
    facts |= _base_identity(base)
    if base.config.rope_parameters.get("rope_type") == "longrope":
        facts["LongRoPE factors"] = regime_for(base.config, longest_row(prepared), cfg.model.longrope)
    if cfg.lora.freeze_a and cfg.model.adapter is not None:
        # A is no part of a checkpoint, since it does not train: it has to come from the same file again
        facts["frozen A"] = file_sha256(Path(cfg.model.adapter) / WEIGHTS)
    for name in ("torch", "transformers", "peft"):
        facts[f"{name} major version"] = versions().get(name, "").split(".")[0]
    # as a checkpoint gives it back: JSON knows no tuples
    again: dict[str, Any] = json.loads(json.dumps(facts))
    return again


def _base_identity(base: Base) -> dict[str, Any]:
    """What the base's config.json makes of its weights: norms, rotary tables, windows, quantisation. By dotted keys.

    Of keys that transformers gives to every model only those count that are not at their default: another version may
    have more of them.
    """
    config = {key: value for key, value in base.config.to_diff_dict().items() if key not in _IDLE}
    facts = {}
    for key, value in flatten({"base config": config}).items():
        long = isinstance(value, list) and len(value) > 4
        digest = hashlib.sha256(json.dumps(value).encode()).hexdigest() if long else ""
        facts[key] = f"{len(value)} values, SHA-256 {digest}" if long else value
    return facts


def changed_keys(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[str, ...]:
    """The facts in which two identities differ."""
    return tuple(key for key in sorted({*saved, *ours}) if saved.get(key) != ours.get(key))


def check_identity(saved: Mapping[str, Any], ours: Mapping[str, Any], allowed: Collection[str], also: str = "") -> None:
    """Raises TrainingError with every difference that `allowed` does not name. `also`: another way out, for the fix."""

    def shown(value: Any) -> str:
        text = repr(value)
        return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"

    problems = [
        Problem(key, f"was {shown(saved.get(key))} when the run was made, is {shown(ours.get(key))} now", "")
        for key in changed_keys(saved, ours)
        if key not in allowed
    ]
    if problems:
        keys = " ".join(f"--allow-changed '{p.where}'" for p in problems)
        raise TrainingError(*problems, Problem("--resume", "the run has changed", f"undo it, or mean it: {keys}{also}"))


def _stays(row: Any, step: int, measured_again: bool) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return False
    return row["step"] < step or (row["step"] == step and not (measured_again and row.get("kind") == "eval"))


def cut_metrics(path: Path, step: int, *, measured_again: bool = False) -> None:
    """Remove the rows of steps after `step`, which will be made again, and lines that are torn or damaged.

    measured_again: the held-out loss after `step` will be taken anew.
    """
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
        if _stays(row, step, measured_again):
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
