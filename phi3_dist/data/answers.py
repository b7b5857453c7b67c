"""What a tokenized row asks and what it wants: the tokens before its last learned answer, and those of the answer.

Read off ids and mask, so that a prompt is exactly what training has seen before that answer, whatever the row's format.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from phi3_dist.data.token_rows import TokenRows
from phi3_dist.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Question", "last_questions", "spread", "text_of", "without_end"]


@dataclass(frozen=True)
class Question:
    """One prompt as token ids, the wanted answer's ids without the tokens that end it, and where the row stands."""

    prompt: list[int]
    wanted: list[int]
    place: str


def last_questions(rows: TokenRows, which: Sequence[int], stops: Collection[int]) -> list[Question]:
    """The last question of each row. Raises DataError for rows of raw text: nothing in them is asked."""
    found = []
    for row in which:
        start, end = int(rows.offsets[row]), int(rows.offsets[row + 1])
        ids = rows.ids[start:end].tolist()
        learned = np.flatnonzero(rows.supervised[start:end])
        breaks = np.flatnonzero(np.diff(learned) > 1)
        first = int(learned[breaks[-1] + 1]) if len(breaks) else int(learned[0]) if len(learned) else len(ids)
        if first <= 1 or first == len(ids):
            what = "has no question with an answer: it is raw text" if first <= 1 else "has no answer that is learned"
            fix = "give rows of prompts and answers, or leave generated answers out (--generate 0)"
            raise DataError(Problem(str(rows.places[row]), what, fix))
        last = int(learned[-1]) + 1
        found.append(Question(ids[:first], without_end(ids[first:last], stops), str(rows.places[row])))
    return found


def spread(count: int, at_most: int) -> list[int]:
    """`at_most` of `count` numbers from 0 on, evenly spread; all where there are no more."""
    if at_most >= count:
        return list(range(count))
    return [i * count // at_most for i in range(at_most)]


def without_end(ids: Sequence[int], stops: Collection[int]) -> list[int]:
    """`ids` up to the first that ends an answer."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return list(ids[:end])


def text_of(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of an answer: control tokens left out, but for those that were taught, and no white space around it."""
    taught = set(tokenizer.convert_tokens_to_ids(list(tokenizer.init_kwargs.get("taught_tokens", ()))))
    control = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    kept = [token for token in ids if token not in control or token in taught]
    return str(tokenizer.decode(kept, skip_special_tokens=False)).strip()
