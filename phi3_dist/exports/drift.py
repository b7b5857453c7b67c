"""An export held against the live model: PEFT's adapter on the base as it was trained, on real rows.

Shapes: T tokens of a row, V entries of the vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from phi3_dist.adapters.loading import load_adapter
from phi3_dist.config.schema import DataConfig
from phi3_dist.data.blocks import read_chats
from phi3_dist.data.read.row_formats import Chat
from phi3_dist.data.read.turns import Message
from phi3_dist.data.render.encode import encode_chats
from phi3_dist.errors import AdapterError, DataError, Problem
from phi3_dist.exports.open_adapter import Opened, first_line
from phi3_dist.modeling.base import Base, load_full, load_quantized
from phi3_dist.modeling.tokenizer import load_tokenizer

__all__ = [
    "Drift",
    "Rows",
    "compare",
    "compute_dtype",
    "live_logits",
    "live_model",
    "logits_of",
    "plain_model",
    "refuse_drift",
    "rows_for",
    "tokenizer_of",
    "without_adapter",
]

_ROWS, _TOKENS, _READ = 8, 256, 256
_TEXT = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Add 17 and 25.", "17 + 25 = 42."),
    ("Write one line about the sea.", "The sea is wide, and it never says where it ends."),
)


@dataclass(frozen=True)
class Rows:
    """Token ids and which of them are supervised, by row; and where they come from, in words."""

    ids: tuple[tuple[int, ...], ...]
    supervised: tuple[tuple[bool, ...], ...]
    origin: str


@dataclass(frozen=True)
class Drift:
    """What differs between two models on the same rows."""

    error: float
    """Root mean square of the difference of the logits, over that of the live model's, both around their mean."""
    largest: float
    """Largest difference of one logit."""
    effect: float
    """As `error`, between the live model and the base without an adapter."""
    same_choice: float
    """Share of tokens at which both prefer the same next one."""
    loss_live: float
    loss_export: float
    tokens: int
    origin: str

    def __str__(self) -> str:
        loss = f"loss {self.loss_live:.5f} live, {self.loss_export:.5f} exported"
        return (
            f"logits {self.error:.2e} off the live model's (the adapter's own effect is {self.effect:.2e}), at most "
            f"{self.largest:.2e}; the same first choice at {self.same_choice:.2%} of {self.tokens:,} tokens; {loss}, "
            f"on {self.origin}"
        )


def tokenizer_of(opened: Opened) -> Any:
    """The tokenizer in the adapter's folder, else the base's. Raises ModelError."""
    inside = (opened.folder / "tokenizer.json").is_file()
    return load_tokenizer(str(opened.folder) if inside else opened.base.source)


def rows_for(opened: Opened, tokenizer: Any, data: str | None = None) -> Rows:
    """A few rows: of `data`, else held out by the run, else trained on by it, else chats in this file.

    Raises DataError for `data` that can't be read; rows of the run that are gone are said in `origin`.
    """
    if data is not None:
        chats = read_chats(DataConfig(train=data, validation_share=0, max_rows=_READ)).train
        return _encoded(tokenizer, chats, f"rows of {Path(data).name}")
    why = ""
    if opened.run_config is not None:
        try:
            most = min(opened.run_config.data.max_rows or _READ, _READ)
            found = read_chats(opened.run_config.data.model_copy(update={"max_rows": most}))
            if found.held_out:
                return _encoded(tokenizer, found.held_out, "held-out rows of the run")
            return _encoded(tokenizer, found.train, "rows that the run has trained on")
        except DataError as error:
            why = f", since the run's can't be read ({first_line(error)})"
    made = [
        Chat(messages=(Message("user", q), Message("assistant", a)), place=f"chat {i}")
        for i, (q, a) in enumerate(_TEXT)
    ]
    return _encoded(tokenizer, made, f"generated chats{why}")


