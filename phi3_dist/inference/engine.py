"""Answers to many prompts at once: a batch that rows leave as they end and that waiting prompts join.

Rows are padded on the left, so that the newest token of each stands in the last column. Keys and values lie in buffers
that grow by half: a step writes one column, where transformers' DynamicCache copies all of them. Once a quarter of the
rows has ended, they are taken out, and as many waiting prompts are read in one pass and set beside the others.

Shapes: B rows, T columns of the cache, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Phi3Model
from transformers.cache_utils import DynamicCache, DynamicLayer

__all__ = ["GREEDY", "Answer", "Sampling", "answers", "stream"]

_PREFILL_TOKENS = 8192
"""Tokens, padding included, that are read in one pass."""
_LEAST_ROOM = 64


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature` 0: the likeliest one. `top_k` 0: of all tokens.

    A row draws from a generator of its own, from the seed and its number: no other row changes its answer.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(f"temperature is at least 0, top_p above 0 and at most 1, top_k at least 0: {self}")


GREEDY = Sampling()


@dataclass(frozen=True)
class Answer:
    """New tokens without the one that ended them; `ended` by a stop id, or cut off at the most tokens allowed."""

    ids: list[int]
    ended: bool
    prompt_tokens: int


class _Layer(DynamicLayer):  # type: ignore[misc]
    """Keys and values (B, K, T, D) as views of buffers with room to the right."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length, more = self.get_seq_length(), key_states.shape[-2]
        if not self._buffers or self._buffers[0].shape[-2] < length + more:
            self._grow(key_states, value_states, length, length + more)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, length : length + more] = new
        self.keys, self.values = (buffer[:, :, : length + more] for buffer in self._buffers)
        return self.keys, self.values

    def _grow(self, keys: Tensor, values: Tensor, length: int, needed: int) -> None:
        room = max(needed + _LEAST_ROOM, needed * 3 // 2)
        buffers = []
        for old, new in ((self.keys, keys), (self.values, values)):
            buffer = new.new_zeros((*new.shape[:2], room, new.shape[-1]))
            if length:
                buffer[:, :, :length] = old
            buffers.append(buffer)
        self._buffers = buffers

    def keep(self, rows: Tensor, first: int) -> None:
        """Only these rows, from column `first` on."""
        self.keys, self.values = (t[:, :, first:].index_select(0, rows) for t in (self.keys, self.values))
        self._buffers = [self.keys, self.values]

    def join(self, other: _Layer) -> None:
        """The rows of `other` below these, both padded on the left to one length."""
        length = max(self.get_seq_length(), other.get_seq_length())
        self.keys, self.values = (
            torch.cat([_padded(ours, length), _padded(theirs, length)])
            for ours, theirs in ((self.keys, other.keys), (self.values, other.values))
        )
        self._buffers = [self.keys, self.values]


def _padded(tensor: Tensor, length: int) -> Tensor:
    missing = length - tensor.shape[-2]
    return torch.nn.functional.pad(tensor, (0, 0, missing, 0)) if missing else tensor


@dataclass
class _Row:
    number: int
    length: int
    """Tokens in the cache."""
    prompt_tokens: int
    generator: torch.Generator | None
    new: list[int] = field(default_factory=list)
    done: bool = False


@cache
def _cache_argument() -> str:
    """transformers calls it `cache` since 5.20 or so, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(Phi3Model.forward).parameters else "past_key_values"


class _Batch:
    """The rows under way."""

    def __init__(self, causal_lm: Any, sampling: Sampling, stops: Collection[int], at_most: int) -> None:
        self.causal_lm, self.sampling, self.stops, self.at_most = causal_lm, sampling, set(stops), at_most
        self.rows: list[_Row] = []
        self.layers: list[_Layer] = []

    def _forward(self, layers: list[_Layer], ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """The logits of the last column, (B, V)."""
        past = DynamicCache()
        past.layers = layers
        out = self.causal_lm(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            use_cache=True,
            logits_to_keep=1,
            **{_cache_argument(): past},
        )
        logits_BV: Tensor = out.logits[:, -1].float()
        return logits_BV

    def add(self, prompts: Sequence[tuple[int, list[int]]]) -> None:
        """Read prompts (number, ids) in one pass, choose the first token of each, and set them beside the others."""
        device = self.causal_lm.device
        lengths = [len(ids) for _, ids in prompts]
        longest, fill = max(lengths), next(iter(self.stops))  # masked away: any id will do
        ids_BT = torch.tensor([[fill] * (longest - len(ids)) + ids for _, ids in prompts], device=device)
        columns_T, first_B1 = (
            torch.arange(longest, device=device),
            longest - torch.tensor(lengths, device=device)[:, None],
        )
        layers = [_Layer() for _ in range(self.causal_lm.config.num_hidden_layers)]
        positions_BT = (columns_T - first_B1).clamp(min=0)
        logits_BV = self._forward(layers, ids_BT, (columns_T >= first_B1).long(), positions_BT)
        rows = [_Row(number, len(ids), len(ids), self._generator(number)) for number, ids in prompts]
        self._choose(rows, logits_BV)
        if self.layers:
            for ours, theirs in zip(self.layers, layers, strict=True):
                ours.join(theirs)
        else:
            self.layers = layers
        self.rows += rows

    def step(self) -> None:
        """One more token of each row."""
        device = self.causal_lm.device
        lengths_B1 = torch.tensor([[row.length] for row in self.rows], device=device)
        columns = self.layers[0].get_seq_length() + 1
        mask_BT = (torch.arange(columns, device=device) >= columns - 1 - lengths_B1).long()
        ids_B1 = torch.tensor([[row.new[-1]] for row in self.rows], device=device)
        logits_BV = self._forward(self.layers, ids_B1, mask_BT, lengths_B1)
        for row in self.rows:
            row.length += 1
        self._choose(self.rows, logits_BV)

    def drop_ended(self) -> None:
        """Take ended rows out of the cache, and columns that no other row reaches."""
        stay = [i for i, row in enumerate(self.rows) if not row.done]
        if len(stay) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in stay]
        if not stay:
            self.layers = []
            return
        first = self.layers[0].get_seq_length() - max(row.length for row in self.rows)
        rows = torch.tensor(stay, device=self.causal_lm.device)
        for layer in self.layers:
            layer.keep(rows, first)

    def _generator(self, number: int) -> torch.Generator | None:
        if self.sampling.temperature == 0:
            return None
        return torch.Generator().manual_seed((self.sampling.seed * 1_000_003 + number) % 2**63)

    def _choose(self, rows: Sequence[_Row], logits_BV: Tensor) -> None:
        if self.sampling.temperature == 0:
            chosen = logits_BV.argmax(-1).tolist()
        else:
            drawn_B1 = torch.cat([torch.rand(1, 1, generator=row.generator, dtype=torch.float64) for row in rows])
            chosen = _sampled(logits_BV, self.sampling, drawn_B1.to(logits_BV.device)).tolist()
        for row, token in zip(rows, chosen, strict=True):
            if not row.done:
                row.new.append(int(token))
                row.done = row.new[-1] in self.stops or len(row.new) >= self.at_most


def _sampled(logits_BV: Tensor, sampling: Sampling, drawn_B1: Tensor) -> Tensor:
    """The token at `drawn` (0 to 1) of the cumulated probabilities of those that top_k and top_p leave; (B,)."""
    scaled_BV, order_BV = (logits_BV / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        scaled_BV, order_BV = scaled_BV[:, : sampling.top_k], order_BV[:, : sampling.top_k]
    sums_BV = scaled_BV.double().softmax(-1).cumsum(-1)
    # the token with which the sum reaches top_p still counts
    reached_B1 = (sums_BV < sampling.top_p).sum(-1, keepdim=True).clamp(max=sums_BV.shape[-1] - 1)
    limit_B1 = sums_BV.gather(1, reached_B1)
    place_B1 = torch.searchsorted(sums_BV, drawn_B1 * limit_B1, right=True).minimum(reached_B1)
    return order_BV.gather(1, place_B1)[:, 0]


def _inner(model: Any) -> Any:
    """The transformers model, whose linears PEFT has replaced: its own call takes less time and gives the same."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@torch.no_grad()
def answers(
    model: Any,
    prompts: Sequence[list[int]],
    stops: Collection[int],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    sampling: Sampling = GREEDY,
    numbers: Sequence[int] | None = None,
) -> Iterator[tuple[int, Answer]]:
    """(place in `prompts`, answer) of every prompt, as they end.

    `model` is a Phi3ForCausalLM or a PeftModel around one, with one of transformers' own attention backends. Greedy
    answers are those of `model.generate`, but where two tokens are as likely to rounding. `numbers` go into the seeds
    of sampled rows, by default their places: a part of a list gets the answers that it would get in the whole. The
    model's training mode is as before afterwards. Raises ValueError for counts below 1 and for an empty prompt.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) and batch_size ({batch_size}) must be at least 1")
    if not all(prompts):
        raise ValueError("a prompt has no token")
    # the longest first: none of the later ones makes the cache wider; neighbours need the least padding
    places = {number: i for i, number in enumerate(numbers)} if numbers is not None else None
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batch = _Batch(_inner(model), sampling, stops, max_new_tokens)
    was_training = model.training
    model.eval()
    handed_out: set[int] = set()
    try:
        while waiting or batch.rows:
            alive = sum(not row.done for row in batch.rows)
            if not alive or alive <= len(batch.rows) * 3 // 4 or (waiting and alive <= batch_size * 3 // 4):
                batch.drop_ended()
                while waiting and len(batch.rows) < batch_size:
                    batch.add(
                        [
                            (numbers[i] if numbers is not None else i, prompts[i])
                            for i in _next(waiting, prompts, batch_size - len(batch.rows))
                        ]
                    )
            else:
                batch.step()
            for row in batch.rows:
                if row.done and row.number not in handed_out:
                    handed_out.add(row.number)
                    ended = row.new[-1] in batch.stops
                    ids = row.new[:-1] if ended else row.new
                    yield (
                        places[row.number] if places is not None else row.number,
                        Answer(list(ids), ended, row.prompt_tokens),
                    )
    finally:
        model.train(was_training)


def _next(waiting: list[int], prompts: Sequence[list[int]], at_most: int) -> list[int]:
    """Take the next prompts off the list: as many as may be read in one pass, one at least."""
    taken = [waiting.pop()]
    while waiting and len(taken) < at_most and (len(taken) + 1) * len(prompts[taken[0]]) <= _PREFILL_TOKENS:
        taken.append(waiting.pop())
    return taken


@torch.no_grad()
def stream(
    model: Any,
    prompt: list[int],
    stops: Collection[int],
    *,
    max_new_tokens: int = 1024,
    sampling: Sampling = GREEDY,
) -> Iterator[int]:
    """The new tokens of one answer, each as soon as it is known; the one that ends it is not given."""
    batch = _Batch(_inner(model), sampling, stops, max_new_tokens)
    was_training = model.training
    model.eval()
    try:
        batch.add([(0, prompt)])
        (row,) = batch.rows
        while row.new[-1] not in batch.stops:
            yield row.new[-1]
            if row.done:
                return
            batch.step()
    finally:
        model.train(was_training)
