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

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

ROOT = Path(__file__).parents[2]


def _lines(*command: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def checked() -> dict[str, dict[str, Any]]:
    """The checks of passes and LoRA in float32, and of a model on them, by their names."""
    return {line["check"]: line for line in _lines("-m", "tests.kernel_model")}


def test_kernels_give_what_float32_gives(checked: dict[str, dict[str, Any]]) -> None:
    found = [line for name, line in checked.items() if name not in {"model", "liger's norm"}]
    assert {line["check"] for line in found} >= {"norm backward", "rotary", "swiglu", "linear down, dropout 0.05"}
    assert {line["group"] for line in found} == {"passes", "lora"}
    assert [line for line in found if not line["ok"]] == []


@pytest.mark.full
@pytest.mark.parametrize(
    ("dtype", "groups"),
    [
        ("fp32", "passes,lora"),
        ("fp32", "fp8"),
        ("bf16", "passes"),
        ("fp16", "lora"),  # the interpreter multiplies no bf16
    ],
)
def test_kernels_give_what_float32_gives_in_each_dtype(dtype: str, groups: str) -> None:
    command = ("-m", "phi3_dist.bench.kernels", "--toy", "--here", "--dtype", dtype, "--groups", groups)
    found = {line["check"]: line for line in _lines(*command) if line["check"] != "liger's norm"}
    assert len(found) >= len(groups.split(","))
    assert [line for line in found.values() if not line["ok"]] == []


def test_a_model_on_kernels_learns_what_it_learns_by_hand_and_draws_its_masks_again(
    checked: dict[str, dict[str, Any]],
) -> None:
    line = checked["model"]
    assert line["loss"] < 1e-6
    assert line["grads"] < 1e-5
    assert line["same_names"]
    assert line["recomputed_grads"] == 0.0  # with dropout, with and without activation checkpointing
    assert line["other_seed"]


def test_on_fake_tensors_of_a_card_shapes_follow_and_nothing_is_launched() -> None:
    from phi3_dist.modeling.kernels import linear
    from phi3_dist.modeling.kernels.lora import drop_of

    with FakeTensorMode():
        x, grad, weight = (
            torch.empty(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((48, 64), (48, 96), (96, 64))
        )
        a, b, drop = torch.empty(8, 64, device="cuda"), torch.empty(96, 8, device="cuda"), drop_of(0.05)
        out, low = linear.forward(x, weight, None, a, b, 2.0, drop)
        grads = linear.backward(grad, x, weight, a, b, low, 2.0, drop, of_input=True)
    assert (out.shape, out.dtype) == (grad.shape, torch.bfloat16)
    for got, leaf in zip(grads, (x, a, b), strict=True):
        assert got is not None
        assert (got.shape, got.dtype) == (leaf.shape, leaf.dtype)
