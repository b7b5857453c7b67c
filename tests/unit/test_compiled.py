"""Compiled passes against those by hand: the same numbers, one compilation for all packs, no process left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import async_compile

from phi3_dist.config.schema import LoraConfig
from phi3_dist.modeling.attention.backend import use_backend
from phi3_dist.modeling.fused_layers import install_fused_layers, select_in_last_layer
from phi3_dist.modeling.fused_lora import install_fused
from phi3_dist.modeling.lora import add_lora, fill_adapter
from phi3_dist.modeling.loss import PackedLoss
from phi3_dist.modeling.passes import BY_HAND, Passes, compiled_passes
from tests.small_models import small_phi3

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script_method.*:DeprecationWarning"
)  # inductor's own import
FUNCTIONS = 4
PACKS = (
    (5, 1, 12, 7),
    (3, 30),
    (2,),
    (64,),
    (9, 9, 9, 9, 9, 1),
    (17, 5),
    (1,),
    (128, 3),
    (40, 41),
    (6, 6),
    (31,),
    (2, 1),
)


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _model(passes: Passes, *, checkpointing: bool = False, **changes: Any) -> PackedLoss:
    causal_lm = small_phi3(**{"sliding_window": 11, **changes})
    causal_lm.name_or_path = "x"
    use_backend(causal_lm, "sdpa")
    if checkpointing:
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    model = PackedLoss(add_lora(causal_lm, LoraConfig(r=4, dropout=0.0), "x"))
    fill_adapter(model, 0)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.1)
    install_fused(model)
    install_fused_layers(model, passes)
    select_in_last_layer(model)
    return model.train()


def _batch(lengths: tuple[int, ...]) -> dict[str, Any]:
    ids = torch.randint(0, 97, (sum(lengths) + 1,), generator=torch.Generator().manual_seed(sum(lengths)))
    predict = torch.arange(0, sum(lengths), 2)
    return {
        "ids_T": ids[:-1],
        "positions_T": torch.cat([torch.arange(n) for n in lengths]),
        "predict_S": predict,
        "target_S": ids[predict + 1],
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "lengths": lengths,
    }


def _loss_and_grads(model: PackedLoss, lengths: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**_batch(lengths))
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _same(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * max(float(want.abs().max()), 1e-3))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_each_function_gives_what_the_one_by_hand_gives(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    compiled = compiled_passes()

    def random(*size: int) -> Tensor:
        return (3 * torch.randn(size)).to(dtype)

    rstd = torch.rand(1, 9, 1)
    norm = (random(1, 9, 48), random(1, 9, 48), rstd, random(48))
    _same(compiled.norm_backward(*norm), BY_HAND.norm_backward(*norm), tolerance)
    joined = random(1, 7, 48)
    _same(compiled.swiglu(joined), BY_HAND.swiglu(joined), tolerance)
    grad = random(1, 7, 24)
    _same(compiled.swiglu_backward(grad, joined), BY_HAND.swiglu_backward(grad, joined), tolerance)
    turned = (random(5, 4, 16), random(5, 2, 16), random(5, 2, 16), random(5, 6), random(5, 6))
    _same(compiled.rotate_backward(*turned), BY_HAND.rotate_backward(*turned), tolerance)
    assert counters["stats"]["unique_graphs"] == FUNCTIONS
    other_layout = random(16, 4, 5).permute(2, 1, 0)
    turned = (other_layout, *turned[1:])
    _same(compiled.rotate_backward(*turned), BY_HAND.rotate_backward(*turned), tolerance)
    assert counters["stats"]["unique_graphs"] == FUNCTIONS


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_learns_the_same_and_is_compiled_once_for_all_packs(checkpointing: bool) -> None:
    by_hand = _model(BY_HAND, checkpointing=checkpointing)
    compiled = _model(compiled_passes(), checkpointing=checkpointing)
    for lengths in PACKS:
        (want, want_grads), (got, got_grads) = (_loss_and_grads(model, lengths) for model in (by_hand, compiled))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        assert set(got_grads) == set(want_grads)
        for name, grad in want_grads.items():
            scale = float(grad.abs().max())
            torch.testing.assert_close(got_grads[name], grad, rtol=1e-6, atol=3e-6 * max(scale, 1e-3))
        with torch.no_grad():
            torch.testing.assert_close(compiled.eval()(**_batch(lengths)), want, rtol=1e-6, atol=0)
        compiled.train()
    assert counters["stats"]["unique_graphs"] == FUNCTIONS
    assert not counters["graph_break"]


def test_no_process_is_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torch starts a pool of processes wherever it may compile with more than one."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # or nothing is compiled
    allowed: list[int] = []
    ask = async_compile.get_compile_threads

    def asked() -> int:
        allowed.append(ask())
        return allowed[-1]

    monkeypatch.setattr(async_compile, "get_compile_threads", asked)
    before = set(psutil.Process().children())  # theirs may grow: the tests' warm server forks for other workers too
    with torch._inductor.config.patch(compile_threads=4):
        _loss_and_grads(_model(compiled_passes()), (5, 9))
    assert counters["stats"]["unique_graphs"] == FUNCTIONS
    assert set(allowed) == {1}
    assert set(psutil.Process().children()) <= before
