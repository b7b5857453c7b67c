"""What a Phi-3 layer does between its matrix products, in fewer passes over memory than transformers' modules take.

RMSNorm, the rotary embedding and SwiGLU are memory-bound: each becomes one autograd function that saves what it must
and writes in place where it may. As in fused_lora.py only `forward` of a stock module is replaced, as an attribute of
that instance, so that names, hooks and files stay transformers'. A call that is not the packed training pass (a cache,
a mask, several rows) goes to the module's own forward.

A layer takes some 10 ms in these passes, 27 as transformers computes them (1,024 tokens, 576 wide, one CPU core). What
passes.py has in several forms is computed as the module's `Passes` say: by hand, compiled (`model.compile`), or by
Triton's kernels (`model.kernels`), and then a decoder layer's own forward hands the residual to the norm behind it.

Shapes: T tokens, H hidden, I inner, N query heads, K key/value heads, D head size, R rotated values of a head / 2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3DecoderLayer, Phi3MLP, Phi3RMSNorm

from phi3_dist.modeling.attention.backend import attend, kernel_name
from phi3_dist.modeling.attention.kernel_interface import Documents, Settings
from phi3_dist.modeling.fp8 import Fp8Linear, Fp8Scale, Rows8, note_rows
from phi3_dist.modeling.fused_lora import FusedReport, install_forwards, takes_rows
from phi3_dist.modeling.loss import PackedLoss
from phi3_dist.modeling.passes import BY_HAND, Passes

__all__ = ["add_norm", "install_fused_layers", "rms_norm", "rotate", "select_in_last_layer", "swiglu"]

_PASSES = "_fused_passes"
_HALF = "_fused_half"
_SELECTS = "_fused_selects_rows"


class _RmsNorm(torch.autograd.Function):
    """The norm of x + delta; with `sum_too` that sum as well, whose gradient is added where x's own is made."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight_H: Tensor, eps: float, passes: Passes, sum_too: bool
    ) -> Any:
        total, out, rstd = passes.norm(x, delta, weight_H, eps)
        ctx.save_for_backward(total, weight_H, rstd)
        ctx.passes, ctx.with_delta = passes, delta is not None
        ctx.set_materialize_grads(False)
        return (out, total) if sum_too else out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_sum: Tensor | None = None) -> tuple[Tensor | None, ...]:
        total, weight_H, rstd = ctx.saved_tensors
        grad_x = grad_sum if grad is None else ctx.passes.norm_backward(grad, total, rstd, weight_H, grad_sum)
        return grad_x, grad_x if ctx.with_delta else None, None, None, None, None


class _RmsNorm8(torch.autograd.Function):
    """`_RmsNorm` with the sum, and the norm's rows in FP8 with their scales."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight_H: Tensor, eps: float, passes: Passes
    ) -> tuple[Tensor, ...]:
        assert passes.norm8 is not None
        total, out, rstd, rows = passes.norm8(x, delta, weight_H, eps)
        ctx.save_for_backward(total, weight_H, rstd)
        ctx.passes, ctx.with_delta = passes, delta is not None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*rows)
        return out, total, *rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_sum: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        grads: tuple[Tensor | None, ...] = _RmsNorm.backward(ctx, grad, grad_sum)
        return grads[:5]


class _Swiglu(torch.autograd.Function):
    """`up · silu(gate)` from the joined projection, which is all that is saved.

    `scale`, where the joined projection is FP8's, is what its backward multiplies into the gradient: then the rows of
    both results are left on them in FP8.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, passes: Passes, scale: Fp8Scale | None) -> Any:
        ctx.save_for_backward(gate_up)
        ctx.passes, ctx.scale = passes, scale
        if scale is None:
            return passes.swiglu(gate_up)
        assert passes.swiglu8 is not None
        out, rows = passes.swiglu8(gate_up)
        ctx.mark_non_differentiable(*rows)
        return out, *rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        (gate_up,) = ctx.saved_tensors
        if ctx.scale is None:
            return ctx.passes.swiglu_backward(grad, gate_up), None, None
        out, rows = ctx.passes.swiglu_backward8(grad, gate_up, ctx.scale.rows_O)
        note_rows(out, Rows8(*rows))
        return out, None, None


class _Rotate(torch.autograd.Function):
    """The joined projection as rotated queries, rotated keys and values, rotated where they lie.

    The projection's output belongs to nobody else: a linear does not save it. If something did, autograd would find
    its version changed and raise.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos_TR: Tensor, sin_TR: Tensor, heads: int, kv_heads: int, passes: Passes
    ) -> tuple[Tensor, Tensor, Tensor]:
        joined = qkv.detach()
        passes.rotate(joined, cos_TR, sin_TR, heads, kv_heads)
        all_TXD = joined.view(qkv.shape[0], heads + 2 * kv_heads, -1)
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
    out: Tensor = _RmsNorm.apply(x, None, weight_H, eps, passes, False)  # type: ignore[no-untyped-call]
    return out


def add_norm(
    x: Tensor, delta: Tensor | None, weight_H: Tensor, eps: float, passes: Passes, *, eight: bool = False
) -> tuple[Tensor, Tensor]:
    """The norm of x + delta, and that sum; `eight`: with the norm's rows left on it in FP8."""
    if not eight:
        out, total = _RmsNorm.apply(x, delta, weight_H, eps, passes, True)  # type: ignore[no-untyped-call]
        return out, total
    out, total, *rows = _RmsNorm8.apply(x, delta, weight_H, eps, passes)  # type: ignore[no-untyped-call]
    note_rows(out, Rows8(*rows))
    return out, total


