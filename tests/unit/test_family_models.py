"""Each variant of the family, shrunken: the packed path against transformers' own, row by row, loss and gradients.

A shrunken model keeps its variant's structure: the ratio of heads to key/value heads, the share of each head that is
rotated, tied embeddings, an attention window shorter than the longest row, LongRoPE with as many factors as rotated
pairs and rows on both sides of its original length.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

from phi3_dist.config.schema import LoraConfig
from phi3_dist.family.variants import FAMILIES, PRESETS, Family, check_targets, recognise
from phi3_dist.modeling.attention.backend import use_backend
from phi3_dist.modeling.lora import add_lora, fill_adapter
from phi3_dist.modeling.loss import PackedLoss
from phi3_dist.modeling.rope import pin_longrope

HEAD_DIM, ORIGINAL, WINDOW, VOCAB = 16, 16, 6, 97
SHORT_ROWS, LONG_ROWS = (9, 1, 14, 2), (9, 2, 40, 14)
IGNORED = -100


def full_size_config(family: Family) -> dict[str, Any]:
    """What `config.json` of the variant says, in the spelling that transformers writes."""
    shape = family.shape
    pairs = int(shape.head_dim * family.partial_rotary) // 2
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if family.rope == "longrope":
        rope = {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * pairs,
            "long_factor": [2.0] * pairs,
            "original_max_position_embeddings": family.original_positions,
        }
    config = Phi3Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        sliding_window=family.sliding_window,
        max_position_embeddings=family.max_positions,
        original_max_position_embeddings=family.original_positions,
        partial_rotary_factor=family.partial_rotary,
        rope_parameters=rope,
        architectures=["Phi3ForCausalLM"],
        pad_token_id=None,
    )
    saved: dict[str, Any] = config.to_dict()
    return saved


def shrunken(family: Family) -> Phi3ForCausalLM:
    """The variant with few and narrow layers. Equal at each call."""
    shape = family.shape
    kv_heads = 2
    heads = kv_heads * shape.heads // shape.kv_heads
    pairs = int(HEAD_DIM * family.partial_rotary) // 2
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if family.rope == "longrope":
        rope = {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
            "long_factor": [2.0 + pair for pair in range(pairs)],
            "original_max_position_embeddings": ORIGINAL,
        }
    torch.manual_seed(0)
    config = Phi3Config(
        num_hidden_layers=2,
        hidden_size=heads * HEAD_DIM,
        intermediate_size=48,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=VOCAB,
        tie_word_embeddings=shape.tied,
        sliding_window=WINDOW if family.sliding_window is not None else None,
        max_position_embeddings=128,
        original_max_position_embeddings=ORIGINAL,
        partial_rotary_factor=family.partial_rotary,
        rope_parameters={**rope, "partial_rotary_factor": family.partial_rotary},
        initializer_range=0.2,  # so that attention is far from uniform, and a wrong window or rotation shows
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Phi3ForCausalLM(config)
    model.tie_weights()
    model.name_or_path = "shrunken"
    model.set_attn_implementation("sdpa")
    return model


def adapted(model: Phi3ForCausalLM, targets: Any = "all-linear") -> Any:
    """With an adapter whose B is not zero, so that gradients reach A."""
    peft_model = add_lora(model, LoraConfig(r=4, dropout=0.0, targets=targets), "shrunken")
    generator = torch.Generator().manual_seed(1)
    for name, param in peft_model.named_parameters():
        if ".lora_" in name:
            with torch.no_grad():
                param.copy_(0.1 * torch.randn(param.shape, generator=generator))
    return peft_model


def rows_of(lengths: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in lengths]


def packed_loss(peft_model: Any, rows: list[Tensor]) -> Tensor:
    """This project's path: one ragged row, every token but a row's first supervised."""
    lengths = [len(row) for row in rows]
    starts = [sum(lengths[:number]) for number in range(len(rows))]
    ids_T = torch.cat(rows)
    predict_S = torch.cat([start + torch.arange(n - 1) for start, n in zip(starts, lengths, strict=True)])
    loss: Tensor = PackedLoss(peft_model)(
        ids_T=ids_T,
        positions_T=torch.cat([torch.arange(n) for n in lengths]),
        predict_S=predict_S,
        target_S=ids_T[predict_S + 1],
        cu_seqlens=torch.tensor([*starts, sum(lengths)], dtype=torch.int32),
        lengths=lengths,
    )
    return loss


def rowwise_loss(peft_model: Any, rows: list[Tensor]) -> Tensor:
    """transformers' own sdpa forward, one row at a time."""
    total = torch.zeros(())
    for row in rows:
        logits_TV = peft_model(input_ids=row[None], use_cache=False).logits[0]
        labels = torch.cat([row[1:], torch.tensor([IGNORED])])
        total = total + F.cross_entropy(logits_TV, labels, ignore_index=IGNORED, reduction="sum")
    return total


