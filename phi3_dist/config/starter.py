"""A first run file for a base model: what its variant speaks for, with the reason beside it, and no more."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from phi3_dist.config.schema import DataConfig, OptimConfig, TrainConfig
from phi3_dist.config.unsafe_texts import is_folder, path_fault
from phi3_dist.errors import ModelError, Problem
from phi3_dist.family.base_config import read_config
from phi3_dist.family.variants import (
    FAMILIES,
    HUB_IDS,
    LINEARS,
    PRESETS,
    Family,
    Preset,
    family_of_hub_id,
    recognise,
)

__all__ = ["FILL_IN_ROWS", "first_run_file"]

FILL_IN_ROWS = "FILL_IN_rows.jsonl"
"""Names no file, so that a run stops there with a message that shows it."""

_USUAL = 2048


def first_run_file(source: str, rows: str = FILL_IN_ROWS) -> str:
    """The text of a run file for `source`, a hub id of the family or a local folder of any Phi-3.

    A variant is recognised by the structure in the folder's config.json, or by the hub id. `rows` is `data.train`.
    Raises ModelError for models that this toolkit doesn't train, and for hub ids that are none of the family's.
    """
    family, preset = _preset(source)
    name = family.name if family else "a Phi-3 of another size"
    data, optim, train = DataConfig(train=rows), OptimConfig(), TrainConfig()
    targets = "all-linear" if set(preset.targets) == set(LINEARS) else f"[{', '.join(preset.targets)}]"
    positions = f"; it has {family.max_positions:,} positions" if family and family.max_positions > 16384 else ""
    return f"""# A first run file for {name}. Every other key has a default; phi3-dist config show FILE prints all.

model:
  source: {json.dumps(source)}
  # what the weights are stored in; auto takes fp32 on hardware where bf16 is slow
  precision: {preset.precision}
data:
  train: {json.dumps(rows)}
  validation_share: {data.validation_share}
  # tokens: {preset.reason}{positions}
  pack_length: {preset.pack_length}
lora:
  r: 16
  alpha: 32
  # {", ".join(preset.targets)}
  targets: {targets}
optim:
  lr: {optim.lr}
  schedule: {optim.schedule}
  warmup: {optim.warmup}
train:
  epochs: 1
  # packs in a step, over all processes
  global_batch: {train.global_batch}
  micro_batch: {train.micro_batch}
"""


def _preset(source: str) -> tuple[Family | None, Preset]:
    what, fix = path_fault(source)
    if what:
        raise ModelError(Problem(source[:100], what, fix))
    if is_folder(source):
        values = read_config(Path(source).expanduser(), source)
        family = recognise(values)
        return family, PRESETS[family.name] if family else _of_another_size(values)
    family = family_of_hub_id(source)
    if family is None:
        what = "is neither a folder with a config.json nor a model of the family"
        raise ModelError(Problem(source, what, f"{_meant(source)}name a folder, or one of {HUB_IDS}"))
    return family, PRESETS[family.name]


def _meant(source: str) -> str:
    """The hub id of the family nearest to what was written, as a question; with or without its owner."""
    ids = {
        spelled.lower(): hub_id
        for f in FAMILIES
        for hub_id in f.hub_ids
        for spelled in (hub_id, hub_id.rpartition("/")[2])
    }
    near = difflib.get_close_matches(source.lower(), ids, n=1, cutoff=0.6)
    return f"did you mean {ids[near[0]]}? Else " if near else ""


def _of_another_size(values: dict[str, object]) -> Preset:
    said = (values.get(f"{kind}max_position_embeddings") for kind in ("original_", ""))
    length = min([_USUAL, *(number for number in said if isinstance(number, int))])
    stored = values.get("dtype") or values.get("torch_dtype")
    precision = "fp32" if stored == "float32" else "bf16"
    return Preset(LINEARS, length, precision, "no more than its positions" if length < _USUAL else "the default")
