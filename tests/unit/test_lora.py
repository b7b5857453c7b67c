"""Targets are checked, the start is a function of seed and name, and the loss is the plain one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from phi3_dist.adapters.select import expected_keys
from phi3_dist.config.schema import LoraConfig
from phi3_dist.errors import ModelError
from phi3_dist.modeling.attention.backend import use_backend
from phi3_dist.modeling.base import find_base, load_full
from phi3_dist.modeling.lora import add_lora, count_parameters, fill_adapter, initial_value, lora_targets
from phi3_dist.modeling.loss import PackedLoss


def _tiny() -> Any:
    model = load_full(find_base("tiny-random"), torch.float32, torch.device("cpu"))
    use_backend(model, "sdpa")
    return model


def test_all_linear_is_phi3s_four_fused_projections() -> None:
    assert lora_targets(_tiny(), "all-linear") == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]


def test_a_llama_style_target_is_refused_with_the_fused_one_named() -> None:
    with pytest.raises(ModelError) as caught:
        lora_targets(_tiny(), ("q_proj", "o_proj", "gate_proj", "nonsense"))
    text = str(caught.value)
    assert "q_proj" in text
    assert "qkv_proj" in text
    assert "gate_up_proj" in text
    assert "nonsense" in text
    assert len(caught.value.problems) == 3


def test_modules_to_save_that_match_nothing_are_refused() -> None:
    with pytest.raises(ModelError, match="lm_haed"):
        add_lora(_tiny(), LoraConfig(modules_to_save=("lm_haed",)), "tiny-random")


def test_the_start_depends_on_seed_and_name_alone() -> None:
    shape = torch.Size((16, 64))
    first = initial_value("x.lora_A.default.weight", shape, 0)
    torch.manual_seed(123)
    assert first is not None
    assert torch.equal(first, initial_value("x.lora_A.default.weight", shape, 0))  # type: ignore[arg-type]
    assert not torch.equal(first, initial_value("y.lora_A.default.weight", shape, 0))  # type: ignore[arg-type]
    assert not torch.equal(first, initial_value("x.lora_A.default.weight", shape, 1))  # type: ignore[arg-type]
    assert first.abs().max() <= 1 / math.sqrt(64)
    assert initial_value("x.lora_B.default.weight", shape, 0).count_nonzero() == 0  # type: ignore[union-attr]


def test_an_embeddings_start_is_pefts_own_kind_and_depends_on_seed_and_name_alone() -> None:
    """PEFT draws it from the global generator: on each rank, and after another draw, another one."""
    found = []
    for seed, before in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(before)
        model = add_lora(_tiny(), LoraConfig(r=2, targets=("embed_tokens",)), "tiny-random")
        fill_adapter(model, seed)
        found.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    (a, b) = sorted(found[0])
    assert not found[0][a].any()
    assert found[0][b].std() == pytest.approx(1, abs=0.2)
    assert torch.equal(found[0][b], found[1][b])
    assert not torch.equal(found[0][b], found[2][b])


@pytest.mark.parametrize(
    ("lora", "token_ids"),
    [
        (LoraConfig(r=2, dora=True), (300, 301)),
        (LoraConfig(r=2, dora=True, targets=("embed_tokens", "lm_head", "o_proj")), ()),
        (LoraConfig(r=2, modules_to_save=("lm_head", "norm"), bias="all"), ()),
    ],
)
def test_what_trains_is_read_back_under_the_name_that_peft_saves(lora: LoraConfig, token_ids: tuple[int, ...]) -> None:
    model = add_lora(_tiny(), lora, "tiny-random", token_ids)
    values = {name: torch.full(shape, 0.25) for name, (shape, _) in expected_keys(model).items()}
    fill_adapter(model, 0, values)
    assert all((p == 0.25).all() for p in model.parameters() if p.requires_grad)


def test_the_loss_is_the_plain_cross_entropy_over_supervised_tokens() -> None:
    torch.manual_seed(0)
    model = PackedLoss(add_lora(_tiny(), LoraConfig(dropout=0.0), "tiny-random"))
    fill_adapter(model, seed=3)
    lengths = (9, 6, 4)
    ids_T = torch.randint(0, 300, (sum(lengths),))
    starts = [0, 9, 15]
    predict = [s + i for s, n in zip(starts, lengths, strict=True) for i in range(n - 1) if i >= 2]
    predict_S = torch.tensor(predict)
    batch = {
        "ids_T": ids_T,
        "positions_T": torch.cat([torch.arange(n) for n in lengths]),
        "predict_S": predict_S,
        "target_S": ids_T[predict_S + 1],
        "cu_seqlens": torch.tensor([0, 9, 15, 19], dtype=torch.int32),
    }
    got = model(**batch, lengths=lengths)
    got.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = torch.zeros(())
    peft_model = model.model
    peft_model.set_adapter("default")
    for start, length in zip(starts, lengths, strict=True):
        row = ids_T[start : start + length]
        logits = peft_model.get_base_model()(row[None], use_cache=False, lengths=(length,)).logits[0, :-1]
        labels = row[1:].clone()
        labels[:2] = -100
        expected = expected + F.cross_entropy(logits, labels, reduction="sum")
    expected.backward()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert grads
    for name, param in model.named_parameters():
        if param.grad is not None:
            torch.testing.assert_close(grads[name], param.grad, rtol=1e-4, atol=1e-5)


def test_counts_name_the_share() -> None:
    model = add_lora(_tiny(), LoraConfig(r=4), "tiny-random")
    counts = count_parameters(model)
    assert counts.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{counts.trainable:,} trainable" in str(counts)


def test_a_saved_adapter_of_another_rank_is_refused() -> None:
    model = add_lora(_tiny(), LoraConfig(r=4), "tiny-random")
    other = {n.replace(".default", ""): p[:2] for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ModelError, match="make r, targets and modules_to_save agree"):
        fill_adapter(model, 0, other)
