"""The loss: negative log likelihood summed over supervised tokens, and only they reach `lm_head`.

The caller divides by the number of supervised tokens of the *global* batch, so that ranks and accumulation steps
of unequal share count each token once.

Shapes: T tokens of a pack, S of them followed by a supervised token, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

__all__ = ["PackedLoss"]


class PackedLoss(nn.Module):
    """The module that is wrapped and sharded: a PEFT model (or a plain one) whose forward gives the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        return self.model.config

    def forward(
        self,
        *,
        ids_T: Tensor,
        positions_T: Tensor,
        predict_S: Tensor,
        target_S: Tensor,
        cu_seqlens: Tensor,
        lengths: Sequence[int],
    ) -> Tensor:
        """The summed negative log likelihood of `target_S`, a float32 scalar.

        `predict_S` indexes the positions whose next token is supervised; `positions_T` restart with each document;
        `lengths` are the documents' lengths and `cu_seqlens` their running sum, from 0.
        """
        causal_lm: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        hidden_TH = causal_lm.model(
            input_ids=ids_T[None],
            position_ids=positions_T[None],
            use_cache=False,
            cu_seqlens=cu_seqlens,
            lengths=tuple(lengths),
        ).last_hidden_state[0]
        logits_SV = causal_lm.lm_head(hidden_TH[predict_S])
        return F.cross_entropy(logits_SV.float(), target_S, reduction="sum")
