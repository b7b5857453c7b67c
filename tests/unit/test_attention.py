"""Packed attention against each document alone, the sliding window at its boundary, grouped queries."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn
from transformers import Phi3ForCausalLM

from phi3_dist.config.schema import ModelConfig
from phi3_dist.errors import ModelError
from phi3_dist.modeling.attention.backend import attend, kernel_name, packed_sdpa, use_backend
from phi3_dist.modeling.attention.flex import block_mask
from phi3_dist.modeling.attention.kernel_interface import Documents, Settings
from phi3_dist.modeling.attention.packed_kernels import KERNELS
from phi3_dist.planning.attention_choice import BACKENDS, backends, choose_backend, choose_deterministic
from tests.small_models import small_phi3

LENGTHS = (5, 1, 12, 7)


def _model(**changes: object) -> Phi3ForCausalLM:
    return small_phi3(**changes).eval()


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


@pytest.mark.parametrize("window", [None, 1, 5, 40, 200])
@pytest.mark.parametrize("lengths", [(1,), (128,), (5, 1, 12, 7), (300, 20, 1, 129), (64,) * 6, (257, 128)])
def test_flex_blocks_and_their_mask_say_what_every_query_sees(lengths: tuple[int, ...], window: int | None) -> None:
    mask = block_mask(lengths, window, torch.device("cpu"))
    total = sum(lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    q, k = torch.arange(total)[:, None], torch.arange(total)[None, :]
    seen = (document[:, None] == document) & (k <= q)
    if window is not None:
        seen &= k > q - window
    assert torch.equal(mask.mask_mod(None, None, q, k), seen)
    count = -(-total // 128)
    for row in range(count):
        partial = mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].tolist()
        full = mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].tolist()
        assert len({*partial, *full}) == len(partial) + len(full)
        for column in range(count):
            block = seen[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
            assert (column in partial or column in full) or not block.any()
            assert column not in full or bool(block.all())


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 16), (4, 2, 24), (2, 1, 96)])
def test_flex_gives_what_per_document_sdpa_gives(heads: int, kv_heads: int, size: int, window: int | None) -> None:
    torch.manual_seed(2)
    documents, settings = Documents((5, 1, 150, 30)), Settings(0.2, window)
    q, k, v = (torch.randn(186, n, size) for n in (heads, kv_heads, kv_heads))
    with torch.no_grad():
        ours, theirs = (KERNELS[name](q, k, v, documents, settings) for name in ("flex", "sdpa"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


ALL = {"torch": "2.13.0", "flash-attn": "2.8.3", "flash-attn-3": "3.0.0"}
FOUR = {**ALL, "flash-attn-4": "4.0.0"}


@pytest.mark.parametrize(
    ("device", "head_dim", "dtype", "packages", "capability", "first"),
    [
        ("cpu", 96, "fp32", ALL, None, "sdpa"),
        ("cuda", 96, "bf16", ALL, (9, 0), "flash_attention_3"),
        ("cuda", 96, "bf16", ALL, (8, 0), "flash_attention_2"),
        ("cuda", 96, "bf16", ALL, (10, 0), "flash_attention_2"),
        ("cuda", 96, "bf16", {"torch": "2.13.0+cu130"}, (9, 0), "varlen"),
        ("cuda", 96, "bf16", {"torch": "2.11.0"}, (9, 0), "varlen"),
        ("cuda", 96, "bf16", {"torch": "2.9.1"}, (9, 0), "sdpa"),
        ("cuda", 96, "bf16", FOUR, (9, 0), "flash_attention_4"),
        ("cuda", 256, "bf16", FOUR, (9, 0), "flash_attention_4"),
        ("cuda", 96, "bf16", FOUR, (10, 0), "flash_attention_4"),
        ("cuda", 256, "bf16", FOUR, (10, 0), "flash_attention_2"),
        ("cuda", 96, "bf16", FOUR, (8, 0), "flash_attention_2"),
        ("cuda", 96, "fp32", ALL, (9, 0), "sdpa"),
        ("cuda", 100, "bf16", ALL, (9, 0), "sdpa"),
        ("cuda", 96, "fp16", ALL, (7, 5), "sdpa"),
        ("cuda", None, "bf16", ALL, None, "flash_attention_2"),
    ],
)
def test_auto_takes_the_first_that_can_run_and_says_why_not_the_others(  # noqa: PLR0917 (pytest passes them by name)
    device: str,
    head_dim: int | None,
    dtype: str,
    packages: dict[str, str],
    capability: tuple[int, int] | None,
    first: str,
) -> None:
    found = backends(device, head_dim, dtype, 2047, packages, capability=capability)
    assert tuple(one.name for one in found) == BACKENDS
    chosen = choose_backend("auto", found)
    assert chosen.name == first
    assert chosen.available
    for one in found[: BACKENDS.index(first)]:
        assert not one.available
        assert one.name in chosen.reason
        assert f": {one.reason}" in chosen.reason
    assert all(one.reason for one in found)


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        ({"scale", "window_size", "enable_gqa"}, "varlen"),
        ({"scale", "window_size"}, "varlen"),  # torch 2.11: grouped heads are repeated for it
        ({"scale", "is_causal"}, "sdpa"),  # torch 2.9 and 2.10: no window
        (set(), "sdpa"),
    ],
)
def test_varlen_is_judged_by_its_arguments_where_they_are_known(arguments: set[str], first: str) -> None:
    packages = {"torch": "2.99.0"}
    found = backends("cuda", 96, "bf16", 2047, packages, capability=(9, 0), varlen_arguments=frozenset(arguments))
    assert choose_backend("auto", found).name == first


@pytest.mark.parametrize("gqa", [True, False])
def test_varlen_gets_grouped_heads_in_the_way_it_takes_them(gqa: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernel is CUDA's: here a stand-in with its signature, computed by sdpa, sees what it would be given."""
    pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no such module")
    seen: dict[str, object] = {}

    def stand_in(q, k, v, ends, _ends, longest, _longest, *, scale, window_size, **more):  # type: ignore[no-untyped-def]
        seen.update(kv_heads=k.shape[1], window=window_size, **more)
        return KERNELS["sdpa"](q, k, v, Documents((5, 3)), Settings(scale, window_size[0] + 1))

    from phi3_dist.modeling.attention import packed_kernels as kernels

    names = frozenset({"scale", "window_size", *(["enable_gqa"] if gqa else [])})
    monkeypatch.setattr(kernels, "varlen_arguments", lambda: names)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    q, k, v = (torch.randn(8, n, 16, dtype=torch.bfloat16) for n in (4, 2, 2))
    out = KERNELS["varlen"](q, k, v, Documents((5, 3)), Settings(0.25, 4))
    assert seen == ({"kv_heads": 2, "window": (3, 0), "enable_gqa": True} if gqa else {"kv_heads": 4, "window": (3, 0)})
    torch.testing.assert_close(out, KERNELS["sdpa"](q, k, v, Documents((5, 3)), Settings(0.25, 4)))


