"""LongRoPE's regime stays what the plan says, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from phi3_dist.modeling.attention.backend import use_backend
from phi3_dist.modeling.rope import pin_longrope, regime_for


def _longrope_model() -> Phi3ForCausalLM:
    torch.manual_seed(0)
    half = 4
    return Phi3ForCausalLM(
        Phi3Config(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            original_max_position_embeddings=16,
            sliding_window=None,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + 0.1 * i for i in range(half)],
                "long_factor": [4.0 + i for i in range(half)],
                "original_max_position_embeddings": 16,
            },
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()


def _logits(model: Phi3ForCausalLM, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    lengths = tuple(len(r) for r in rows)
    positions = torch.cat([torch.arange(n) for n in lengths])
    with torch.no_grad():
        out = model(torch.cat(rows)[None], position_ids=positions[None], use_cache=False, lengths=lengths).logits[0]
    return list(out.split(list(lengths)))


@pytest.mark.parametrize(("longest", "regime"), [(16, "short"), (17, "long"), (100, "long")])
def test_the_regime_follows_the_longest_row(longest: int, regime: str) -> None:
    model = _longrope_model()
    assert regime_for(model.config, longest) == regime
    assert pin_longrope(model, longest) == regime


def test_a_long_pack_mate_does_not_change_a_short_row_once_pinned() -> None:
    short, long = torch.arange(10), torch.arange(40) % 97
    free = _longrope_model()
    use_backend(free, "sdpa")
    moved = (_logits(free, [short, long])[0] - _logits(free, [short])[0]).abs().max()
    assert moved > 1e-4, "transformers no longer switches the regime by batch: pinning may go"
    pinned = _longrope_model()
    use_backend(pinned, "sdpa")
    pin_longrope(pinned, 40)
    torch.testing.assert_close(_logits(pinned, [short, long])[0], _logits(pinned, [short])[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("length", [12, 40])
def test_the_pinned_regime_gives_transformers_own_logits_of_a_row_of_that_length(length: int) -> None:
    row = torch.arange(length) % 97
    theirs, ours = _longrope_model(), _longrope_model()
    use_backend(ours, "sdpa")
    pin_longrope(ours, length)
    with torch.no_grad():
        expected = theirs(row[None]).logits[0]
    torch.testing.assert_close(_logits(ours, [row])[0], expected, atol=1e-5, rtol=1e-5)


def test_plain_rope_is_left_alone() -> None:
    config = Phi3Config(pad_token_id=None)
    assert regime_for(config, 100_000) is None