def _encoded(tokenizer: Any, chats: Sequence[Chat], origin: str) -> Rows:
    encoded = [row for row in encode_chats(tokenizer, list(chats[:_ROWS]), "all") if any(row.supervised)]
    if not encoded:
        raise DataError(Problem(origin, "no row supervises a token", "give rows with answers: --data FILE"))
    ids, supervised = [], []
    for row in encoded:  # of a long one a part that has the end of its first prompt and the beginning of its answer
        start = max(0, list(row.supervised).index(True) - _TOKENS // 2)
        ids.append(tuple(int(i) for i in row.ids[start : start + _TOKENS]))
        supervised.append(tuple(bool(s) for s in row.supervised[start : start + _TOKENS]))
    return Rows(tuple(ids), tuple(supervised), f"{len(ids)} {origin}")


def compute_dtype(base: Base) -> torch.dtype:
    """float32 where the base in it takes less than half of the memory that is free, else the files' own."""
    size = sum(math.prod(base.weights.shape(name)) for name in base.weights.names())
    stored = base.weights.rows("model.embed_tokens.weight", 0, 0).dtype
    base.weights.close()
    return torch.float32 if 4 * size < psutil.virtual_memory().available / 2 else stored


def plain_model(base: Base, dtype: torch.dtype, quantization: str = "none") -> Any:
    """The base on the CPU, as the adapter was trained on it."""
    device = torch.device("cpu")
    if quantization == "none":
        return load_full(base, dtype, device)
    return load_quantized(base, quantization, dtype, device)


@torch.no_grad()
def logits_of(model: Any, rows: Rows) -> list[Tensor]:
    """Logits (T, V) of each row, float32, on the CPU."""
    model.eval()
    device = model.get_input_embeddings().weight.device
    found = []
    for ids in rows.ids:
        ids_1T = torch.tensor([ids], device=device)
        found.append(model(input_ids=ids_1T, use_cache=False).logits[0].float().cpu())
    return found


def live_model(opened: Opened, dtype: torch.dtype) -> Any:
    """PEFT's model, on the base as it was trained."""
    return load_adapter(plain_model(opened.base, dtype, opened.trained_on), opened.folder)


def live_logits(opened: Opened, rows: Rows) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of the live model, and of the same model with its adapter switched off."""
    model = live_model(opened, compute_dtype(opened.base))
    live = logits_of(model, rows)
    with without_adapter(model):
        return live, logits_of(model, rows)


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """The base alone. PEFT warns where biases train, which would stay changed: Phi-3 has none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias", category=UserWarning)
        with model.disable_adapter():
            yield


def _error(ours: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Of logits alone, a constant for all tokens means nothing: both are taken around their mean."""
    off = spread = 0.0
    for one, other in zip(ours, others, strict=True):
        width = min(one.shape[1], other.shape[1])  # a table that was enlarged has more
        a, b = one[:, :width], other[:, :width]
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        off, spread = off + float((a - b).square().sum()), spread + float(a.square().sum())
    return math.sqrt(off / max(spread, 1e-30))


def _loss(logits: Sequence[Tensor], rows: Rows) -> float:
    total, count = 0.0, 0
    for logits_TV, ids, supervised in zip(logits, rows.ids, rows.supervised, strict=True):
        wanted = torch.tensor(supervised[1:])
        ids_T = torch.tensor(ids[1:])
        total += float(F.cross_entropy(logits_TV[:-1][wanted], ids_T[wanted], reduction="sum"))
        count += int(wanted.sum())
    return total / max(count, 1)


def compare(live: Sequence[Tensor], plain: Sequence[Tensor], export: Sequence[Tensor], rows: Rows) -> Drift:
    """Hold `export` against `live`; `plain` is the live model without its adapter."""
    width = min(live[0].shape[1], export[0].shape[1])
    pairs = [(a[:, :width], b[:, :width]) for a, b in zip(live, export, strict=True)]
    same = sum(int((a.argmax(1) == b.argmax(1)).sum()) for a, b in pairs)
    tokens = sum(len(ids) for ids in rows.ids)
    return Drift(
        error=_error(live, export),
        largest=max(float((a - b).abs().max()) for a, b in pairs),
        effect=_error(live, plain),
        same_choice=same / tokens,
        loss_live=_loss(live, rows),
        loss_export=_loss(export, rows),
        tokens=tokens,
        origin=rows.origin,
    )


def refuse_drift(drift: Drift, at_most: float, target: Path) -> None:
    """Raises AdapterError where the export is not the live model."""
    if not drift.error <= at_most:
        what = f"would not be the model that was trained: {drift}; at most {at_most:.0e} is allowed"
        raise AdapterError(
            Problem(str(target), what, "nothing was written; use the adapter with PEFT, and report this")
        )
