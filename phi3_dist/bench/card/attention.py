"""Every attention backend that can run here: against per-document sdpa in float32, bit for bit, and its cost."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phi3_dist.bench.card.checks import Check, Group, Skip
from phi3_dist.modeling.attention.backend import attend, backends
from phi3_dist.modeling.attention.kernel_interface import Documents, Settings
from phi3_dist.modeling.attention.packed_kernels import KERNELS

__all__ = ["attention"]

LENGTHS = (5, 1, 700, 300, 77, 129, 2600)
TOY_LENGTHS = (5, 1, 300, 77, 129)
HEADS = ((4, 4, 96), (8, 2, 128))
WINDOWS = (None, 1, 64, 2047)
MINI = (32, 32, 96)
MINI_SETTINGS = Settings(96**-0.5, 2047)


def _documents(group: Group, lengths: tuple[int, ...]) -> Documents:
    ends = torch.tensor([0, *lengths], device=group.device).cumsum(0).to(torch.int32)
    return Documents(lengths, ends)


def _inputs(group: Group, heads: tuple[int, int, int], tokens: int) -> list[Tensor]:
    torch.manual_seed(0)
    queries, keys, size = heads
    dtype = torch.float32 if group.cpu else torch.bfloat16
    return [group.random(tokens, n, size, dtype=dtype, grad=True) for n in (queries, keys, keys)]


def _needs(group: Group, name: str, size: int = 96) -> None:
    dtype = torch.float32 if group.cpu else torch.bfloat16
    found = next(one for one in backends(group.device, size, dtype, None) if one.name == name)
    if not found.available:
        raise Skip(found.reason)


def _against(group: Group, name: str, heads: tuple[int, int, int], window: int | None) -> Check:
    def run() -> dict[str, Any]:
        _needs(group, name, heads[2])
        lengths = TOY_LENGTHS if group.cpu else LENGTHS
        documents, settings = _documents(group, lengths), Settings(heads[2] ** -0.5, window)
        ours = _inputs(group, heads, sum(lengths))
        exact = [t.detach().float().requires_grad_() for t in ours]
        out = attend(name, *ours, documents=documents, settings=settings)
        want = attend("sdpa", *exact, documents=documents, settings=settings)
        weights = torch.randn_like(want)
        (out.float() * weights).sum().backward()  # type: ignore[no-untyped-call]
        (want * weights).sum().backward()  # type: ignore[no-untyped-call]
        pairs = [(out, want), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]
        # with a window of 1 the gradients of queries and keys are 0: measured by the largest of the four
        largest = max(float(b.detach().norm()) for _, b in pairs if b is not None)
        errors = [
            round(float((a.detach().float() - b.detach()).norm()) / max(float(b.detach().norm()), 1e-3 * largest), 5)
            for a, b in pairs
            if a is not None and b is not None
        ]
        return {"ok": max(errors) < 2e-2, "errors": errors}

    return run


def _same_bits(group: Group, name: str, *, deterministic: bool) -> Check:
    def run() -> dict[str, Any]:
        if group.cpu:
            raise Skip("needs CUDA")
        _needs(group, name)
        documents = _documents(group, LENGTHS)
        kernel = name + ("_deterministic" if deterministic else "")

        def once() -> list[Tensor]:
            inputs = _inputs(group, MINI, sum(LENGTHS))
            out = attend(kernel, *inputs, documents=documents, settings=MINI_SETTINGS)
            out.backward(torch.ones_like(out))  # type: ignore[no-untyped-call]
            return [t.grad for t in inputs if t.grad is not None]

        first = once()
        same = [all(torch.equal(a, b) for a, b in zip(first, once(), strict=True)) for _ in range(6)]
        return {"ok": all(same) or not deterministic, "equal_runs": sum(same), "runs": len(same)}

    return run


def _cost(group: Group, name: str, lengths: tuple[int, ...], *, deterministic: bool) -> Check:
    """Forward and backward of one layer of mini's heads over 4,096 tokens."""

    def run() -> dict[str, Any]:
        if group.cpu:
            raise Skip("needs CUDA")
        _needs(group, name)
        documents, inputs = _documents(group, lengths), _inputs(group, MINI, sum(lengths))
        kernel = name + ("_deterministic" if deterministic else "")

        def forward() -> Tensor:
            return attend(kernel, *inputs, documents=documents, settings=MINI_SETTINGS)

        def both() -> None:
            out = forward()
            torch.autograd.grad(out, inputs, torch.ones_like(out))

        return {"ms_forward": group.milliseconds(forward), "ms_both": group.milliseconds(both)}

    return run


def _new_lengths(group: Group, *, cudnn: bool) -> Check:
    def run() -> dict[str, Any]:
        if group.cpu:
            raise Skip("needs CUDA")
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        times = []
        for length in range(301, 301 + 16, 2):
            q, k, v = (group.random(1, 32, length, 96, grad=True) for _ in range(3))
            group.sync()
            start = time.perf_counter()
            F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()  # type: ignore[no-untyped-call]
            group.sync()
            times.append(round((time.perf_counter() - start) * 1e3, 2))
        torch.backends.cuda.enable_cudnn_sdp(False)
        return {"ms_each_new_length": times}

    return run


def attention(group: Group) -> None:
    if not group.cpu:
        torch.backends.cuda.enable_cudnn_sdp(False)
    names = [name for name in KERNELS if name != "sdpa"]
    for heads in HEADS:
        for window in WINDOWS:
            for name in ("sdpa", *names):
                if name == "flex" and window != 64:
                    continue  # each is compiled for seconds
                group.check(f"{name} heads {heads} window {window}", _against(group, name, heads, window))
    for name in ("sdpa", *(n for n in names if n != "flex")):
        for deterministic in (False, True):
            form = f"{name}, deterministic {deterministic}"
            group.check(f"{form}: same bits", _same_bits(group, name, deterministic=deterministic))
            for lengths in ((4096,), (512,) * 8, (64,) * 64):
                cost = _cost(group, name, lengths, deterministic=deterministic)
                group.check(f"{form}: {len(lengths)} documents of {lengths[0]}", cost)
    for cudnn in (True, False):
        group.check(f"sdpa, new document lengths, cuDNN {cudnn}", _new_lengths(group, cudnn=cudnn))
