"""What a Phi-3 layer does between its matrix products, in fewer passes over memory than transformers' modules take.

RMSNorm, the rotary embedding and SwiGLU are memory-bound: each becomes one autograd function that saves what it must
and writes in place where it may. As in fused_lora.py only `forward` of a stock module is replaced, as an attribute of
that instance, so that names, hooks and files stay transformers'. A call that is not the packed training pass (a cache,
a mask, several rows) goes to the module's own forward.

A layer takes some 10 ms in these passes, 27 as transformers computes them (1,024 tokens, 576 wide, one CPU core). What
passes.py has in two forms is computed as the module's `Passes` say: by hand, or compiled (`model.compile`).

Shapes: T tokens, H hidden, I inner, N query heads, K key/value heads, D head size, R rotated values of a head / 2.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3DecoderLayer, Phi3MLP, Phi3RMSNorm

from phi3_dist.modeling.attention import Documents, Settings, attend, kernel_name
from phi3_dist.modeling.fused_lora import FusedReport, install_forwards
from phi3_dist.modeling.loss import PackedLoss
from phi3_dist.modeling.passes import BY_HAND, Passes

__all__ = ["install_fused_layers", "rms_norm", "rotate", "select_in_last_layer", "swiglu"]

_PASSES = "_fused_passes"


class _RmsNorm(torch.autograd.Function):
    """transformers' order of roundings: normalised in float32, back to the input's type, then the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float, passes: Passes) -> Tensor:
        x32 = x.float()
        rstd = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_H, rstd)
        ctx.passes = passes
        normed: Tensor = (x32 * rstd).to(x.dtype)
        return normed.mul_(weight_H) if weight_H.dtype == x.dtype else weight_H * normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight_H, rstd = ctx.saved_tensors
        return ctx.passes.norm_backward(grad, x, rstd, weight_H), None, None, None


class _Swiglu(torch.autograd.Function):
    """`up · silu(gate)` from the joined projection, which is all that is saved."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, passes: Passes) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.passes = passes
        return passes.swiglu(gate_up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        return ctx.passes.swiglu_backward(grad, gate_up), None


class _Rotate(torch.autograd.Function):
    """The joined projection as rotated queries, rotated keys and values, rotated where they lie.

    The projection's output belongs to nobody else: a linear does not save it. If something did, autograd would find
    its version changed and raise.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos_TR: Tensor, sin_TR: Tensor, heads: int, kv_heads: int, passes: Passes
    ) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin, turned = cos_TR[:, None], sin_TR[:, None], cos_TR.shape[-1]
        all_TXD = qkv.detach().view(qkv.shape[0], heads + 2 * kv_heads, -1)
        moving = all_TXD[:, : heads + kv_heads]
        left, right = moving[..., :turned], moving[..., turned : 2 * turned]
        new_left = (left * cos).addcmul_(right, sin, value=-1)
        right.mul_(cos).addcmul_(left, sin)
        left.copy_(new_left)
        ctx.save_for_backward(cos_TR, sin_TR)
        ctx.passes = passes
        return all_TXD[:, :heads], all_TXD[:, heads : heads + kv_heads], all_TXD[:, heads + kv_heads :]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        grad_qkv = ctx.passes.rotate_backward(grad_query, grad_key, grad_value, *ctx.saved_tensors)
        return grad_qkv, None, None, None, None, None


def rms_norm(x: Tensor, weight_H: Tensor, eps: float, passes: Passes = BY_HAND) -> Tensor:
    """`Phi3RMSNorm` of x (..., H) with a frozen weight."""
    out: Tensor = _RmsNorm.apply(x, weight_H, eps, passes)  # type: ignore[no-untyped-call]
    return out


def swiglu(gate_up: Tensor, passes: Passes = BY_HAND) -> Tensor:
    """`up · silu(gate)` of (..., 2·I), gate first; gives (..., I)."""
    out: Tensor = _Swiglu.apply(gate_up, passes)  # type: ignore[no-untyped-call]
    return out