def gradients(peft_model: Any) -> dict[str, Tensor]:
    return {name: param.grad for name, param in peft_model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("regime", ["short", "long"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_packed_loss_and_gradients_are_those_of_transformers_row_by_row(family: Family, regime: str) -> None:
    """In the long regime every row is beyond LongRoPE's original length, as a regime pinned for a run has it."""
    lengths = SHORT_ROWS if regime == "short" else tuple(ORIGINAL + length for length in LONG_ROWS)
    rows = rows_of(lengths)
    theirs, ours = adapted(shrunken(family)), adapted(shrunken(family))
    use_backend(ours.get_base_model(), "sdpa")
    pinned = pin_longrope(ours.get_base_model(), max(lengths))
    assert pinned == (regime if family.rope == "longrope" else None)
    expected, got = rowwise_loss(theirs, rows), packed_loss(ours, rows)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    expected.backward()
    got.backward()
    wanted = gradients(theirs)
    assert len(wanted) == 2 * 2 * len(PRESETS[family.name].targets)
    for name, grad in gradients(ours).items():
        scale = wanted[name].abs().max()
        assert scale > 1e-3, name
        torch.testing.assert_close(grad / scale, wanted[name] / scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_shrunken_model_has_its_variants_structure(family: Family) -> None:
    """What the comparison above relies on: each feature is there, and takes part in the result."""
    model = shrunken(family)
    config, shape = model.config, family.shape
    assert config.num_attention_heads * shape.kv_heads == config.num_key_value_heads * shape.heads
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == shape.tied
    assert model.model.rotary_emb.inv_freq.shape[0] == int(HEAD_DIM * family.partial_rotary) // 2
    assert (config.sliding_window or 10**9) < max(SHORT_ROWS) or family.sliding_window is None
    layer = model.model.layers[0]
    assert layer.self_attn.qkv_proj.out_features == HEAD_DIM * (config.num_attention_heads + 2 * 2)
    assert layer.mlp.gate_up_proj.out_features == 2 * config.intermediate_size


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.sliding_window], ids=lambda family: family.name)
def test_the_window_takes_part_in_the_result(family: Family) -> None:
    rows = rows_of(SHORT_ROWS)
    windowed, whole = adapted(shrunken(family)), adapted(shrunken(family))
    for model in (windowed, whole):
        use_backend(model.get_base_model(), "sdpa")
        pin_longrope(model.get_base_model(), max(SHORT_ROWS))
    for layer in whole.get_base_model().model.layers:
        layer.self_attn.config.sliding_window = None
    assert (packed_loss(windowed, rows) - packed_loss(whole, rows)).abs() > 1e-3


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.rope == "longrope"], ids=lambda family: family.name)
def test_a_pinned_regime_is_not_what_transformers_does_to_a_short_row_alone(family: Family) -> None:
    """So the comparison in the long regime would fail with the short factors."""
    rows = rows_of((9,))
    short, long = adapted(shrunken(family)), adapted(shrunken(family))
    for model, longest in ((short, ORIGINAL), (long, ORIGINAL + 1)):
        use_backend(model.get_base_model(), "sdpa")
        pin_longrope(model.get_base_model(), longest)
    assert (packed_loss(short, rows) - packed_loss(long, rows)).abs() > 1e-3


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_full_size_config_is_recognised(family: Family) -> None:
    assert recognise(full_size_config(family)) is family


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_preset_fits_the_variant(family: Family) -> None:
    preset = PRESETS[family.name]
    assert check_targets(preset.targets, [name for name, _ in shrunken(family).named_modules()]) == []
    assert preset.precision == "bf16"
    assert 0 < preset.pack_length <= family.original_positions
    adapter = adapted(shrunken(family), preset.targets)
    fill_adapter(adapter, random.Random(0).randrange(100))
    assert {
        name.rsplit(".lora_A", 1)[0].rsplit(".", 1)[-1] for name, _ in adapter.named_parameters() if "lora_A" in name
    } == {*preset.targets}


def test_every_variant_has_a_preset() -> None:
    assert set(PRESETS) == {family.name for family in FAMILIES}
