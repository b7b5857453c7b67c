"""How good the answers to held-out chats are, and what that looks like before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from rich.table import Table
from rich.text import Text

from phi3_dist.data.read.row_formats import Chat
from phi3_dist.data.render.encode import encode_chats
from phi3_dist.modeling.greedy_answers import answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Score", "exact_match", "perplexity", "samples", "score", "side_by_side"]


@dataclass(frozen=True)
class Score:
    """What a model makes of the held-out chats."""

    perplexity: float
    """exp of the mean negative log likelihood over supervised tokens."""
    exact_match: float
    """Share of answers that equal the wanted one, 0 to 1."""
    answers: tuple[str, ...]
    """The answer to each chat's last prompt, in the order of the chats."""


def score(model: Any, tokenizer: PreTrainedTokenizerFast, chats: Sequence[Chat], max_new_tokens: int) -> Score:
    """Perplexity over all answers of the chats, and greedy answers to the last prompt of each."""
    prompts = [[{"role": m.role, "content": m.content} for m in chat.messages[:-1]] for chat in chats]
    answers = answer(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=32)
    return Score(perplexity(model, tokenizer, chats), exact_match(answers, wanted(chats)), tuple(answers))


def wanted(chats: Sequence[Chat]) -> list[str]:
    """The last answer of each chat."""
    return [chat.messages[-1].content for chat in chats]


def exact_match(answers: Sequence[str], right: Sequence[str]) -> float:
    """Share of answers that equal the right one but for white space at the ends. Raises ValueError when empty."""
    if not right:
        raise ValueError("an exact match over no answers means nothing")
    return sum(a.strip() == b.strip() for a, b in zip(answers, right, strict=True)) / len(right)


@torch.no_grad()
def perplexity(model: Any, tokenizer: PreTrainedTokenizerFast, chats: Sequence[Chat]) -> float:
    """exp of the mean negative log likelihood over the supervised tokens of all chats.

    One plain forward pass a row, without packing: a second opinion on the trainer's own held-out loss, which must be
    the logarithm of this number.
    """
    was_training = model.training
    model.eval()
    nll_sum, count = 0.0, 0
    for row in encode_chats(tokenizer, chats, "all"):
        ids_1T = torch.tensor([row.ids], device=model.device)
        # a row's first token is never supervised, it has no prediction
        supervised_T = torch.tensor(row.supervised[1:], device=model.device)
        logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0, :-1]
        nll = F.cross_entropy(logits_TV[supervised_T].float(), ids_1T[0, 1:][supervised_T], reduction="sum")
        nll_sum, count = nll_sum + float(nll), count + int(supervised_T.sum())
    model.train(was_training)
    return math.exp(nll_sum / count)


def side_by_side(before: Score, after: Score) -> Table:
    """Both scores in one table."""
    table = Table(title="held-out chats", title_justify="left", box=None, padding=(0, 3, 0, 0))
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("perplexity", f"{before.perplexity:.2f}", Text(f"{after.perplexity:.2f}", "bold green"))
    table.add_row("exact match", f"{before.exact_match:.0%}", Text(f"{after.exact_match:.0%}", "bold green"))
    return table


def samples(chats: Sequence[Chat], scores: dict[str, Score], count: int = 3) -> Table:
    """The last prompt of the first `count` chats, each answer (`scores`: title → score) and the wanted one."""
    table = Table(title="sample answers", title_justify="left", box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    right = wanted(chats)
    for i, chat in enumerate(chats[:count]):
        for message in chat.messages[:-1]:
            table.add_row(message.role, Text(message.content, "dim"))
        for title, found in scores.items():
            fits = found.answers[i] == right[i]
            table.add_row(title, Text(_one_line(found.answers[i]), "green" if fits else "red"))
        table.add_row("wanted", Text(right[i]), end_section=True)
        if i + 1 < count:
            table.add_row("", "")
    return table


def _one_line(text: str, width: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
