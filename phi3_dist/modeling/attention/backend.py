"""Attention over packed documents, as transformers calls it: each kernel is registered as an attention backend.

transformers' attention interface lets the native Phi-3 layers call them. Without a mask function of the same name
transformers builds no mask at all.

Shapes: T tokens of a pack, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from phi3_dist.errors import ModelError, Problem
from phi3_dist.machine.probe import package_versions, varlen_arguments
from phi3_dist.modeling.attention.kernel_interface import Documents, Settings
from phi3_dist.modeling.attention.packed_kernels import KERNELS, WITH_DROPOUT
from phi3_dist.modeling.attention.sequence_parallel import Share, attend_shared
from phi3_dist.planning.attention_choice import Backend
from phi3_dist.planning.attention_choice import backends as backends_of_facts

__all__ = [
    "attend",
    "backends",
    "kernel_name",
    "packed_sdpa",
    "register_backends",
    "registered_name",
    "use_backend",
]

_DETERMINISTIC = "_deterministic"
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def attend(
    name: str,
    query_TND: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    *,
    documents: Documents,
    settings: Settings,
    share: Share | None = None,
) -> Tensor:
    """A pack through backend `name`, which may end in `_deterministic`; gives (T, N, D).

    With `share` the tokens here are that part of the pack, and the documents those of the whole of it.
    Raises ValueError when the lengths do not cover the pack: then documents would see each other.
    """
    tokens = query_TND.shape[0] if share is None else share.tokens.total
    if sum(documents.lengths) != tokens:
        what = f"cover {tokens} tokens, got {sum(documents.lengths)}"
        raise ValueError(f"packed attention wants document lengths that {what}")
    kernel = name.removesuffix(_DETERMINISTIC)
    if settings.dropout and kernel not in WITH_DROPOUT:
        raise ValueError(f"{kernel} has no dropout, and the base's attention_dropout is {settings.dropout}")
    settings = replace(settings, deterministic=kernel != name)
    if share is not None:
        return attend_shared(KERNELS[kernel], query_TND, key_TKD, value_TKD, documents, settings, share)
    return KERNELS[kernel](query_TND, key_TKD, value_TKD, documents, settings)


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
        share: Share | None = None,
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
        out_TND = attend(name, query_TND, key_TKD, value_TKD, documents=documents, settings=settings, share=share)
        return out_TND[None].contiguous(), None

    return attention


packed_sdpa = _packed("sdpa")


def registered_name(name: str, *, deterministic: bool = False) -> str:
    """The name under which transformers knows a backend, or its deterministic form."""
    return f"phi3_dist_packed_{name}{_DETERMINISTIC if deterministic else ''}"


def kernel_name(config: Any) -> str:
    """The packed backend that a model's configuration names, as `attend` takes it; empty for transformers' own."""
    name = str(config._attn_implementation or "")
    return name.removeprefix(registered_name("")) if name.startswith(registered_name("")) else ""


def register_backends() -> None:
    """Make every backend known to transformers. Calling it again changes nothing."""
    for name in KERNELS:
        AttentionInterface.register(registered_name(name), _packed(name))
        AttentionInterface.register(registered_name(name, deterministic=True), _packed(name + _DETERMINISTIC))


def backends(device: torch.device, head_dim: int, dtype: torch.dtype, window: int | None) -> list[Backend]:
    """Every backend on this machine in order of preference, whether it can run, and the reason. See planning."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return backends_of_facts(
        device.type,
        head_dim,
        _DTYPES[dtype],
        window,
        package_versions(),
        capability=capability,
        varlen_arguments=varlen_arguments(),
    )


def use_backend(
    model: nn.Module, name: str, device: torch.device | None = None, *, deterministic: bool = False
) -> None:
    """Let `model` (a transformers model) attend through the backend `name` that the plan chose.

    `device` is where it will run; None: where its weights are. `deterministic`: gradients are added up in one order,
    where a kernel on a GPU would add them as they come. Raises ModelError with the reason when the backend
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
    if where.type == "cuda":
        # on Hopper sdpa asks cuDNN first, which makes a plan for each new length of a document
        torch.backends.cuda.enable_cudnn_sdp(False)
    register_backends()
    model.set_attn_implementation(registered_name(name, deterministic=deterministic))  # type: ignore[operator]
