"""Triton's kernels in Triton's interpreter, on the CPU, against float32 references: in a process of its own, since the
interpreter is chosen when triton is imported. Not where triton is not installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from phi3_dist.modeling.fp8 import Fp8Scale
from phi3_dist.modeling.fused_lora import lora_linear

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

ROOT = Path(__file__).parents[2]


def _lines(*command: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    ("dtype", "groups"),
    [
        ("fp32", "passes,lora"),
        pytest.param("fp32", "fp8", marks=pytest.mark.full),
        pytest.param("bf16", "passes", marks=pytest.mark.full),
        pytest.param("fp16", "lora", marks=pytest.mark.full),  # the interpreter multiplies no bf16
    ],
)
def test_kernels_give_what_float32_gives(dtype: str, groups: str) -> None:
    command = ("-m", "phi3_dist.bench.kernels", "--toy", "--here", "--dtype", dtype, "--groups", groups)
    found = {line["check"]: line for line in _lines(*command) if line["check"] != "liger's norm"}
    assert len(found) >= len(groups.split(","))
    assert [line for line in found.values() if not line["ok"]] == []


def test_a_model_on_kernels_learns_what_it_learns_by_hand_and_draws_its_masks_again() -> None:
    (line,) = _lines("-m", "tests.kernel_model")
    assert line["loss"] < 1e-6
    assert line["grads"] < 1e-5
    assert line["same_names"]
    assert line["recomputed_grads"] == 0.0  # with dropout, with and without activation checkpointing
    assert line["other_seed"]


@pytest.mark.parametrize("fp8", [False, True])
def test_on_fake_tensors_of_a_card_shapes_follow_and_nothing_is_launched(fp8: bool) -> None:
    with FakeTensorMode():
        x = torch.empty(1, 48, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(96, 64, device="cuda", dtype=torch.uint8 if fp8 else torch.bfloat16)
        turned = torch.empty(64, 96, device="cuda", dtype=torch.uint8)
        state = Fp8Scale(torch.empty(96, device="cuda"), turned) if fp8 else None
        a = torch.empty(8, 64, device="cuda", requires_grad=True)
        b = torch.empty(96, 8, device="cuda", requires_grad=True)
        out = lora_linear(x, weight, None, a, b, 2.0, 0.05, state, kernels=True)
        assert (out.shape, out.dtype) == ((1, 48, 96), torch.bfloat16)
        out.sum().backward()
        for leaf in (x, a, b):
            assert leaf.grad is not None
            assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)
