"""The attention kernels over packed documents: each gets the document boundaries, never a dense mask.

A kernel is one function, `(query, key, value, documents, settings) -> output`; `KERNELS` names them all.
Shapes: T tokens of a pack, S of a document, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phi3_dist.machine.probe import varlen_arguments
from phi3_dist.modeling.attention.flex import flex
from phi3_dist.modeling.attention.kernel_interface import Documents, Kernel, Settings
from phi3_dist.planning.attention_choice import BACKENDS

__all__ = ["KERNELS", "WITH_DROPOUT"]

WITH_DROPOUT = ("flash_attention_2", "sdpa")


# --- per-document sdpa: any device ------------------------------------------------------------------------------------


def _one_call(query: Tensor, key: Tensor, value: Tensor, *, deterministic: bool, **options: Any) -> Tensor:
    out = F.scaled_dot_product_attention(query, key, value, **options)
    if deterministic and out.is_cuda and out.grad_fn is not None:
        _deterministic_backward(out.grad_fn)
    return out


def _deterministic_backward(node: Any) -> None:
    """Let torch's own kernels add up in one order while `node` runs backward: they ask a global, which no other node
    sees. (torch 2.11 to 2.13, aten/src/ATen/native/transformers/cuda/attention_backward.cu.) That torch would then
    fill new memory with NaN, to show who reads it unwritten, is switched off: it takes a pass over each gradient."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    before = torch.are_deterministic_algorithms_enabled()
    node.register_prehook(lambda _: torch.use_deterministic_algorithms(True))
    node.register_hook(lambda *_: torch.use_deterministic_algorithms(before))


def _document(query_1NSD: Tensor, key_1KSD: Tensor, value_1KSD: Tensor, settings: Settings) -> Tensor:
    """Causal attention inside one document of S tokens, in blocks of queries where the window bites."""
    length, window = query_1NSD.shape[2], settings.window
    options: dict[str, Any] = {
        "enable_gqa": key_1KSD.shape[1] != query_1NSD.shape[1],
        "scale": settings.scale,
        "dropout_p": settings.dropout,
    }
    if window is None or window >= length:
        options["is_causal"] = True
        return _one_call(query_1NSD, key_1KSD, value_1KSD, deterministic=settings.deterministic, **options)
    blocks = []
    for start in range(0, length, window):
        stop, first = min(start + window, length), max(0, start - window + 1)
        q_pos = torch.arange(start, stop, device=query_1NSD.device)[:, None]
        k_pos = torch.arange(first, stop, device=query_1NSD.device)[None, :]
        seen = (k_pos <= q_pos) & (k_pos > q_pos - window)
        keys, values = key_1KSD[:, :, first:stop], value_1KSD[:, :, first:stop]
        queries = query_1NSD[:, :, start:stop]
        options["attn_mask"] = seen
        blocks.append(_one_call(queries, keys, values, deterministic=settings.deterministic, **options))
    return torch.cat(blocks, dim=2)


def _sdpa(query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, documents: Documents, settings: Settings) -> Tensor:
    """One causal `scaled_dot_product_attention` for each document.

    Fewer calls were no faster on two CPU cores, in paired runs of 1,024 tokens forward and backward: documents of
    equal length in one batch ran at 0.64 of the speed (32 of 32 tokens) to 1.03 (5 chats), all of them padded into
    one batch at 0.13 to 0.45, a dense block-diagonal mask at 0.20 to 0.35.
    """
    parts = zip(*(torch.split(t, list(documents.lengths)) for t in (query_TND, key_TKD, value_TKD)), strict=True)
    # sdpa's output lies in memory as (S, N, D): joined along S it is copied once
    outputs = []
    for part in parts:
        query, key, value = (t.transpose(0, 1)[None] for t in part)
        outputs.append(_document(query, key, value, settings).squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


# --- CUDA kernels that take the boundaries ----------------------------------------------------------------------------


def _sixteen(*tensors: Tensor) -> list[Tensor]:
    """In 16 bits, as these kernels want it: under autocast the rotary embedding gives back float32."""
    dtype = tensors[2].dtype if tensors[2].dtype in {torch.float16, torch.bfloat16} else torch.bfloat16
    return [t.to(dtype) for t in tensors]


def _left_right(window: int | None) -> tuple[int, int]:
    """transformers counts the query itself in the window, flash-attention counts the keys before it."""
    return (-1, 0) if window is None else (window - 1, 0)


def _flash_2(query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, documents: Documents, settings: Settings) -> Tensor:
    """flash-attn 2's varlen kernel on the whole pack."""
    from flash_attn import flash_attn_varlen_func

    ends, longest = documents.cumulative(query_TND.device), documents.longest
    out_TND: Tensor = flash_attn_varlen_func(
        *_sixteen(query_TND, key_TKD, value_TKD),
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        dropout_p=settings.dropout,
        softmax_scale=settings.scale,
        causal=True,
        window_size=_left_right(settings.window),
        deterministic=settings.deterministic,
    )
    return out_TND.to(query_TND.dtype)


def _newer_flash(module: str, whole: tuple[int | None, int | None]) -> Kernel:
    """The varlen kernel of flash-attn 3 or 4 on the whole pack; `whole` is what it takes for no window."""

    def kernel(
        query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, documents: Documents, settings: Settings
    ) -> Tensor:
        ends, longest = documents.cumulative(query_TND.device), documents.longest
        out = import_module(module).flash_attn_varlen_func(
            *_sixteen(query_TND, key_TKD, value_TKD),
            cu_seqlens_q=ends,
            cu_seqlens_k=ends,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=settings.scale,
            causal=True,
            window_size=whole if settings.window is None else _left_right(settings.window),
            deterministic=settings.deterministic,
        )
        # the first releases of version 3 give (output, logsumexp), later ones the output alone
        out_TND: Tensor = out[0] if isinstance(out, tuple) else out
        return out_TND.to(query_TND.dtype)

    return kernel


def _varlen(query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, documents: Documents, settings: Settings) -> Tensor:
    """torch's own varlen attention: flash-attention 2 as built into torch."""
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = documents.cumulative(query_TND.device), documents.longest
    query, key, value = _sixteen(query_TND, key_TKD, value_TKD)
    options: dict[str, Any] = {"scale": settings.scale, "window_size": _left_right(settings.window)}
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in varlen_arguments():
        options["enable_gqa"] = True
    elif groups > 1:  # torch 2.11: its kernel is told of as many heads of keys as of queries
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    out_TND = varlen_attn(query, key, value, ends, ends, longest, longest, **options)
    assert isinstance(out_TND, Tensor)
    if settings.deterministic and out_TND.grad_fn is not None:
        _deterministic_backward(out_TND.grad_fn)
    return out_TND.to(query_TND.dtype)


KERNELS: dict[str, Kernel] = {
    "flash_attention_4": _newer_flash("flash_attn.cute", (None, None)),  # CuTe; Hopper and Blackwell
    "flash_attention_3": _newer_flash("flash_attn_interface", _left_right(None)),  # Hopper
    "flash_attention_2": _flash_2,
    "varlen": _varlen,
    "sdpa": _sdpa,
    "flex": flex,
}
assert set(KERNELS) == set(BACKENDS)
