"""Attention over packed documents: each backend gets the document boundaries, never a dense mask.

A backend is one function, `(query, key, value, documents, settings) -> output`. Each is registered with
transformers' attention interface, so that the native Phi-3 layers call it. Without a mask function of the same name
transformers builds no mask at all.

Shapes: T tokens of a pack, S of a document, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from phi3_dist.errors import ModelError, Problem
from phi3_dist.machine.probe import package_versions
from phi3_dist.planning.attention import BACKENDS, Backend
from phi3_dist.planning.attention import backends as backends_of_facts

__all__ = [
    "KERNELS",
    "Documents",
    "Settings",
    "attend",
    "backends",
    "block_mask",
    "kernel_name",
    "packed_sdpa",
    "register_backends",
    "registered_name",
    "use_backend",
]

_BLOCK = 128
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Documents:
    """Where the documents of a pack lie: their lengths in tokens, and the running sum from 0 (int32, on the device)."""

    lengths: tuple[int, ...]
    cu_seqlens: Tensor | None = None

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def cumulative(self, device: torch.device) -> Tensor:
        if self.cu_seqlens is not None:
            return self.cu_seqlens
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        return torch.tensor(ends, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Settings:
    """What all heads of a layer share. `window` in positions that a query sees, itself included; None: all."""

    scale: float
    window: int | None = None
    dropout: float = 0.0


Kernel = Callable[[Tensor, Tensor, Tensor, Documents, Settings], Tensor]
"""query (T, N, D), key and value (T, K, D), documents, settings → (T, N, D)."""

_WITH_DROPOUT = ("flash_attention_2", "sdpa")


# --- per-document sdpa: any device ------------------------------------------------------------------------------------


def _document(query_1NSD: Tensor, key_1KSD: Tensor, value_1KSD: Tensor, settings: Settings) -> Tensor:
    """Causal attention inside one document of S tokens, in blocks of queries where the window bites."""
    length, window = query_1NSD.shape[2], settings.window
    options: dict[str, Any] = {
        "enable_gqa": key_1KSD.shape[1] != query_1NSD.shape[1],
        "scale": settings.scale,
        "dropout_p": settings.dropout,
    }
    if window is None or window >= length:
        return F.scaled_dot_product_attention(query_1NSD, key_1KSD, value_1KSD, is_causal=True, **options)
    blocks = []
    for start in range(0, length, window):
        stop, first = min(start + window, length), max(0, start - window + 1)
        q_pos = torch.arange(start, stop, device=query_1NSD.device)[:, None]
        k_pos = torch.arange(first, stop, device=query_1NSD.device)[None, :]
        seen = (k_pos <= q_pos) & (k_pos > q_pos - window)
        keys, values = key_1KSD[:, :, first:stop], value_1KSD[:, :, first:stop]
        queries = query_1NSD[:, :, start:stop]
        blocks.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, **options))
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
        outputs.append(_document(query, key, value, settings)[0].transpose(0, 1))
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
    )
    return out_TND.to(query_TND.dtype)


def _flash_3(query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, documents: Documents, settings: Settings) -> Tensor:
    """flash-attn 3's varlen kernel on the whole pack. Hopper."""
    flash_attn_varlen_func = import_module("flash_attn_interface").flash_attn_varlen_func
    ends, longest = documents.cumulative(query_TND.device), documents.longest
    out = flash_attn_varlen_func(
        *_sixteen(query_TND, key_TKD, value_TKD),
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=settings.scale,
        causal=True,
        window_size=_left_right(settings.window),
    )
    # its first releases give (output, logsumexp), later ones the output alone
    out_TND: Tensor = out[0] if isinstance(out, tuple) else out
    return out_TND.to(query_TND.dtype)


def _varlen(query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, documents: Documents, settings: Settings) -> Tensor:
    """torch's own varlen attention: flash-attention 2 as built into torch."""
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = documents.cumulative(query_TND.device), documents.longest
    query, key, value = _sixteen(query_TND, key_TKD, value_TKD)
    out_TND = varlen_attn(
        query,
        key,
        value,
        ends,
        ends,
        longest,
        longest,
        scale=settings.scale,
        window_size=_left_right(settings.window),
        enable_gqa=query_TND.shape[1] != key_TKD.shape[1],
    )
    assert isinstance(out_TND, Tensor)
    return out_TND.to(query_TND.dtype)


