"""Tokens that are taught: which rows they have, and where those start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from phi3_dist.errors import ModelError, Problem
from phi3_dist.modeling.base import Base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["new_token_ids", "token_rows"]


def new_token_ids(tokenizer: PreTrainedTokenizerFast, new_tokens: Sequence[str], base: Base) -> list[int]:
    """Their ids. Raises ModelError where the base has no row for one.

    Phi-3's tables have 32,064 rows for 32,011 tokens: new ones take rows that were padding, and the base keeps its
    shape.
    """
    ids = [int(i) for i in tokenizer.convert_tokens_to_ids(list(new_tokens))]
    rows = int(base.config.vocab_size)
    beyond = [token for token, i in zip(new_tokens, ids, strict=True) if i >= rows]
    if beyond:
        free = len(new_tokens) - len(beyond)
        what = f"{len(new_tokens)} tokens, and the base's table of {rows:,} rows has room for {free}"
        fix = "teach fewer, or reuse tokens that the tokenizer has and no row uses, such as <|placeholder1|>"
        raise ModelError(Problem("model.new_tokens", what, fix))
    return ids


def token_rows(base: Base, ids: Sequence[int]) -> dict[str, Tensor]:
    """Where their rows start, under PEFT's saved names: the mean row of each table, equal on every rank.

    The rows themselves are padding, which no training has touched.
    """
    tables = ["model.embed_tokens"] + ([] if base.config.tie_word_embeddings else ["lm_head"])
    found = {}
    for table in tables if ids else ():
        mean = base.weights.whole(f"{table}.weight")[: max(min(ids), 1)].float().mean(0)
        found[f"base_model.model.{table}.token_adapter.trainable_tokens_delta"] = mean.expand(len(ids), -1).clone()
    base.weights.close()
    return found
