"""What a resumed run must share with the first: the identity that checkpoints carry, and where it is compared."""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from phi3_dist.adapters.durable_files import file_sha256
from phi3_dist.adapters.reading import WEIGHTS
from phi3_dist.config.json_text import parse_json
from phi3_dist.config.load import flatten
from phi3_dist.config.schema import RunConfig
from phi3_dist.data.prepare import Prepared
from phi3_dist.errors import ModelError, Problem, TrainingError
from phi3_dist.machine.file_changes import state_of
from phi3_dist.modeling.base import Base
from phi3_dist.modeling.rope import regime_for
from phi3_dist.training.batch_counts import longest_row, order_of, steps_of
from phi3_dist.training.run_folder import versions

__all__ = [
    "HELD_OUT",
    "STEPS",
    "base_fingerprint",
    "changed_keys",
    "check_identity",
    "identity",
]

STEPS, HELD_OUT = "steps", "held-out data"
"""Values of the identity that may change in a way of their own (training/checkpoints/resume_point.py)."""

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
    "train.sequence_parallel",
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
        known = parse_json(known_file.read_text("utf-8"))
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


def identity(
    cfg: RunConfig, prepared: Prepared, base: Base, *, weights: str, precision: str, kernels: str
) -> dict[str, Any]:
    """What a resumed run must share with the first: the config without topology, the data, the base, the libraries.

    `weights` is the base's fingerprint, `precision` and `kernels` what the plan has made of `auto`.
    """
    values = {k: v for k, v in flatten(cfg.model_dump(mode="json")).items() if not k.startswith(FREE)}
    values["data"] = prepared.fingerprint
    values[HELD_OUT] = prepared.held_out.fingerprint if prepared.held_out else None
    values[STEPS] = steps_of(cfg, order_of(cfg, prepared.train))
    values["precision"] = precision
    if cfg.lora.dropout > 0:
        values["dropout masks"] = kernels  # torch's generator and Triton's draw other ones
    values["base weights"] = weights
    values |= _base_identity(base)
    if base.config.rope_parameters.get("rope_type") == "longrope":
        values["LongRoPE factors"] = regime_for(base.config, longest_row(prepared), cfg.model.longrope)
    if cfg.lora.freeze_a and cfg.model.adapter is not None:
        # A is no part of a checkpoint, since it does not train: it has to come from the same file again
        values["frozen A"] = file_sha256(Path(cfg.model.adapter) / WEIGHTS)
    for name in ("torch", "transformers", "peft"):
        values[f"{name} major version"] = versions().get(name, "").split(".")[0]
    # as a checkpoint gives it back: JSON knows no tuples
    again: dict[str, Any] = json.loads(json.dumps(values))
    return again


def _base_identity(base: Base) -> dict[str, Any]:
    """What the base's config.json makes of its weights: norms, rotary tables, windows, quantisation. By dotted keys.

    Of keys that transformers gives to every model only those count that are not at their default: another version may
    have more of them.
    """
    config = {key: value for key, value in base.config.to_diff_dict().items() if key not in _IDLE}
    values = {}
    for key, value in flatten({"base config": config}).items():
        long = isinstance(value, list) and len(value) > 4
        digest = hashlib.sha256(json.dumps(value).encode()).hexdigest() if long else ""
        values[key] = f"{len(value)} values, SHA-256 {digest}" if long else value
    return values


def changed_keys(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[str, ...]:
    """The values in which two identities differ."""
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
        raise TrainingError(
            *problems, Problem("--resume", "the run has changed", f"undo it, or allow it: {keys}{also}")
        )