def swiglu(gate_up: Tensor, passes: Passes = BY_HAND, scale: Fp8Scale | None = None) -> Tensor:
    """`up · silu(gate)` of (..., 2·I), gate first; gives (..., I). `scale`: that of an FP8 projection before it."""
    if scale is None or passes.swiglu8 is None:
        out: Tensor = _Swiglu.apply(gate_up, passes, None)  # type: ignore[no-untyped-call]
        return out
    out, *rows = _Swiglu.apply(gate_up, passes, scale)  # type: ignore[no-untyped-call]
    note_rows(out, Rows8(*rows))
    return out


def _halves(table_TD: Tensor, dtype: torch.dtype) -> Tensor:
    """The half that counts. Kept on the table, which all layers share: a view takes its time on the host."""
    known: Tensor | None = getattr(table_TD, _HALF, None)
    if known is None or known.dtype != dtype:
        half = table_TD[..., : table_TD.shape[-1] // 2].flatten(0, -2).to(dtype)
        known = half.clone(memory_format=torch.contiguous_format)  # no view, which would hold the table that holds it
        setattr(table_TD, _HALF, known)
    return known


def rotate(
    qkv_TX: Tensor, cos_TD: Tensor, sin_TD: Tensor, heads: int, kv_heads: int, passes: Passes = BY_HAND
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (T, N, D), keys and values (T, K, D) of a joined projection, queries and keys rotated by their position.

    The memory of `qkv_TX` is used: its content is gone. `cos_TD` and `sin_TD` (or with a 1 before) are transformers',
    whose second half repeats the first; narrower than D, they turn a part of each head.
    """
    cos_TR, sin_TR = _halves(cos_TD, qkv_TX.dtype), _halves(sin_TD, qkv_TX.dtype)
    query, key, value = _Rotate.apply(qkv_TX, cos_TR, sin_TR, heads, kv_heads, passes)  # type: ignore[no-untyped-call]
    return query, key, value


# --- in place of the modules' own forward -----------------------------------------------------------------------------


def _passes(module: nn.Module) -> Passes:
    passes: Passes = vars(module).get(_PASSES, BY_HAND)
    return passes


def _fp8_scale(linear: nn.Module) -> Fp8Scale | None:
    """That of the FP8 base under a LoRA linear which takes FP8 rows, or None."""
    base = getattr(linear, "base_layer", None)
    return base.scale if isinstance(base, Fp8Linear) and takes_rows(linear) else None


def _norm_forward(
    norm: Any, hidden_states: Tensor, *, delta: Tensor | None = None, sum_too: bool = False, eight: bool = False
) -> Any:
    """The norm; with `sum_too` that of the sum with `delta`, and the sum."""
    if sum_too:
        settings = (norm.weight, norm.variance_epsilon, _passes(norm))
        return add_norm(hidden_states, delta, *settings, eight=eight)
    return rms_norm(hidden_states, norm.weight, norm.variance_epsilon, _passes(norm))


def _mlp_forward(mlp: Any, hidden_states: Tensor) -> Tensor:
    gate_up = mlp.gate_up_proj(hidden_states)
    out: Tensor = mlp.down_proj(swiglu(gate_up, _passes(mlp), _fp8_scale(mlp.gate_up_proj)))
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
    qkv_TX = attention.qkv_proj(hidden_states).squeeze(0)  # an index would copy all of it in backward
    heads = (config.num_attention_heads, attention.num_key_value_heads)
    query, key, value = rotate(qkv_TX, cos, sin, *heads, _passes(attention))
    dropout = attention.attention_dropout if attention.training else 0.0
    settings = Settings(attention.scaling, getattr(config, "sliding_window", None), dropout)
    documents = Documents(tuple(kwargs["lengths"]), kwargs.get("cu_seqlens"))
    out_TND = attend(name, query, key, value, documents=documents, settings=settings, share=kwargs.get("share"))
    if rows_S is not None:
        out_TND = out_TND.index_select(0, rows_S)
    rows, count, size = out_TND.shape  # no rows, where a rank has nothing to predict
    return attention.o_proj(out_TND.reshape(1, rows, count * size)), None


def _recomputes(layer: Any) -> bool:
    """Whether a layer's forward is to be recomputed in backward, and it is the forward itself that has to see to it.

    transformers 5.24 does so in the class's forward, in whose place ours stands; 5.17 did around the call.
    """
    asked: bool = layer.gradient_checkpointing and layer.training and torch.is_grad_enabled()
    return asked and "__call__" not in vars(GradientCheckpointingLayer)


def _last_layer_forward(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """Only the rows `predict_S` go on after attention: nothing looks at the others any more. Gives (1, S, H)."""
    if kwargs.get("predict_S") is None:
        kwargs.pop("predict_S", None)
        every_row: Tensor = type(layer).forward(layer, hidden_states, **kwargs)
        return every_row
    if _recomputes(layer):
        recomputed: Tensor = layer._gradient_checkpointing_func(partial(_chosen_rows, layer, **kwargs), hidden_states)
        return recomputed
    return _chosen_rows(layer, hidden_states, **kwargs)


def _chosen_rows(layer: Any, hidden_states: Tensor, *, predict_S: Tensor, **kwargs: Any) -> Tensor:
    rows_S = predict_S
    attended, _ = layer.self_attn(layer.input_layernorm(hidden_states), rows_S=rows_S, **kwargs)
    hidden_1SH = hidden_states.index_select(1, rows_S) + layer.resid_attn_dropout(attended)
    out_1SH: Tensor = hidden_1SH + layer.resid_mlp_dropout(layer.mlp(layer.post_attention_layernorm(hidden_1SH)))
    return out_1SH


def _joined_forward(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The residual is added in the norm behind it, and its gradient in that norm's backward.

    In the last layer only the rows `predict_S` go on after attention, as in `_last_layer_forward`.
    """
    if _recomputes(layer):
        recomputed: Tensor = layer._gradient_checkpointing_func(partial(_joined, layer, **kwargs), hidden_states)
        return recomputed
    return _joined(layer, hidden_states, **kwargs)


def _joined(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    rows_S = kwargs.pop("predict_S", None) if vars(layer).get(_SELECTS, False) else None
    eight = _fp8_scale(layer.self_attn.qkv_proj) is not None
    normed, hidden = layer.input_layernorm(hidden_states, sum_too=True, eight=eight)
    chosen = {} if rows_S is None else {"rows_S": rows_S}
    attended, _ = layer.self_attn(hidden_states=normed, **chosen, **kwargs)
    if rows_S is not None:
        hidden = hidden.index_select(1, rows_S)
    eight = _fp8_scale(layer.mlp.gate_up_proj) is not None
    normed, hidden = layer.post_attention_layernorm(hidden, delta=attended, sum_too=True, eight=eight)
    out: Tensor = hidden + layer.mlp(normed)
    return out


_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    Phi3RMSNorm: _norm_forward,
    Phi3MLP: _mlp_forward,
    Phi3Attention: _attention_forward,
}


def _why_not(module: nn.Module) -> str:
    if isinstance(module, Phi3RMSNorm) and module.weight.requires_grad:
        return "a norm that trains"
    if isinstance(module, Phi3DecoderLayer):
        return _why_not_layer(module)
    if isinstance(module, Phi3MLP) and module.config.hidden_act not in {"silu", "swish"}:
        return f"an MLP with {module.config.hidden_act}"
    return ""


def _why_not_layer(layer: Any) -> str:
    """A layer whose norms are fused already, and with nothing between a product and its residual."""
    if layer.resid_attn_dropout.p or layer.resid_mlp_dropout.p:
        return "a layer with dropout before its residual"
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    return "" if all("forward" in vars(norm) for norm in norms) else "a layer with other norms"


def select_in_last_layer(model: PackedLoss) -> None:
    """Let the last layer's MLP, and the norms after its attention, see supervised rows alone. The same numbers.

    After `install_fused_layers`. In paired runs of 1,024 tokens, 47 % of them supervised, on one CPU core it took 3 %
    of the time of 6 layers, in 10 of 11 pairs, and 2 % of 20 layers, in 5 of 7.
    """
    layer = model.causal_lm.model.layers[-1]
    if type(layer) is Phi3DecoderLayer and "forward" in vars(layer.self_attn):
        setattr(layer, _SELECTS, True)
        if getattr(vars(layer).get("forward"), "__func__", None) is not _joined_forward:
            layer.forward = MethodType(_last_layer_forward, layer)
        model.last_layer_selects = True


def install_fused_layers(model: nn.Module, passes: Passes = BY_HAND) -> FusedReport:
    """Give every stock RMSNorm, MLP and attention of a Phi-3 its fused forward, with `passes`. Again is harmless."""
    for module in model.modules():
        if type(module) in _FORWARDS:
            setattr(module, _PASSES, passes)
    report = install_forwards(model, lambda m: _FORWARDS.get(type(m)), _why_not, "modules")
    if passes.with_residual:
        layers = install_forwards(model, lambda m: _joined_forward if type(m) is Phi3DecoderLayer else None, _why_not)
        report = FusedReport(report.fused + layers.fused, {**report.kept, **layers.kept}, report.unit)
    return report
