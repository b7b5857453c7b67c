"""What a run is made from: base, tokenizer, new tokens and packs, all there before the process group exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phi3_dist.config.schema import RunConfig
from phi3_dist.data.cache.length_notes import note_lengths
from phi3_dist.data.prepare import Prepared, Progress, prepare, row_lengths
from phi3_dist.errors import DataError, Problem
from phi3_dist.modeling.base import Base, find_base, meta_model
from phi3_dist.modeling.lora import peft_config
from phi3_dist.modeling.new_tokens import enlarged, new_token_ids
from phi3_dist.modeling.tokenizer import load_tokenizer
from phi3_dist.training.build import adapter_values

__all__ = ["RunInputs", "count_rows", "find_model", "prepare_rows"]


@dataclass(frozen=True, eq=False)
class RunInputs:
    """The same on every rank."""

    cfg: RunConfig
    base: Base
    tokenizer: Any
    token_ids: Sequence[int]
    """Those of `model.new_tokens`."""
    prepared: Prepared


def find_model(cfg: RunConfig) -> tuple[Base, Any, list[int]]:
    """The base with rows for the new tokens, the tokenizer, and the ids of the new tokens."""
    base = find_base(cfg.model.source, cfg.model.revision)
    peft_config(meta_model(base, torch.float32), cfg.lora, base.source)  # wrong targets are said before all else
    tokenizer = load_tokenizer(cfg.model.tokenizer or cfg.model.source, cfg.model.revision, cfg.model.new_tokens)
    token_ids = new_token_ids(tokenizer, cfg.model.new_tokens, base)
    base = enlarged(base, token_ids)
    if cfg.model.adapter is not None:
        adapter_values(cfg, base, token_ids)
    return base, tokenizer, token_ids


def prepare_rows(
    cfg: RunConfig, tokenizer: Any, cache: Path | None, *, workers: int = 1, progress: Progress | None = None
) -> Prepared:
    """Tokenize and pack before the process group exists: a long preparation can time out no collective."""
    prepared = prepare(cfg.data, tokenizer, cache, workers=workers, progress=progress)
    if int(prepared.train.targets.sum()) == 0:
        raise DataError(Problem("data.train", "no token is supervised", "every row needs an assistant turn"))
    return prepared


def count_rows(cfg: RunConfig, tokenizer: Any, cache: Path, *, workers: int, progress: Progress) -> str:
    """Tokenize, and leave the packs to the start of training, which knows the memory: a line that says so."""
    rows = row_lengths(cfg.data, tokenizer, cache, workers=workers, progress=progress)
    note_lengths(cache, cfg, rows)
    counted = f"{rows.rows:,} rows to train on, {rows.tokens:,} tokens, the longest {rows.longest:,}, in {cache}"
    return f"data   {counted}; data.pack_length is auto: training packs them for its device"
