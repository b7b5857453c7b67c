"""Each backend that can run on this card against per-document sdpa: isolation, window, grouped queries, head sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phi3_dist.modeling.attention.backend import backends
from phi3_dist.modeling.attention.kernel_interface import Documents, Settings
from phi3_dist.modeling.attention.packed_kernels import KERNELS

pytestmark = pytest.mark.gpu

LENGTHS = (5, 1, 300, 77, 129)
KERNEL_NAMES = [name for name in KERNELS if name != "sdpa"]


def _documents() -> Documents:
    ends = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).to(torch.int32)
    return Documents(LENGTHS, ends)


def _available(name: str, head_dim: int, dtype: torch.dtype = torch.bfloat16, window: int | None = None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    found = next(b for b in backends(torch.device("cuda", 0), head_dim, dtype, window) if b.name == name)
    if not found.available:
        pytest.skip(f"{name}: {found.reason}")


def _tensors(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(sum(LENGTHS), n, head_dim) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, device="cuda").to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("name", KERNEL_NAMES)
@pytest.mark.parametrize("window", [None, 1, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_outputs_and_gradients_are_those_of_each_document_alone(
    name: str, window: int | None, heads: int, kv_heads: int, head_dim: int
) -> None:
    _available(name, head_dim, window=window)
    settings = Settings(head_dim**-0.5, window)
    tensors = _tensors(heads, kv_heads, head_dim)
    exact = [t.detach().float().requires_grad_() for t in tensors]
    out, want = KERNELS[name](*tensors, _documents(), settings), KERNELS["sdpa"](*exact, _documents(), settings)
    weights = torch.randn_like(want)
    (out.float() * weights).sum().backward()
    (want * weights).sum().backward()
    torch.testing.assert_close(out.float(), want, rtol=2e-2, atol=2e-2)
    for ours, theirs in zip(tensors, exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        error = (ours.grad.float() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 1e-2, f"relative error of a gradient {error:.1e}"


@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_another_document_changes_nothing_and_gets_no_gradient(name: str) -> None:
    _available(name, 96)
    tensors = _tensors(4, 4, 96)
    start, stop = 6, 306
    out = KERNELS[name](*tensors, _documents(), Settings(0.1))
    out[start:stop].float().sum().backward()
    for tensor in tensors:
        assert tensor.grad is not None
        outside = torch.cat([tensor.grad[:start], tensor.grad[stop:]])
        assert not outside.any()
    changed = [t.detach().clone() for t in tensors]
    for tensor in changed:
        tensor[:start] += 1
        tensor[stop:] -= 1
    again = KERNELS[name](*changed, _documents(), Settings(0.1))
    torch.testing.assert_close(again[start:stop], out[start:stop].detach(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", KERNEL_NAMES)
@pytest.mark.parametrize("window", [1, 2, 63, 64, 65])
def test_the_window_reaches_exactly_so_many_positions_itself_included(name: str, window: int) -> None:
    _available(name, 96, window=window)
    query, key, value = _tensors(2, 2, 96)
    out = KERNELS[name](query, key, value, _documents(), Settings(0.01, window))
    for position in (6, 6 + window - 1, 6 + window, 200, 305):
        (grad,) = torch.autograd.grad(out[position].float().sum(), value, retain_graph=True)
        reached = torch.nonzero(grad.float().abs().sum((1, 2))).flatten().tolist()
        assert reached == list(range(max(6, position - window + 1), position + 1))


def test_flex_works_in_float32_and_on_packs_of_other_lengths() -> None:
    _available("flex", 96, torch.float32)
    for lengths in ((7, 250), (128, 128), (33, 1, 400)):
        q, k, v = (torch.randn(sum(lengths), 2, 96, device="cuda") for _ in range(3))
        documents = Documents(lengths)
        ours, theirs = (KERNELS[name](q, k, v, documents, Settings(0.1)) for name in ("flex", "sdpa"))
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
