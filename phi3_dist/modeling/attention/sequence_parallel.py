"""Attention over a pack whose tokens several ranks share: each rank attends over the whole pack for its heads.

Ulysses' exchange (Jacobs et al., arXiv 2309.14509; DeepSpeed's `UlyssesSPAttentionHF`): before attention an all-to-all
gives each rank every token of its share of the heads, after it another one gives each rank every head of its tokens.
Between the two any kernel runs as in one process, with the boundaries of all documents, so that none sees another.
docs/long-rows.md says why DeepSpeed's own class is not what is called here.

Shapes: T tokens of the whole pack, t of this rank, P ranks, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from phi3_dist.modeling.attention.kernel_interface import Documents, Kernel, Settings

__all__ = ["Rows", "Share", "attend_shared", "equal_parts"]


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of `total`: this rank's of all that the pack has."""

    start: int
    stop: int
    total: int


@dataclass(frozen=True, eq=False)
class Share:
    """This rank's part of a pack: `group` are the ranks that share it, in the order of its tokens.

    `counts` are the tokens of each; `tokens` and `supervised` say which rows of the whole pack are here.
    """

    group: Any
    counts: tuple[int, ...]
    tokens: Rows
    supervised: Rows


def equal_parts(total: int, parts: int) -> tuple[int, ...]:
    """`total` in as many parts, of which the first are one larger where it does not divide."""
    each, more = divmod(total, parts)
    return tuple(each + (number < more) for number in range(parts))


class _Exchange(torch.autograd.Function):
    """All-to-all of rows: `sent` of them to each rank, `received` from each. Backward is the same the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, sent: tuple[int, ...], received: tuple[int, ...]) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), group=group)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out = grad.new_empty(sum(ctx.sent), *grad.shape[1:])
        dist.all_to_all_single(out, grad.contiguous(), list(ctx.sent), list(ctx.received), group=ctx.group)
        return out, None, None, None


def _exchange(x: Tensor, group: Any, sent: tuple[int, ...], received: tuple[int, ...]) -> Tensor:
    out: Tensor = _Exchange.apply(x, group, sent, received)  # type: ignore[no-untyped-call]
    return out


def attend_shared(  # noqa: PLR0917 -- called in one place, by `attend`
    kernel: Kernel,
    query_tND: Tensor,
    key_tKD: Tensor,
    value_tKD: Tensor,
    documents: Documents,
    settings: Settings,
    share: Share,
) -> Tensor:
    """`kernel` over the whole pack, whose documents these are; from this rank's tokens to this rank's tokens.

    Raises ValueError where heads do not divide, or attention has dropout, which no rank could draw for all heads.
    """
    parts, here = len(share.counts), query_tND.shape[0]
    heads, kv_heads = query_tND.shape[1], key_tKD.shape[1]
    if heads % parts or kv_heads % parts:
        raise ValueError(f"{heads} query and {kv_heads} key/value heads do not divide among {parts} ranks")
    if settings.dropout:
        raise ValueError(f"attention_dropout is {settings.dropout}, and heads are spread over {parts} ranks")
    # the heads that go to one rank side by side: one exchange for queries, keys and values
    in_one = [torch.unflatten(x.to(value_tKD.dtype), 1, (parts, -1)) for x in (query_tND, key_tKD, value_tKD)]
    for_each_PtXD = torch.cat([x.transpose(0, 1) for x in in_one], dim=2)
    there = (here,) * parts
    whole_TXD = _exchange(for_each_PtXD.flatten(0, 1), share.group, there, share.counts)
    query, key, value = torch.split(whole_TXD, [heads // parts, kv_heads // parts, kv_heads // parts], dim=1)
    out_TMD = kernel(query, key, value, documents, settings)
    back = _exchange(out_TMD, share.group, share.counts, there)
    return torch.unflatten(back, 0, (parts, here)).transpose(0, 1).flatten(1, 2)
