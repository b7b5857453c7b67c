"""The FP8 base against its reference arithmetic in float32, and against the base that it stands for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from phi3_dist.modeling.fp8 import (
    E4M3_MAX,
    Fp8Linear,
    Fp8Scale,
    Rows8,
    fp8_grad_input,
    fp8_product,
    note_rows,
    noted_rows,
    quantize_rows,
    use_fp8,
)
from phi3_dist.modeling.fused_lora import install_fused
from phi3_dist.planning.support import No, support_fp8

REFUSED = support_fp8("single", "none", "cpu", None, torch.__version__)
needs_fp8 = pytest.mark.skipif(isinstance(REFUSED, No), reason="torch is too old for model.fp8, which is refused then")
pytestmark = needs_fp8
I, O, T = 64, 96, 20  # noqa: E741


def _back(values: Tensor, scale: Tensor) -> Tensor:
    """The numbers that E4M3 values with row scales stand for."""
    return values.float() * scale


def test_rows_are_scaled_to_the_largest_number_and_zeros_stay() -> None:
    x = torch.randn(5, 40) * torch.tensor([[1e-4], [1.0], [300.0], [1e4], [0.0]])
    values, scale = quantize_rows(x)
    assert values.dtype == torch.float8_e4m3fn
    assert values.float().abs().amax(1)[:4].tolist() == [E4M3_MAX] * 4
    assert not values[4].float().any()
    # three bits of mantissa: half a step is a sixteenth
    assert bool(((_back(values, scale) - x).abs() <= x.abs() / 16 + scale * 2**-9).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_and_its_gradient_are_those_of_the_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, grad = torch.randn(T, I).to(dtype), torch.randn(O, I), torch.randn(T, O).to(dtype)
    weight8, scale_O1 = quantize_rows(weight)
    stored, scale = weight8.view(torch.uint8), Fp8Scale(scale_O1[:, 0])
    out = fp8_product(x, stored, scale)
    want = _back(*quantize_rows(x)) @ _back(weight8, scale_O1).T
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.float(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    got = fp8_grad_input(grad, stored, scale)
    want = _back(*quantize_rows(grad.float() * scale.rows_O)) @ weight8.float()
    torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    exact = grad.float() @ weight
    assert float((got.float() - exact).norm() / exact.norm()) < 0.05


def test_the_module_has_the_functions_gradient_and_a_bias() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(I, O)
    fp8 = Fp8Linear(linear)
    x = torch.randn(2, T, I, requires_grad=True)
    out, exact = fp8(x), linear(x)
    assert out.shape == exact.shape
    assert 1e-3 < float((out - exact).detach().norm() / exact.detach().norm()) < 0.05
    grad = torch.randn_like(out)
    (ours,) = torch.autograd.grad(out, x, grad)
    (theirs,) = torch.autograd.grad(exact, x, grad)
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05
    assert fp8.bfloat16().weight.dtype == torch.uint8, "a cast of the model must not reach the bytes"


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.odd = nn.Linear(I, O, bias=False), nn.Linear(O, I, bias=False), nn.Linear(I, 9)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.odd(x + self.down(torch.tanh(self.up(x))))
        return out


def _peft(**options: Any) -> Any:
    torch.manual_seed(0)
    config = PeftLoraConfig(r=4, lora_alpha=8, target_modules=["up", "down", "odd"], **options)
    model = get_peft_model(_Net(), config)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.1)
    return model


def test_fused_and_pefts_forward_agree_over_fp8_and_the_adapter_is_the_same() -> None:
    plain, fused = _peft(), _peft()
    for model in (plain, fused):
        assert use_fp8(model) == (2, {"64 × 9 are not multiples of 16": 1})
    assert install_fused(fused).fused == 3
    x = torch.randn(T, I)
    grads = []
    for model in (plain, fused):
        model(x).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)
    assert set(grads[0]) == set(grads[1])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))
    assert list(get_peft_model_state_dict(fused)) == list(get_peft_model_state_dict(_peft()))


def test_what_reads_the_weight_keeps_it() -> None:
    model = _peft(use_dora=True)
    assert use_fp8(model) == (0, {"a LoRA variant reads the weight": 3})


def test_training_over_fp8_follows_the_base_that_it_stands_for() -> None:
    exact, fp8 = _peft(), _peft()
    use_fp8(fp8)
    torch.manual_seed(1)
    x, target = torch.randn(64, I), torch.randn(64, 9)
    losses: dict[str, list[float]] = {}
    for name, model in (("exact", exact), ("fp8", fp8)):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        losses[name] = []
        for _ in range(60):
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
    assert losses["exact"][-1] < 0.8 * losses["exact"][0]
    for ours, theirs in zip(losses["fp8"], losses["exact"], strict=True):
        assert ours == pytest.approx(theirs, rel=0.03)
    assert losses["fp8"][0] != losses["exact"][0]


def test_a_copy_keeps_its_own_bytes() -> None:
    fp8 = Fp8Linear(nn.Linear(I, O))
    twin = copy.deepcopy(fp8)
    twin.weight.data.zero_()
    assert fp8.weight.any()


def test_rows_made_before_and_bytes_kept_turned_give_the_same_numbers() -> None:
    torch.manual_seed(0)
    x, grad, linear = torch.randn(T, I), torch.randn(T, O), nn.Linear(I, O, bias=False)
    plain, turned = Fp8Linear(linear), Fp8Linear(linear, turned=True)
    rows = Rows8(*quantize_rows(grad * plain.rows_O))
    assert torch.equal(
        fp8_grad_input(grad, turned.weight, turned.scale, rows), fp8_grad_input(grad, plain.weight, plain.scale)
    )
    known = Rows8(*quantize_rows(x))
    assert torch.equal(fp8_product(x, plain.weight, plain.scale, rows=known), fp8_product(x, plain.weight, plain.scale))


def test_rows_left_on_a_tensor_are_forgotten_once_it_is_written_to() -> None:
    x = torch.randn(T, I)
    assert noted_rows(x) is None
    rows = Rows8(*quantize_rows(x))
    note_rows(x, rows)
    assert noted_rows(x) is rows
    x.mul_(2)
    assert noted_rows(x) is None
