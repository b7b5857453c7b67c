"""The fused LoRA linear against PEFT's own: outputs, every gradient, dropout, and who keeps PEFT's forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from phi3_dist.modeling.fused_lora import declined, install_fused, keep_dequantized, remove_fused

I, O, R = 24, 40, 4  # noqa: E741


class _Net(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(I, O, bias=bias), nn.Linear(O, I, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(x)))
        return out


def _pair(*, base_bias: bool = False, **options: Any) -> tuple[Any, Any]:
    """The same PEFT model twice, with an adapter that is not at its start; the second is still to be fused."""
    torch.manual_seed(0)
    config = PeftLoraConfig(r=R, lora_alpha=2 * R, target_modules=["up", "down"], **options)
    model = get_peft_model(_Net(base_bias), config)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.3)
    return model, copy.deepcopy(model)


def _run(model: Any, x: Tensor, seed: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(x)
    (out.float() ** 2).sum().backward()
    assert x.grad is not None
    return out, {"x": x.grad, **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def _same(plain: Any, fused: Any, x: Tensor, tolerance: float = 1e-6) -> None:
    (want, want_grads), (got, got_grads) = _run(plain, x), _run(fused, x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert set(got_grads) == set(want_grads)
    assert len(want_grads) >= 5
    for name, grad in want_grads.items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(got_grads[name], grad, rtol=tolerance, atol=tolerance * max(scale, 1.0))


@pytest.mark.parametrize("shape", [(7, I), (1, 9, I), (2, 3, 5, I)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_and_gradients_are_pefts(shape: tuple[int, ...], bias: bool, rslora: bool) -> None:
    plain, fused = _pair(base_bias=bias, use_rslora=rslora)
    assert install_fused(fused).fused == 2
    _same(plain, fused, torch.randn(shape))


def test_an_input_that_is_not_contiguous_is_read_right() -> None:
    plain, fused = _pair()
    install_fused(fused)
    _same(plain, fused, torch.randn(I, 6).T)


@pytest.mark.parametrize("dropout", [0.05, 0.5])
def test_the_same_seed_drops_what_pefts_dropout_drops(dropout: float) -> None:
    plain, fused = _pair(lora_dropout=dropout)
    assert install_fused(fused).kept == {}
    x = torch.randn(2, 11, I)
    _same(plain, fused, x)
    assert not torch.equal(_run(fused, x, seed=5)[0], _run(fused, x, seed=6)[0])
    _same(plain.eval(), fused.eval(), x)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_bf16_autocast_follows_pefts_dtypes(dropout: float) -> None:
    plain, fused = _pair(lora_dropout=dropout)
    install_fused(fused)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.base_model.model.up(torch.randn(3, I)).dtype == torch.bfloat16
        _same(plain, fused, torch.randn(8, I), tolerance=3e-2)


def test_recomputation_drops_the_same_positions_again() -> None:
    from torch.utils.checkpoint import checkpoint

    plain, fused = _pair(lora_dropout=0.5)
    install_fused(fused)
    inner = fused.base_model.model.forward
    fused.base_model.model.forward = lambda x: checkpoint(inner, x, use_reentrant=False)
    _same(plain, fused, torch.randn(9, I))


def test_an_input_without_gradient_gets_none() -> None:
    plain, fused = _pair()
    install_fused(fused)
    x = torch.randn(5, I)
    for model in (plain, fused):
        model(x).sum().backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-6, atol=1e-5)


def test_saved_for_backward_is_one_copy_of_the_input() -> None:
    _, fused = _pair(lora_dropout=0.5)
    install_fused(fused)
    layer, saved = fused.base_model.model.up, []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(50, I, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    of_tokens = [t for t in saved if t.shape == x.shape]
    assert [t.dtype for t in of_tokens] == [torch.float32, torch.bool]
    assert of_tokens[0].data_ptr() == x.data_ptr()
    assert sum(t.numel() for t in saved if t.shape[0] == 50 and t.is_floating_point()) == 50 * (I + R)


def test_whatever_peft_does_beside_training_still_works() -> None:
    plain, fused = _pair()
    install_fused(fused)
    x = torch.randn(4, I)
    with plain.disable_adapter(), fused.disable_adapter():
        assert torch.equal(plain(x), fused(x))
    assert list(get_peft_model_state_dict(plain)) == list(get_peft_model_state_dict(fused))
    assert list(plain.state_dict()) == list(fused.state_dict())
    twin = copy.deepcopy(fused)
    nn.init.zeros_(twin.base_model.model.up.lora_B.default.weight)
    assert not torch.equal(twin(x), fused(x)), "a copy must compute with its own weights"
    for model in (plain, fused):
        model.merge_adapter()
    torch.testing.assert_close(plain(x), fused(x))
    fused.unmerge_adapter()
    torch.testing.assert_close(plain(x), fused(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused.merge_and_unload()(x), plain(x), rtol=1e-5, atol=1e-5)


def test_a_second_adapter_added_later_is_not_computed_with_the_first() -> None:
    plain, fused = _pair()
    install_fused(fused)
    x = torch.randn(4, I)
    for model in (plain, fused):
        torch.manual_seed(8)
        model.add_adapter("other", PeftLoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
        model.set_adapter("other")
    torch.testing.assert_close(plain(x), fused(x))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "a LoRA variant (Dora)"),
        ({"lora_bias": True}, "a bias in the adapter"),
        ({"bias": "all"}, "its base trains too (bias, or in full)"),
    ],
)
def test_what_is_not_plain_keeps_pefts_forward_and_says_why(options: dict[str, Any], reason: str) -> None:
    plain, fused = _pair(base_bias=bool({"bias", "lora_bias"} & set(options)), **options)
    report = install_fused(fused)
    assert report.fused == 0
    assert report.kept == {reason: 2}
    assert reason in str(report)
    x = torch.randn(4, I)
    assert torch.equal(plain(x), fused(x))


def test_an_embedding_keeps_pefts_forward() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Embedding(9, I), nn.Linear(I, O)), PeftLoraConfig(r=R, target_modules=["0", "1"])
    )
    report = install_fused(model)
    assert report.fused == 1
    assert report.kept == {"PEFT's Embedding over torch's Embedding": 1}


def _nf4_pair(storage: torch.dtype, *, dropout: float = 0.0) -> tuple[Any, Any]:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    net: Any = _Net(bias=True)
    for name in ("up", "down"):
        plain = getattr(net, name)
        four_bit = bnb.nn.Linear4bit(
            plain.in_features, plain.out_features, compute_dtype=torch.float32, quant_type="nf4", quant_storage=storage
        )
        four_bit.load_state_dict(plain.state_dict())
        four_bit.support_avx512bf16_for_cpu = False  # as modeling/base.py does
        setattr(net, name, four_bit.to("cpu").requires_grad_(False))
    net.is_loaded_in_4bit = True
    model: Any = get_peft_model(net, PeftLoraConfig(r=R, target_modules=["up", "down"], lora_dropout=dropout))
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.3)
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_over_nf4_outputs_and_gradients_are_pefts(storage: torch.dtype, dropout: float) -> None:
    plain, fused = _nf4_pair(storage, dropout=dropout)
    assert type(fused.base_model.model.up).__name__ == "Linear4bit"
    assert install_fused(fused).fused == 2
    x = torch.randn(2, 5, I)
    _same(plain, fused, x)
    assert declined(fused) == {}
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), fused.eval()(x), rtol=1e-6, atol=1e-6)
    assert list(get_peft_model_state_dict(plain)) == list(get_peft_model_state_dict(fused))


def test_kept_nf4_weights_give_the_same_bits_and_are_dequantised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    _, fused = _nf4_pair(torch.float32, dropout=0.25)
    install_fused(fused)
    calls = []
    dequantize = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *a, **k: calls.append(1) or dequantize(*a, **k))
    x = torch.randn(6, I)
    (again, again_grads), of_two = _run(fused, x), len(calls)
    layers = nn.ModuleDict({"layers": nn.ModuleList([fused.base_model.model])})
    root = nn.ModuleDict({"model": layers})
    assert keep_dequantized(root, 0) == 0
    assert keep_dequantized(root, 3) == 2
    (kept, kept_grads), of_one = _run(fused, x), len(calls) - of_two
    assert torch.equal(kept, again)
    assert all(torch.equal(kept_grads[name], grad) for name, grad in again_grads.items())
    assert (of_two, of_one) == (4, 2)
    remove_fused(fused)
    assert "_fused_keeps_weight" not in vars(fused.base_model.model.up)


def test_a_recomputed_layer_holds_its_weights_for_its_backward_alone() -> None:
    from torch.utils.checkpoint import checkpoint

    _, fused = _nf4_pair(torch.uint8)
    install_fused(fused)
    keep_dequantized(nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([fused])})}), 1)
    net, dense = fused.base_model.model, {(O, I), (I, O)}

    def held(x: Tensor, *, recompute: bool) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []

        def pack(tensor: Tensor) -> Tensor:
            shapes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = checkpoint(net, x, use_reentrant=False) if recompute else net(x)
        out.sum().backward()
        return [shape for shape in shapes if shape in dense]

    assert sorted(held(torch.randn(3, I, requires_grad=True), recompute=False)) == sorted(dense)
    assert held(torch.randn(3, I, requires_grad=True), recompute=True) == []


def test_a_float32_adapter_over_a_16_bit_base_is_fused_as_under_autocast() -> None:
    """As ZeRO-3 has it, whose engine keeps the adapter in float32 and switches no autocast on."""
    _, fused = _pair()
    install_fused(fused)
    fused.base_model.model.up.base_layer.to(torch.bfloat16)
    x = torch.randn(3, I)
    out = fused.base_model.model.up(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        want = fused.base_model.model.up(x)
    assert torch.equal(out, want)
    assert declined(fused) == {}


def test_a_call_that_is_not_plain_goes_to_pefts_forward_and_is_told() -> None:
    plain, fused = _pair()
    install_fused(fused)
    for model in (plain, fused):
        model.base_model.model.up.base_layer.to(torch.bfloat16)
        for part in (model.base_model.model.up.lora_A, model.base_model.model.up.lora_B):
            part.to(torch.float16)
    x = torch.randn(3, I).bfloat16()
    assert torch.equal(plain.base_model.model.up(x), fused.base_model.model.up(x))
    assert declined(fused) == {"weights of another dtype than the input's bfloat16": 1}
    plain, fused = _nf4_pair(torch.uint8)
    install_fused(fused)
    x = torch.randn(3, I)
    want = fused(x)
    for model in (plain, fused):  # as if another rank held half of it
        model.base_model.model.up.lora_A.default.weight.data = torch.zeros(R // 2, I)
    with pytest.raises(RuntimeError):
        fused(x)
    assert declined(fused) == {"this rank holds only a shard of a weight": 1}
    assert want.requires_grad


def test_it_can_be_taken_back() -> None:
    plain, fused = _pair()
    install_fused(fused)
    assert "forward" in vars(fused.base_model.model.up)
    remove_fused(fused)
    assert "forward" not in vars(fused.base_model.model.up)
    x = torch.randn(3, I)
    assert torch.equal(plain(x), fused(x))
