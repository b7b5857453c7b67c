"""Liger's kernel on a card against this toolkit's chunks; compiled passes on a card against those by hand."""

from __future__ import annotations

from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from phi3_dist.machine.probe import no_compiler, package_versions
from phi3_dist.modeling.loss import chunked_nll, liger_nll
from phi3_dist.modeling.passes import BY_HAND, compiled_passes
from phi3_dist.planning.loss import why_not_liger

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
V = 32064


@pytest.fixture
def liger() -> None:
    why, fix = why_not_liger("cuda", package_versions(), targets=(), saved=(), new_tokens=False)
    if why:
        pytest.skip(f"{why}: {fix}")


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows", [1, 7, 700])
@pytest.mark.parametrize("autocast", [False, True])
def test_liger_gives_the_loss_and_gradient_of_the_chunks(
    dtype: torch.dtype, tolerance: float, rows: int, autocast: bool
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(rows, 512, device="cuda", dtype=dtype)
    weight = (torch.randn(V, 512, device="cuda") / 512**0.5).to(dtype)
    target = torch.randint(0, V, (rows,), device="cuda")
    found = []
    for loss in (chunked_nll, liger_nll):
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            nll = loss(leaf, weight, None, target)
        (nll / 13).backward()
        assert leaf.grad is not None
        found.append((nll.detach(), leaf.grad.float()))
    (ours, our_grad), (theirs, their_grad) = found
    tolerance = 2e-2 if autocast else tolerance
    torch.testing.assert_close(theirs, ours, rtol=min(tolerance, 1e-3), atol=0)
    assert theirs.dtype == ours.dtype == torch.float32
    assert float((their_grad - our_grad).norm() / our_grad.norm()) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_compiled_passes_give_what_those_by_hand_give(dtype: torch.dtype, tolerance: float) -> None:
    if no_compiler(cuda=True):
        pytest.skip(no_compiler(cuda=True))
    torch.manual_seed(0)
    before, compiled = set(psutil.Process().children()), compiled_passes()

    def random(*size: int) -> Tensor:
        return torch.randn(size, device="cuda").to(dtype)

    for tokens in (1000, 333, 2, 1, 4096):
        heads = (random(tokens, 8, 96), random(tokens, 2, 96), random(tokens, 2, 96))
        calls: dict[str, tuple[Any, ...]] = {
            "norm_backward": (random(tokens, 768), random(tokens, 768), random(tokens, 1).float().abs(), random(768)),
            "swiglu": (random(tokens, 4096),),
            "swiglu_backward": (random(tokens, 2048), random(tokens, 4096)),
            "rotate_backward": (*heads, random(tokens, 48), random(tokens, 48)),
        }
        for name, arguments in calls.items():
            got, want = getattr(compiled, name)(*arguments), getattr(BY_HAND, name)(*arguments)
            assert got.shape == want.shape
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    assert set(psutil.Process().children()) <= before
