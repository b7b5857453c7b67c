"""A saved adapter on a base in memory, with the rows that it needs: tokens can be taught beyond the base's tables.

The header of adapter_model.safetensors then says how many rows the tables must have. PEFT 0.21 does not look there, and
on the plain base it ends with an IndexError.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phi3_dist.adapters.files import read_metadata
from phi3_dist.errors import AdapterError, Problem
from phi3_dist.modeling.base import Base
from phi3_dist.modeling.lora import quiet_peft

__all__ = ["load_adapter", "rows_fact", "too_few_rows"]

_ROWS = "base_rows"


def rows_fact(base: Base) -> dict[str, str]:
    """What the header of an adapter says of a base that was enlarged; nothing of another."""
    return {_ROWS: str(base.enlarged_rows)} if base.enlarged_rows else {}


def _needed(folder: Path) -> int:
    said = read_metadata(folder).get(_ROWS, "0")
    if not said.isdecimal():
        what = f"says {_ROWS} {said!r}, which is no number of rows"
        raise AdapterError(Problem(str(folder), what, "save the adapter again"))
    return int(said)


def too_few_rows(folder: Path, rows: int) -> list[Problem]:
    """The problem of a base with `rows` rows that the adapter in `folder` can't be used on, or none."""
    needed = _needed(folder)
    if rows >= needed:
        return []
    what = f"has {rows:,} rows of embedding, and the adapter in {folder} has taught tokens up to row {needed:,}"
    return [Problem("model.source", what, "name the adapter's folder as model.tokenizer, and its model.new_tokens")]


def load_adapter(model: Any, folder: Path) -> Any:
    """The PEFT model of `model`, a Phi3ForCausalLM, and the adapter in `folder`; enlarges its tables where need be.

    Raises AdapterError where the folder's weights can't be read.
    """
    from peft import PeftModel

    needed = _needed(folder)
    if needed > model.get_input_embeddings().num_embeddings:
        # the adapter holds the rows: what they start with is never read
        model.resize_token_embeddings(needed, mean_resizing=False)
    with quiet_peft():
        return PeftModel.from_pretrained(model, str(folder))