def rotate(
    qkv_TX: Tensor, cos_TD: Tensor, sin_TD: Tensor, heads: int, kv_heads: int, passes: Passes = BY_HAND
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (T, N, D), keys and values (T, K, D) of a joined projection, queries and keys rotated by their position.

    The memory of `qkv_TX` is used: its content is gone. `cos_TD` and `sin_TD` are transformers', whose second half
    repeats the first; narrower than D, they turn a part of each head.
    """
    turned = cos_TD.shape[-1] // 2
    cos_TR, sin_TR = (t[:, :turned].to(qkv_TX.dtype) for t in (cos_TD, sin_TD))
    query, key, value = _Rotate.apply(qkv_TX, cos_TR, sin_TR, heads, kv_heads, passes)  # type: ignore[no-untyped-call]
    return query, key, value


# --- in place of the modules' own forward -----------------------------------------------------------------------------


def _passes(module: nn.Module) -> Passes:
    passes: Passes = vars(module).get(_PASSES, BY_HAND)
    return passes


def _norm_forward(norm: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, norm.weight, norm.variance_epsilon, _passes(norm))


def _mlp_forward(mlp: Any, hidden_states: Tensor) -> Tensor:
    out: Tensor = mlp.down_proj(swiglu(mlp.gate_up_proj(hidden_states), _passes(mlp)))
    return out


def _attention_forward(
    attention: Any, hidden_states: Tensor, *args: Any, rows_S: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Any]:
    name = kernel_name(attention.config)
    packed = not args and name and kwargs.get("lengths") and hidden_states.shape[0] == 1
    if not packed or kwargs.get("cache") is not None or kwargs.get("attention_mask") is not None:
        assert rows_S is None, "rows are chosen in packed attention alone"
        out: tuple[Tensor, Any] = type(attention).forward(attention, hidden_states, *args, **kwargs)
        return out
    config, (cos, sin) = attention.config, kwargs["position_embeddings"]
    qkv_TX = attention.qkv_proj(hidden_states)[0]
    heads = (config.num_attention_heads, attention.num_key_value_heads)
    query, key, value = rotate(qkv_TX, cos[0], sin[0], *heads, _passes(attention))
    dropout = attention.attention_dropout if attention.training else 0.0
    settings = Settings(attention.scaling, getattr(config, "sliding_window", None), dropout)
    documents = Documents(tuple(kwargs["lengths"]), kwargs.get("cu_seqlens"))
    out_TND = attend(name, query, key, value, documents=documents, settings=settings)
    if rows_S is not None:
        out_TND = out_TND.index_select(0, rows_S)
    return attention.o_proj(out_TND.reshape(1, out_TND.shape[0], -1)), None


def _last_layer_forward(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """Only the rows `predict_S` go on after attention: nothing looks at the others any more. Gives (1, S, H)."""
    rows_S = kwargs.pop("predict_S", None)
    if rows_S is None:
        every_row: Tensor = type(layer).forward(layer, hidden_states, **kwargs)
        return every_row
    attended, _ = layer.self_attn(layer.input_layernorm(hidden_states), rows_S=rows_S, **kwargs)
    hidden_1SH = hidden_states.index_select(1, rows_S) + layer.resid_attn_dropout(attended)
    out_1SH: Tensor = hidden_1SH + layer.resid_mlp_dropout(layer.mlp(layer.post_attention_layernorm(hidden_1SH)))
    return out_1SH


_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    Phi3RMSNorm: _norm_forward,
    Phi3MLP: _mlp_forward,
    Phi3Attention: _attention_forward,
}


def _why_not(module: nn.Module) -> str:
    if isinstance(module, Phi3RMSNorm) and module.weight.requires_grad:
        return "a norm that trains"
    if isinstance(module, Phi3MLP) and module.config.hidden_act not in {"silu", "swish"}:
        return f"an MLP with {module.config.hidden_act}"
    return ""


def select_in_last_layer(model: PackedLoss) -> None:
    """Let the last layer's MLP, and the norms after its attention, see supervised rows alone. The same numbers.

    After `install_fused_layers`. In paired runs of 1,024 tokens, 47 % of them supervised, on one CPU core it took 3 %
    of the time of 6 layers, in 10 of 11 pairs, and 2 % of 20 layers, in 5 of 7.
    """
    layer = model.causal_lm.model.layers[-1]
    if type(layer) is Phi3DecoderLayer and "forward" in vars(layer.self_attn):
        layer.forward = MethodType(_last_layer_forward, layer)
        model.last_layer_selects = True


def install_fused_layers(model: nn.Module, passes: Passes = BY_HAND) -> FusedReport:
    """Give every stock RMSNorm, MLP and attention of a Phi-3 its fused forward, with `passes`. Again is harmless."""
    for module in model.modules():
        if type(module) in _FORWARDS:
            setattr(module, _PASSES, passes)
    return install_forwards(model, lambda m: _FORWARDS.get(type(m)), _why_not, "modules")
