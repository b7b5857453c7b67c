"""Attention over packed documents: each backend gets the document boundaries, never a dense mask.

Registered with transformers' attention interface under `PACKED_SDPA` and `PACKED_FLASH`, so that the native
Phi-3 layers call it. Without a mask function of the same name transformers builds no mask at all.

Shapes: T tokens of a pack, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from phi3_dist.errors import ModelError, Problem

__all__ = ["PACKED_FLASH", "PACKED_SDPA", "packed_flash", "packed_sdpa", "register_backends", "use_backend"]

PACKED_SDPA = "phi3_dist_packed_sdpa"
PACKED_FLASH = "phi3_dist_packed_flash"
_BACKENDS = {"sdpa": PACKED_SDPA, "flash_attention_2": PACKED_FLASH}


def _window_of(sliding_window: int | None, longest: int) -> int | None:
    """The window where it bites: positions that a query sees, itself included; None where no document is longer."""
    return sliding_window if sliding_window is not None and sliding_window < longest else None


def _document(query_1NSD: Tensor, key_1KSD: Tensor, value_1KSD: Tensor, window: int | None, **sdpa: Any) -> Tensor:
    """Causal attention inside one document of S tokens, in blocks of queries where the window bites."""
    length = query_1NSD.shape[2]
    gqa = key_1KSD.shape[1] != query_1NSD.shape[1]
    if _window_of(window, length) is None:
        return F.scaled_dot_product_attention(query_1NSD, key_1KSD, value_1KSD, is_causal=True, enable_gqa=gqa, **sdpa)
    assert window is not None
    blocks = []
    for start in range(0, length, window):
        stop, first = min(start + window, length), max(0, start - window + 1)
        q_pos = torch.arange(start, stop, device=query_1NSD.device)[:, None]
        k_pos = torch.arange(first, stop, device=query_1NSD.device)[None, :]
        seen = (k_pos <= q_pos) & (k_pos > q_pos - window)
        blocks.append(
            F.scaled_dot_product_attention(
                query_1NSD[:, :, start:stop],
                key_1KSD[:, :, first:stop],
                value_1KSD[:, :, first:stop],
                attn_mask=seen,
                enable_gqa=gqa,
                **sdpa,
            )
        )
    return torch.cat(blocks, dim=2)


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    lengths: Sequence[int] = (),
    **_: Any,
) -> tuple[Tensor, None]:
    """One causal `scaled_dot_product_attention` per document. Runs on any device.

    query (1, N, T, D), key and value (1, K, T, D); `lengths` sum to T. Returns (1, T, N, D).
    Raises ValueError when the lengths do not cover the row: then documents would see each other.
    """
    if attention_mask is not None or sum(lengths) != query.shape[2]:
        raise ValueError(
            f"packed attention wants document lengths that cover {query.shape[2]} tokens, got {sum(lengths)}"
        )
    sdpa = {"scale": scaling, "dropout_p": dropout if module.training else 0.0}
    parts = zip(*(torch.split(t, list(lengths), dim=2) for t in (query, key, value)), strict=True)
    out_1NTD = torch.cat([_document(q, k, v, sliding_window, **sdpa) for q, k, v in parts], dim=2)
    return out_1NTD.transpose(1, 2).contiguous(), None


def packed_flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    lengths: Sequence[int] = (),
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """flash-attn 2's varlen kernel on the whole pack. CUDA, fp16 or bf16. Shapes as in `packed_sdpa`."""
    from flash_attn import flash_attn_varlen_func

    if attention_mask is not None or cu_seqlens is None or sum(lengths) != query.shape[2]:
        raise ValueError("packed attention wants the boundaries of the documents, and no mask")
    # transformers counts the query itself in the window, flash-attn counts the keys before it
    window = (sliding_window - 1, 0) if sliding_window is not None else (-1, -1)
    longest = max(lengths)
    dtype = query.dtype if query.dtype in {torch.float16, torch.bfloat16} else torch.bfloat16
    out_TND = flash_attn_varlen_func(
        *(t[0].transpose(0, 1).to(dtype) for t in (query, key, value)),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        dropout_p=dropout if module.training else 0.0,
        softmax_scale=scaling,
        causal=True,
        window_size=window,
    )
    return out_TND.unsqueeze(0).to(query.dtype), None


def register_backends() -> None:
    """Make both backends known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(PACKED_SDPA, packed_sdpa)
    AttentionInterface.register(PACKED_FLASH, packed_flash)


def use_backend(model: nn.Module, name: str) -> None:
    """Let `model` (a transformers model) attend through the backend that the plan chose.

    Raises ModelError when the backend's package is missing: nothing falls back in silence.
    """
    if name == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise ModelError(
            Problem(
                "model.attention",
                "flash_attention_2 was asked for, and the package flash-attn is not installed",
                "pip install flash-attn --no-build-isolation, or model.attention=sdpa",
            )
        )
    register_backends()
    model.set_attn_implementation(_BACKENDS[name])  # type: ignore[operator]
