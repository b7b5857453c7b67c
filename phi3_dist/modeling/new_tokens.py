"""Tokens that are taught: which rows they have, how a base without such rows gets them, and where they start."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from phi3_dist.errors import ModelError, Problem
from phi3_dist.modeling.base import Base, zero3_unseen

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["enlarged", "new_token_ids", "token_rows", "whole_tables"]


def new_token_ids(tokenizer: PreTrainedTokenizerFast, new_tokens: Sequence[str], base: Base) -> list[int]:
    """Their ids, which may lie beyond the base's tables: see `enlarged`.

    Raises ModelError where another token lies there too: it would have no row, or one that is not taught and stands in
    no file.
    """
    ids = [int(i) for i in tokenizer.convert_tokens_to_ids(list(new_tokens))]
    rows = int(base.config.vocab_size)
    beyond = {i for i in tokenizer.get_vocab().values() if i >= rows} | {*range(rows, max(ids, default=0) + 1)}
    others = sorted(beyond - {*ids})
    if others:
        named = ", ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(others[:3]))
        what = f"the base's table has {rows:,} rows, and the tokenizer has {len(others):,} more tokens, as {named}"
        place, also = ("model.new_tokens", "teach these too, or ") if ids else ("model.tokenizer", "")
        raise ModelError(Problem(place, what, f"{also}take the base's own tokenizer"))
    return ids


def _tables(base: Base) -> list[str]:
    return ["model.embed_tokens"] + ([] if base.config.tie_word_embeddings else ["lm_head"])


def enlarged(base: Base, ids: Sequence[int]) -> Base:
    """The base with exactly as many rows as `ids` need, for this run: its files stay as they are.

    Phi-3's tables have 32,064 rows for 32,011 tokens: new ones take rows that were padding, and the base keeps its
    shape. Phi-4's have none to spare. An added row is the mean row, on every rank.
    """
    more = max(ids, default=0) + 1 - int(base.config.vocab_size)
    if more <= 0:
        return base
    config = copy.deepcopy(base.config)
    config.vocab_size += more
    return replace(base, config=config, weights=base.weights.enlarged({f"{t}.weight": more for t in _tables(base)}))


def token_rows(base: Base, ids: Sequence[int]) -> dict[str, Tensor]:
    """Where their rows start, under PEFT's saved names: the mean row of each table, equal on every rank.

    The rows themselves are padding, or were added: no training has touched them.
    """
    found = {}
    for table in _tables(base) if ids else ():
        mean = base.weights.mean_row(f"{table}.weight", max(min(ids), 1))
        found[f"base_model.model.{table}.token_adapter.trainable_tokens_delta"] = mean.expand(len(ids), -1).clone()
    base.weights.close()
    return found


@contextmanager
def whole_tables(causal_lm: Any, zero3: Any) -> Iterator[None]:
    """ZeRO-3's shards of embedding and head made whole inside, where PEFT reads rows of them. Collective.

    `zero3` is transformers' HfDeepSpeedConfig, which stays unset inside: PEFT 0.21, where it sees that ZeRO-3 is on,
    reads the rows in a way of its own, which asks for CUDA's current device on a CPU too. That PEFT's token layers
    compute with the weight of the table below them is found out by DeepSpeed itself, in the first forward pass.
    """
    import deepspeed

    tables = {id(m.weight): m.weight for m in (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())}
    with zero3_unseen(zero3), deepspeed.zero.GatheredParameters(list(tables.values())):
        yield
