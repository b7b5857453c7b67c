"""The loss: negative log likelihood summed over supervised tokens, and only they reach `lm_head`.

The caller divides by the number of supervised tokens of the *global* batch, so that ranks and accumulation steps
of unequal share count each token once.

Shapes: T tokens of a pack, S of them followed by a supervised token, C rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from phi3_dist.modeling.attention.sequence_parallel import Share
from phi3_dist.planning.facts import Choice

__all__ = ["CHUNK_ROWS", "HeadLoss", "Kernel", "PackedLoss", "chunked_nll", "liger_nll", "plain_head"]

Kernel = Literal["chunked", "liger"]

CHUNK_ROWS = {"cpu": 128}
"""Rows of logits that exist at a time, where it is not 512 (63 MiB of 32,064 in float32).

On two CPU cores 1,024 rows, 576 wide, took 267 ms in chunks of 128, 288 in 256 or 512, 298 in 64, 371 in 32, and 376
through the plain call: the passes over a small chunk stay in the cache.
"""


class _ChunkedNll(torch.autograd.Function):
    """Loss and gradients chunk by chunk in the forward pass, so that the logits of one chunk are all that ever exist.

    The loss is the end of the graph: its gradient with respect to the hidden rows is known as soon as the logits
    are, up to the scalar that backward brings.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        target_S: Tensor,
        chunk_rows: int,
        wanted: tuple[bool, bool, bool],
    ) -> Tensor:
        nll = torch.zeros((), dtype=torch.float32, device=hidden_SH.device)
        grad_hidden_SH = torch.empty_like(hidden_SH) if wanted[0] else None
        # float32 sums: chunks are added up, and 16 bits would lose the small ones
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if wanted[1] else None
        grad_bias_V = torch.zeros_like(weight_VH[:, 0], dtype=torch.float32) if wanted[2] else None
        for start in range(0, hidden_SH.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            hidden_CH, target_C1 = hidden_SH[rows], target_S[rows, None]
            logits_CV = F.linear(hidden_CH, weight_VH, bias_V).float()
            # in place, which takes half the time of logsumexp, sub_ and exp_
            logits_CV.sub_(logits_CV.amax(dim=-1, keepdim=True))
            of_target_C1 = logits_CV.gather(1, target_C1)
            sum_C1 = logits_CV.exp_().sum(dim=-1, keepdim=True)
            nll += (sum_C1.log() - of_target_C1).sum()
            if not any(wanted):
                continue
            grad_CV = logits_CV.div_(sum_C1)
            grad_CV.scatter_add_(1, target_C1, grad_CV.new_full((1, 1), -1.0).expand_as(target_C1))
            grad_CV = grad_CV.to(weight_VH.dtype)
            if grad_hidden_SH is not None:
                torch.mm(grad_CV, weight_VH, out=grad_hidden_SH[rows])
            if grad_weight_VH is not None and weight_VH.dtype == torch.float32:
                grad_weight_VH.addmm_(grad_CV.T, hidden_CH)
            elif grad_weight_VH is not None:
                grad_weight_VH += grad_CV.T @ hidden_CH
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0, dtype=torch.float32)
            del logits_CV, grad_CV  # else they live beside the next chunk's
        ctx.save_for_backward(grad_hidden_SH, grad_weight_VH, grad_bias_V)
        ctx.weight_dtype = weight_VH.dtype
        return nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_SH, weight_VH, bias_V = ctx.saved_tensors
        return (
            None if hidden_SH is None else hidden_SH * grad.to(hidden_SH.dtype),
            None if weight_VH is None else (weight_VH * grad).to(ctx.weight_dtype),
            None if bias_V is None else (bias_V * grad).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _in_autocasts_dtype(
    hidden_SH: Tensor, weight_VH: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    kind = hidden_SH.device.type
    if not torch.is_autocast_enabled(kind):
        return hidden_SH, weight_VH, bias_V
    dtype = torch.get_autocast_dtype(kind)
    return hidden_SH.to(dtype), weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype)


def chunked_nll(
    hidden_SH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_S: Tensor, chunk_rows: int | None = None
) -> Tensor:
    """`cross_entropy(linear(hidden, weight, bias).float(), target, reduction="sum")`, a float32 scalar, in chunks.

    Values, gradients and dtypes are those of the plain call, under autocast too. Memory beside the arguments and
    their gradients is that of one chunk of logits. Not twice differentiable.
    """
    chunk_rows = chunk_rows or CHUNK_ROWS.get(hidden_SH.device.type, 512)
    hidden_SH, weight_VH, bias_V = _in_autocasts_dtype(hidden_SH, weight_VH, bias_V)
    grads = torch.is_grad_enabled()
    wanted = (
        grads and hidden_SH.requires_grad,
        grads and weight_VH.requires_grad,
        grads and bias_V is not None and bias_V.requires_grad,
    )
    nll: Tensor = _ChunkedNll.apply(hidden_SH, weight_VH, bias_V, target_S, chunk_rows, wanted)  # type: ignore[no-untyped-call]
    return nll


def liger_nll(hidden_SH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_S: Tensor) -> Tensor:
    """`chunked_nll` by Liger's `LigerFusedLinearCrossEntropyFunction`, whose arguments go by position.

    The signature is that of version 0.8.5, whose kernel gave these losses and gradients in Triton's interpreter on a
    CPU: to 4e-7 in float32, to 1e-2 in bf16. It divides by the number of rows, of which there must be one.
    """
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    hidden_SH, weight_VH, bias_V = _in_autocasts_dtype(hidden_SH, weight_VH, bias_V)
    class_weight, ignored, z_loss, smoothing = None, -100, 0.0, 0.0
    options = (bias_V, class_weight, ignored, z_loss, smoothing, "sum")
    nll: Tensor = LigerFusedLinearCrossEntropyFunction.apply(hidden_SH, weight_VH, target_S, *options)[0]
    return nll


def plain_head(head: nn.Module) -> tuple[nn.Linear | None, str]:
    """The `nn.Linear` whose weight is all that `head` computes with, or None; and the reason, to be shown.

    A head trained in full (`modules_to_save`) counts. LoRA or quantisation on the head does more than its weight
    says: then the module itself has to be called.
    """
    if isinstance(head, ModulesToSaveWrapper):
        active = head.active_adapters
        if head.disable_adapters or not any(name in head.modules_to_save for name in active):
            head = head.original_module
        elif len(active) == 1:
            head = head.modules_to_save[active[0]]
    if type(head) is not nn.Linear:
        return None, f"lm_head is a {type(head).__module__.split('.')[0]} {type(head).__name__}, not a plain nn.Linear"
    return head, "lm_head is a plain nn.Linear"


def _is_whole(linear: nn.Linear) -> bool:
    """Whether this rank holds all of the weight now. FSDP2 and ZeRO-3 gather it for this forward, or it is a shard."""
    weight: Any = linear.weight
    return tuple(weight.shape) == (linear.out_features, linear.in_features) and not hasattr(weight, "device_mesh")


class HeadLoss(nn.Module):
    """`lm_head` and cross-entropy, in chunks where the head is plain, else through the head's own forward.

    It owns no parameters. It is a module because ZeRO-3 gathers the weight that a forward pass touches for the
    time of that pass: here it is released right after, and not held during the whole model's.
    """

    def __init__(self, chunk_rows: int | None = None, kernel: Kernel = "chunked") -> None:
        super().__init__()
        self.chunk_rows = chunk_rows
        self.kernel = kernel

    def forward(self, hidden_SH: Tensor, target_S: Tensor | None, head: nn.Module) -> Tensor:
        """The summed negative log likelihood of `target_S`, a float32 scalar; for None the likeliest tokens (S,)."""
        if target_S is None:
            likeliest_S: Tensor = head(hidden_SH).argmax(-1)
            return likeliest_S
        linear, _ = plain_head(head)
        if linear is not None and _is_whole(linear):
            if self.kernel == "liger" and len(target_S):
                return liger_nll(hidden_SH, linear.weight, linear.bias, target_S)
            return chunked_nll(hidden_SH, linear.weight, linear.bias, target_S, self.chunk_rows)
        return F.cross_entropy(head(hidden_SH).float(), target_S, reduction="sum")


class PackedLoss(nn.Module):
    """The module that is wrapped and sharded: a PEFT model (or a plain one) whose forward gives the loss.

    With `last_layer_selects` the model takes `predict_S` too and gives those rows alone.
    """

    def __init__(self, model: nn.Module, chunk_rows: int | None = None, kernel: Kernel = "chunked") -> None:
        super().__init__()
        self.model = model
        self.head_loss = HeadLoss(chunk_rows, kernel)
        self.last_layer_selects = False
        self.in_use: Any = None  # a whole_dropout.ShareInUse, where ranks share packs and draw dropout

    def loss_choice(self) -> Choice:
        """How the loss is computed and why, for the lines at start."""
        linear, why = plain_head(self.causal_lm.lm_head)
        in_chunks = "by Liger's kernel" if self.head_loss.kernel == "liger" else "in chunks"
        return Choice("loss", in_chunks if linear is not None else "all logits at once", why)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def causal_lm(self) -> Any:
        """The transformers model inside."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def forward(
        self,
        *,
        ids_T: Tensor,
        positions_T: Tensor,
        predict_S: Tensor,
        target_S: Tensor | None,
        cu_seqlens: Tensor,
        lengths: Sequence[int],
        share: Share | None = None,
    ) -> Tensor:
        """The summed negative log likelihood of `target_S`, a float32 scalar; for None the likeliest tokens (S,).

        `predict_S` indexes the positions whose next token is supervised; `positions_T` restart with each document;
        `lengths` are the documents' lengths and `cu_seqlens` their running sum, from 0. With `share` the tokens are a
        part of a pack, `predict_S` counts within it, and the documents are the whole pack's.
        """
        if self.in_use is not None:
            self.in_use.share = share
        causal_lm = self.causal_lm
        hidden_TH = causal_lm.model(
            input_ids=ids_T[None],
            position_ids=positions_T[None],
            use_cache=False,
            cu_seqlens=cu_seqlens,
            lengths=tuple(lengths),
            **({} if share is None else {"share": share}),
            **({"predict_S": predict_S} if self.last_layer_selects else {}),
        ).last_hidden_state.squeeze(0)
        hidden_SH = hidden_TH if self.last_layer_selects else hidden_TH.index_select(0, predict_S)
        loss: Tensor = self.head_loss(hidden_SH, target_S, causal_lm.lm_head)
        return loss
