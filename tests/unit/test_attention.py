"""Packed attention against each document alone, the sliding window at its boundary, grouped queries."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM

from phi3_dist.errors import ModelError
from phi3_dist.modeling.attention import packed_sdpa, use_backend

LENGTHS = (5, 1, 12, 7)


def _model(**changes: object) -> Phi3ForCausalLM:
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=None,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    for key, value in changes.items():
        setattr(config, key, value)
    return Phi3ForCausalLM(config).eval()


def _packed_logits(model: Phi3ForCausalLM, ids: list[torch.Tensor]) -> torch.Tensor:
    lengths = tuple(len(i) for i in ids)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return model(torch.cat(ids)[None], position_ids=positions[None], use_cache=False, lengths=lengths).logits[0]


@pytest.mark.parametrize("window", [None, 4])
def test_a_pack_gives_each_document_the_logits_it_has_alone(window: int | None) -> None:
    alone, packed = _model(sliding_window=window), _model(sliding_window=window)
    use_backend(packed, "sdpa")
    ids = [torch.randint(0, 97, (n,)) for n in LENGTHS]
    with torch.no_grad():
        together = _packed_logits(packed, ids)
        apart = torch.cat([alone(i[None]).logits[0] for i in ids])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_another_document_changes_nothing_and_gets_no_gradient() -> None:
    model = _model()
    use_backend(model, "sdpa")
    ids = [torch.randint(0, 97, (n,)) for n in LENGTHS]
    lengths, positions = LENGTHS, torch.cat([torch.arange(n) for n in LENGTHS])
    embeds = model.model.embed_tokens(torch.cat(ids)).detach()[None].requires_grad_()
    out = model(inputs_embeds=embeds, position_ids=positions[None], use_cache=False, lengths=lengths).logits[0]
    out[6:18].sum().backward()
    reached = embeds.grad[0].abs().sum(-1) > 0
    assert reached[6:18].all()
    assert not reached[:6].any()
    assert not reached[18:].any()


@pytest.mark.parametrize(("window", "length"), [(4, 11), (4, 4), (3, 9), (1, 3)])
def test_the_window_reaches_exactly_so_many_positions_itself_included(window: int, length: int) -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 2, length, 8) for _ in range(3))
    v.requires_grad_()
    out, _ = packed_sdpa(nn.Module(), q, k, v, None, scaling=0.35, sliding_window=window, lengths=(length,))
    for position in range(length):
        (grad,) = torch.autograd.grad(out[0, position].sum(), v, retain_graph=True)
        reached = torch.nonzero(grad[0].abs().sum((0, 2))).flatten().tolist()
        assert reached == list(range(max(0, position - window + 1), position + 1))


def test_lengths_that_do_not_cover_the_row_are_refused() -> None:
    q = torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match="cover 6 tokens, got 5"):
        packed_sdpa(nn.Module(), q, q, q, None, scaling=1.0, lengths=(5,))


def test_flash_attention_without_its_package_is_refused_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="flash-attn is not installed"):
        use_backend(_model(), "flash_attention_2")
