"""Fused norms, rotary embedding and SwiGLU against transformers' modules: values, gradients, whole models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3MLP, Phi3RMSNorm, apply_rotary_pos_emb

from phi3_dist.bench.counting import RealWatch
from phi3_dist.config.schema import LoraConfig
from phi3_dist.modeling.attention.backend import use_backend
from phi3_dist.modeling.fused_layers import (
    install_fused_layers,
    rms_norm,
    rotate,
    select_in_last_layer,
    swiglu,
)
from phi3_dist.modeling.fused_lora import install_fused
from phi3_dist.modeling.lora import add_lora, fill_adapter
from phi3_dist.modeling.loss import PackedLoss
from phi3_dist.modeling.passes import BY_HAND
from tests.small_models import small_phi3

DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)]


def _same(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    scale = max(float(theirs.detach().abs().max()), 1.0)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)


def _same_gradients(
    got: Sequence[Tensor], want: Sequence[Tensor], ours: Tensor, theirs: Tensor, tolerance: float
) -> None:
    """The gradients that a random weighting of the outputs gives to the two inputs."""
    weights = [torch.randn_like(t) for t in want]
    for outputs in (got, want):
        torch.stack([(t * w).sum() for t, w in zip(outputs, weights, strict=True)]).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    _same(ours.grad, theirs.grad, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_rms_norm_is_phi3s(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    norm = Phi3RMSNorm(48, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight).requires_grad_(False)
    x = (3 * torch.randn(2, 9, 48)).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, want = rms_norm(ours, norm.weight, 1e-5), norm(theirs)
    _same(out, want, tolerance)
    _same_gradients([out], [want], ours, theirs, tolerance)


def test_a_float32_norm_of_16_bits_gives_what_phi3s_gives() -> None:
    norm = Phi3RMSNorm(16).requires_grad_(False)
    x = torch.randn(3, 16).bfloat16()
    assert torch.equal(rms_norm(x, norm.weight, 1e-6), norm(x))


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_swiglu_is_phi3s(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    config = Phi3Config(hidden_size=8, intermediate_size=24, num_attention_heads=2, pad_token_id=None)
    mlp = Phi3MLP(config)
    joined = (3 * torch.randn(2, 5, 48)).to(dtype)
    ours, theirs = joined.clone().requires_grad_(), joined.clone().requires_grad_()
    gate, up = theirs.chunk(2, dim=-1)
    out, want = swiglu(ours), up * mlp.activation_fn(gate)
    _same(out, want, tolerance)
    _same_gradients([out], [want], ours, theirs, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "turned"), [(4, 4, 16), (4, 2, 16), (2, 1, 12)])
def test_rotation_is_phi3s(dtype: torch.dtype, tolerance: float, heads: int, kv_heads: int, turned: int) -> None:
    torch.manual_seed(0)
    tokens, size = 11, 16
    angle = torch.rand(tokens, turned // 2) * 6
    cos, sin = (f(torch.cat([angle, angle], dim=-1)).to(dtype) for f in (torch.cos, torch.sin))
    joined = torch.randn(tokens, (heads + 2 * kv_heads) * size).to(dtype)
    ours, theirs = joined.clone().requires_grad_(), joined.clone().requires_grad_()
    got = rotate(ours * 1.0, cos, sin, heads, kv_heads)
    query, key, value = theirs.view(1, tokens, -1, size).transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
    query, key = apply_rotary_pos_emb(query, key, cos[None], sin[None])
    want = [t[0].transpose(0, 1) for t in (query, key, value)]
    for mine, yours in zip(got, want, strict=True):
        _same(mine, yours, tolerance)
    _same_gradients(got, want, ours, theirs, tolerance)


def test_an_output_that_someone_saved_is_not_turned_in_silence() -> None:
    x = torch.randn(3, 24, requires_grad=True)
    saved = torch.sigmoid(x)  # sigmoid keeps its output for backward
    query, _, _ = rotate(saved, torch.ones(3, 8), torch.zeros(3, 8), 1, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        query.sum().backward()


def _model(**changes: Any) -> PackedLoss:
    causal_lm = small_phi3(**{"sliding_window": 5, **changes})
    causal_lm.name_or_path = "x"
    use_backend(causal_lm, "sdpa")
    model = PackedLoss(add_lora(causal_lm, LoraConfig(r=4, dropout=0.0), "x"))
    fill_adapter(model, 0)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.1)
    return model.train()


def _batch() -> dict[str, Any]:
    lengths = (5, 1, 12, 7)
    ids = torch.randint(0, 97, (25,), generator=torch.Generator().manual_seed(3))
    predict = torch.tensor([0, 2, 3, 8, 9, 16, 20, 23])
    return {
        "ids_T": ids,
        "positions_T": torch.cat([torch.arange(n) for n in lengths]),
        "predict_S": predict,
        "target_S": ids[predict + 1],
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "lengths": lengths,
    }


def _loss_and_grads(model: PackedLoss) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**_batch())
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_a_model_learns_the_same(checkpointing: bool, lora: bool, last: bool) -> None:
    plain, fused = _model(), _model()
    report = install_fused_layers(fused)
    assert (report.fused, report.kept) == (2 * 4 + 1, {})
    assert str(report) == "9 modules"
    if lora:
        install_fused(fused)
    if last:
        select_in_last_layer(fused)
        rows: list[int] = []
        mlp = fused.causal_lm.model.layers[-1].mlp
        mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    if checkpointing:
        fused.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    (want, want_grads), (got, got_grads) = _loss_and_grads(plain), _loss_and_grads(fused)
    if last:
        assert set(rows) == {8}
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert set(got_grads) == set(want_grads)
    for name, grad in want_grads.items():
        torch.testing.assert_close(got_grads[name], grad, rtol=1e-5, atol=3e-6 * float(grad.abs().max()))
    assert list(plain.state_dict()) == list(fused.state_dict())


def test_generation_with_a_cache_goes_to_transformers_attention() -> None:
    plain, fused = _model().eval(), _model().eval()
    for model in (plain, fused):
        model.causal_lm.set_attn_implementation("sdpa")
    install_fused_layers(fused)
    ids = torch.randint(0, 97, (2, 6))
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    assert torch.equal(plain.causal_lm.generate(ids, **options), fused.causal_lm.generate(ids, **options))


def test_what_is_not_stock_keeps_its_own_forward_and_says_why() -> None:
    model = _model(hidden_act="gelu")
    next(m for m in model.modules() if isinstance(m, Phi3RMSNorm)).weight.requires_grad_(True)
    report = install_fused_layers(model)
    assert report.kept == {"a norm that trains": 1, "an MLP with gelu": 2}
    plain = _model(hidden_act="gelu")
    torch.testing.assert_close(_loss_and_grads(model)[0], _loss_and_grads(plain)[0], rtol=1e-6, atol=0)


def _trained(model: PackedLoss, lengths: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    total = sum(lengths)
    ids = torch.randint(0, 97, (total + 1,), generator=torch.Generator().manual_seed(total))
    predict = torch.arange(0, total, 2)
    loss = model(
        ids_T=ids[:-1],
        positions_T=torch.cat([torch.arange(n) for n in lengths]),
        predict_S=predict,
        target_S=ids[predict + 1],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        lengths=lengths,
    )
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("twice", [False, True])
def test_a_layer_that_adds_the_residual_in_its_norm_learns_the_same(twice: bool) -> None:
    found = []
    for passes in (BY_HAND, replace(BY_HAND, with_residual=True)):
        causal_lm = small_phi3()
        causal_lm.name_or_path = "x"
        use_backend(causal_lm, "sdpa")
        model = PackedLoss(add_lora(causal_lm, LoraConfig(r=4, dropout=0.0), "x"))
        fill_adapter(model, 0)
        for number, (name, param) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                torch.nn.init.normal_(param, std=0.1, generator=torch.Generator().manual_seed(number))
        install_fused(model)
        for _ in range(1 + twice):
            install_fused_layers(model, passes)
            select_in_last_layer(model)
        found.append(_trained(model.train(), (5, 9, 3)))
    (loss, grads), (joined_loss, joined_grads) = found
    assert torch.equal(joined_loss, loss)
    assert set(joined_grads) == set(grads)
    for name, grad in grads.items():
        _same(joined_grads[name], grad, 2e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("joined", [False, True])
def test_a_layer_with_another_forward_is_recomputed_too(joined: bool) -> None:
    """transformers 5.24 recomputes in the class's forward, which ours stands in for."""
    held = []
    for checkpointing in (False, True):
        watch = RealWatch()
        with watch:
            model = _model()
            install_fused(model)
            install_fused_layers(model, replace(BY_HAND, with_residual=joined))
            select_in_last_layer(model)
            if checkpointing:
                model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
            watch.phase = "forward"
            before = watch.live.now["cpu"].total()
            loss = model(**_batch())
            held.append(watch.live.now["cpu"].total() - before)
            loss.backward()
    # each layer's input, and what the loss keeps; without the last layer's insides
    assert held[1] < held[0] / 5


def test_a_layer_with_dropout_before_its_residual_keeps_its_own_forward() -> None:
    model = small_phi3(resid_pdrop=0.1).requires_grad_(False)
    report = install_fused_layers(model, replace(BY_HAND, with_residual=True))
    assert report.kept == {"a layer with dropout before its residual": len(model.model.layers)}


def test_nothing_is_copied_for_the_one_row_of_the_joined_projection() -> None:
    """An index into it would fill zeros and copy all of it in backward."""
    seen: list[tuple[str, int]] = []

    class _Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            seen.append((str(func), out.shape[-1] if isinstance(out, Tensor) and out.ndim else 0))
            return out

    model = small_phi3()
    use_backend(model, "sdpa")
    install_fused_layers(model)
    hidden = torch.randn(1, 6, model.config.hidden_size, requires_grad=True)
    tables = model.model.rotary_emb(hidden, torch.arange(6)[None])
    with _Names():
        out, _ = model.model.layers[0].self_attn(hidden, position_embeddings=tables, lengths=(6,))
        out.sum().backward()
    width = model.model.layers[0].self_attn.qkv_proj.out_features
    assert [name for name, last in seen if last == width]
    assert not [name for name, last in seen if last == width and "select_backward" in name]
