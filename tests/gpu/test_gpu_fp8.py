"""FP8 products on a card that has them, against the same numbers multiplied in float32."""

from __future__ import annotations

import pytest
import torch

from phi3_dist.modeling.fp8 import Fp8Scale, fp8_grad_input, fp8_product, quantize_rows

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1024, 3072, 9216), (333, 8192, 3072)])
def test_products_on_the_card_are_those_of_the_reference(tokens: int, inputs: int, outputs: int) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no CUDA device with FP8 products (compute capability 8.9)")
    torch.manual_seed(0)
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(tokens, outputs, device="cuda", dtype=torch.bfloat16)
    weight8, scale_O1 = quantize_rows(torch.randn(outputs, inputs, device="cuda"))
    stored, scale = weight8.view(torch.uint8), Fp8Scale(scale_O1[:, 0].contiguous())
    for got, left, right in (
        (fp8_product(x, stored, scale), quantize_rows(x), weight8.float().T * scale_O1.T),
        (fp8_grad_input(grad, stored, scale), quantize_rows(grad.float() * scale.rows_O), weight8.float()),
    ):
        want = (left[0].float() * left[1]) @ right
        assert got.dtype == torch.bfloat16
        assert float((got.float() - want).norm() / want.norm()) < 1e-2
