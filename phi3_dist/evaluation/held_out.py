"""The held-out loss of each row: summed, it is what training measures, per supervised token and over ranks.

Shapes: R rows, T tokens of joined packs, S supervised positions in them, C rows of a chunk of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phi3_dist.data.pack.packs import Packs
from phi3_dist.evaluation.ranks import Ranks
from phi3_dist.inference.open_model import Opened
from phi3_dist.modeling.attention.backend import backends, use_backend
from phi3_dist.training.held_out_loss import ENOUGH_TOKENS, JOINED, joined_packs
from phi3_dist.training.train_step import to_device

__all__ = ["RowLosses", "row_losses"]

_CHUNK_ROWS = 256


@dataclass(frozen=True)
class RowLosses:
    """Of each row: the summed negative log likelihood in nats, and how many tokens were supervised."""

    nll_R: NDArray[np.float64]
    tokens_R: NDArray[np.float64]

    @property
    def loss(self) -> float:
        """Nats per supervised token."""
        return float(self.nll_R.sum() / self.tokens_R.sum())


@contextmanager
def _packed(opened: Opened) -> Iterator[None]:
    """The model attends inside the documents of a pack, by the best backend that can run here."""
    causal_lm, config = opened.causal_lm, opened.causal_lm.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype = torch.bfloat16 if opened.precision == "bf16" else torch.float32
    found = backends(opened.device, int(head_dim), dtype, getattr(config, "sliding_window", None))
    before = config._attn_implementation
    use_backend(causal_lm, next(backend.name for backend in found if backend.available), opened.device)
    try:
        yield
    finally:
        causal_lm.set_attn_implementation(before)


def _token_nll(hidden_SH: Tensor, head: torch.nn.Module, target_S: Tensor) -> Tensor:
    """The negative log likelihood of each target, float32, a chunk of logits at a time."""
    parts = []
    for start in range(0, len(target_S), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        logits_CV = head(hidden_SH[rows]).float()
        parts.append(torch.nn.functional.cross_entropy(logits_CV, target_S[rows], reduction="none"))
    return torch.cat(parts) if parts else hidden_SH.new_zeros(0, dtype=torch.float32)


@torch.no_grad()
def row_losses(
    opened: Opened, packs: Packs, ranks: Ranks, progress: Callable[[int, int], None] = lambda done, of: None
) -> RowLosses:
    """The loss of every row of `packs`, on each rank. Collective: rank r takes groups of packs r, r + w, …"""
    rows, causal_lm, device = packs.rows, opened.causal_lm, opened.device
    nll_R = np.zeros(len(rows.lengths))
    tokens_R = np.zeros(len(rows.lengths))
    groups = joined_packs(packs, max(packs.pack_length, min(JOINED * packs.pack_length, ENOUGH_TOKENS)))
    half = torch.autocast(device.type, torch.bfloat16) if opened.precision == "bf16" else nullcontext()
    with _packed(opened), half:
        for number in range(ranks.rank, len(groups), ranks.world):
            batch = to_device(packs, groups[number], device)
            ids_T, positions_T, predict_S = batch["ids_T"], batch["positions_T"], batch["predict_S"]
            target_S, ends = batch["target_S"], batch["cu_seqlens"]
            assert isinstance(ids_T, Tensor)
            assert isinstance(positions_T, Tensor)
            assert isinstance(predict_S, Tensor)
            assert isinstance(target_S, Tensor)
            assert isinstance(ends, Tensor)
            hidden_TH = causal_lm.model(
                input_ids=ids_T[None],
                position_ids=positions_T[None],
                use_cache=False,
                cu_seqlens=ends,
                lengths=batch["lengths"],
            ).last_hidden_state[0]
            nll_S = _token_nll(hidden_TH.index_select(0, predict_S), causal_lm.lm_head, target_S)
            documents = np.array([row for pack in groups[number] for row in packs.packs[pack]])
            of_S = documents[(torch.searchsorted(ends, predict_S, right=True) - 1).cpu().numpy()]
            np.add.at(nll_R, of_S, nll_S.double().cpu().numpy())
            np.add.at(tokens_R, of_S, 1.0)
            progress(min(number + ranks.world, len(groups)), len(groups))
    return RowLosses(ranks.sum(nll_R), ranks.sum(tokens_R))