# --- flex attention ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def block_mask(lengths: tuple[int, ...], window: int | None, device: torch.device) -> Any:
    """Documents, causality and window as flex attention's `BlockMask`, from the boundaries alone.

    torch's `create_block_mask` evaluates the whole T × T mask first. Here all follows from one number for each
    query, the first key that it sees, which never decreases: a block of queries sees one run of blocks of keys.
    Cached: every layer of a pack asks for the same one.
    """
    from torch.nn.attention.flex_attention import BlockMask

    total = sum(lengths)
    starts = np.repeat(np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    first = starts if window is None else np.maximum(starts, np.arange(total) - window + 1)
    count = -(-total // _BLOCK)
    first = np.concatenate([first, np.full(count * _BLOCK - total, total - 1)])
    last_rows = np.minimum(np.arange(1, count + 1) * _BLOCK, total) - 1
    blocks = np.arange(count)
    lowest = first[::_BLOCK] // _BLOCK
    lowest_full = np.maximum(-(-first[last_rows] // _BLOCK), lowest)
    seen = (blocks >= lowest[:, None]) & (blocks <= blocks[:, None])
    full = (blocks >= lowest_full[:, None]) & (blocks < blocks[:, None])
    first_T = torch.tensor(first, device=device)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first_T[query])

    def lists(mask: np.ndarray) -> tuple[Tensor, Tensor]:
        """For each row the number of blocks, and their indices first."""
        order = np.argsort(~mask, axis=1, kind="stable")
        numbers = (mask.sum(1)[None, None], order[None, None])
        counts, indices = (torch.tensor(n, dtype=torch.int32, device=device) for n in numbers)
        return counts, indices

    return BlockMask.from_kv_blocks(
        *lists(seen & ~full), *lists(full), BLOCK_SIZE=_BLOCK, mask_mod=mask_mod, seq_lengths=(total, total)
    )


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, documents: Documents, settings: Settings) -> Tensor:
    """flex attention, compiled on CUDA. On a CPU it has no backward and runs uncompiled: for checks only."""
    from torch.nn.attention.flex_attention import flex_attention

    device = query_TND.device
    window = settings.window if settings.window is not None and settings.window < documents.longest else None
    call = _compiled_flex() if device.type == "cuda" else flex_attention
    heads_first = (t.transpose(0, 1)[None].to(value_TKD.dtype) for t in (query_TND, key_TKD, value_TKD))
    out_1NTD = call(
        *heads_first,
        block_mask=block_mask(documents.lengths, window, device),
        scale=settings.scale,
        enable_gqa=query_TND.shape[1] != key_TKD.shape[1],
    )
    out_TND: Tensor = out_1NTD[0].transpose(0, 1)
    return out_TND.to(query_TND.dtype)


# --- the interface to transformers ------------------------------------------------------------------------------------

KERNELS: dict[str, Kernel] = {
    "flash_attention_3": _flash_3,
    "flash_attention_2": _flash_2,
    "varlen": _varlen,
    "sdpa": _sdpa,
    "flex": _flex,
}
assert set(KERNELS) == set(BACKENDS)


def attend(
    name: str, query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, *, documents: Documents, settings: Settings
) -> Tensor:
    """A pack through backend `name`; gives (T, N, D).

    Raises ValueError when the lengths do not cover the pack: then documents would see each other.
    """
    if sum(documents.lengths) != query_TND.shape[0]:
        what = f"cover {query_TND.shape[0]} tokens, got {sum(documents.lengths)}"
        raise ValueError(f"packed attention wants document lengths that {what}")
    if settings.dropout and name not in _WITH_DROPOUT:
        raise ValueError(f"{name} has no dropout, and the base's attention_dropout is {settings.dropout}")
    return KERNELS[name](query_TND, key_TKD, value_TKD, documents, settings)


def _packed(name: str) -> Callable[..., tuple[Tensor, None]]:
    """The kernel as transformers calls an attention function."""

    def attention(
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
        """query (1, N, T, D), key and value (1, K, T, D); `lengths` sum to T. Returns (1, T, N, D).

        Raises ValueError when the lengths do not cover the row: then documents would see each other.
        """
        if attention_mask is not None:
            raise ValueError("packed attention takes document lengths and no mask")
        settings = Settings(scaling, sliding_window, dropout if module.training else 0.0)
        query_TND, key_TKD, value_TKD = (t[0].transpose(0, 1) for t in (query, key, value))
        documents = Documents(tuple(lengths), cu_seqlens)
        out_TND = attend(name, query_TND, key_TKD, value_TKD, documents=documents, settings=settings)
        return out_TND[None].contiguous(), None

    return attention


packed_sdpa = _packed("sdpa")


def registered_name(name: str) -> str:
    """The name under which transformers knows a backend."""
    return f"phi3_dist_packed_{name}"


def kernel_name(config: Any) -> str:
    """The packed backend that a model's configuration names, or empty where it is one of transformers' own."""
    name = str(config._attn_implementation or "")
    return next((kernel for kernel in KERNELS if name == registered_name(kernel)), "")


def register_backends() -> None:
    """Make every backend known to transformers. Calling it again changes nothing."""
    for name in KERNELS:
        AttentionInterface.register(registered_name(name), _packed(name))


# --- which one --------------------------------------------------------------------------------------------------------


def backends(device: torch.device, head_dim: int, dtype: torch.dtype, window: int | None) -> list[Backend]:
    """Every backend on this machine in order of preference, whether it can run, and the reason. See planning."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return backends_of_facts(device.type, head_dim, _DTYPES[dtype], window, package_versions(), capability=capability)


def use_backend(model: nn.Module, name: str, device: torch.device | None = None) -> None:
    """Let `model` (a transformers model) attend through the backend `name` that the plan chose.

    `device` is where it will run; None: where its weights are. Raises ModelError with the reason when the backend
    cannot run there: nothing falls back in silence.
    """
    config: Any = model.config
    weight = next(model.parameters())
    where = device or (weight.device if weight.device.type != "meta" else torch.device("cpu"))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # a float32 model on CUDA may run under autocast: only what the plan knows decides about the precision
    dtype = weight.dtype if weight.dtype in {torch.float16, torch.bfloat16} else torch.bfloat16
    found = backends(where, int(head_dim), dtype, getattr(config, "sliding_window", None))
    chosen = next(one for one in found if one.name == name)
    if not chosen.available:
        raise ModelError(Problem("model.attention", f"{name} was asked for: {chosen.reason}", chosen.fix))
    register_backends()
    model.set_attn_implementation(registered_name(name))  # type: ignore[operator]