def test_deterministic_backward_is_asked_for_in_that_node_alone() -> None:
    """torch's kernels look at a global while they run: it is on for attention's own backward and for nothing else."""
    from phi3_dist.modeling.attention.packed_kernels import _deterministic_backward

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, seen):  # type: ignore[no-untyped-def]
            ctx.seen = seen
            return x.clone()

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            ctx.seen.append(torch.are_deterministic_algorithms_enabled())
            return grad, None

    before, inside, after = [], [], []
    x = torch.ones(3, requires_grad=True)
    middle = Look.apply(Look.apply(x, after), inside)
    _deterministic_backward(middle.grad_fn)
    Look.apply(middle, before).sum().backward()
    assert (before, inside, after) == ([False], [True], [False])


def test_a_deterministic_run_names_the_kernel_by_its_own_name() -> None:
    model = _model()
    use_backend(model, "sdpa", torch.device("cpu"), deterministic=True)
    assert kernel_name(model.config) == "sdpa_deterministic"
    q = torch.randn(8, 2, 8)
    seen = attend("sdpa_deterministic", q, q, q, documents=Documents((5, 3)), settings=Settings(1.0))
    assert torch.equal(seen, attend("sdpa", q, q, q, documents=Documents((5, 3)), settings=Settings(1.0)))
    for backend in ("varlen", "flash_attention_2", "sdpa"):
        assert choose_deterministic("auto", "cuda", backend)[0]
        assert not choose_deterministic(False, "cuda", backend)[0]
    assert choose_deterministic(False, "cpu", "sdpa")[0]


def test_what_is_asked_for_by_name_is_never_replaced() -> None:
    found = backends("cuda", 96, "bf16", None, {"torch": "2.13.0"}, capability=(9, 0))
    asked = choose_backend("flash_attention_3", found)
    assert (asked.name, asked.available) == ("flash_attention_3", False)
    assert asked.reason.startswith("flash-attn-3 is not installed (pip install")
    assert asked.fix.startswith("pip install")


def test_every_backend_has_a_name_in_the_run_file() -> None:
    assert set(get_args(ModelConfig.model_fields["attention"].annotation)) == {"auto", *BACKENDS}


@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "sdpa"])
def test_a_backend_that_cannot_run_here_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ModelError, match=rf"{name} was asked for: .*the device is cpu") as caught:
        use_backend(_model(), name, torch.device("cpu"))
    assert caught.value.problems[0].fix == "model.attention=sdpa"


def test_attention_dropout_is_refused_where_there_is_none() -> None:
    from phi3_dist.modeling.attention.backend import _packed

    q = torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match="flex has no dropout"):
        _packed("flex")(nn.Module(), q, q, q, None, scaling=1.0, dropout=0.1, lengths=(6,))
