"""The chunked loss against the plain one: value, every gradient, dtypes, and which heads may take it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Phi3ForCausalLM

from phi3_dist.config.schema import LoraConfig
from phi3_dist.modeling.attention.backend import use_backend
from phi3_dist.modeling.base import tiny_config
from phi3_dist.modeling.lora import add_lora, fill_adapter
from phi3_dist.modeling.loss import HeadLoss, PackedLoss, chunked_nll, liger_nll, plain_head

S, H, V = 23, 16, 97


def _problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(S, H), torch.randn(V, H), torch.randn(V)
    return (*(t.to(dtype).requires_grad_() for t in (hidden, weight, bias)), torch.randint(0, V, (S,)))


def _plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), target, reduction="sum")


@pytest.mark.parametrize("chunk_rows", [1, 5, S - 1, S, 4 * S])
@pytest.mark.parametrize("with_bias", [False, True])
def test_value_and_gradients_are_the_plain_ones(chunk_rows: int, with_bias: bool) -> None:
    hidden, weight, bias, target = _problem()
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)
    args = (hidden, weight, bias if with_bias else None, target)
    want, got = _plain(*args), chunked_nll(*args, chunk_rows)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    # the caller divides by a count: the gradient that arrives is not 1
    for ours, theirs in zip(torch.autograd.grad(got / 7, leaves), torch.autograd.grad(want / 7, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_extreme_logits_stay_finite_and_exact() -> None:
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight, target = torch.tensor([[1.0], [-1.0], [0.5]]), torch.tensor([0, 0])
    got = chunked_nll(hidden, weight, None, target, 1)
    assert got.item() == pytest.approx(600.0)
    got.backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.0], [-2.0]]))


def test_no_supervised_row_gives_zero_and_no_gradient() -> None:
    hidden, weight, _, target = _problem()
    nll = chunked_nll(hidden[:0], weight, None, target[:0])
    nll.backward()
    assert nll.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_bf16_autocast_follows_the_plain_paths_dtypes() -> None:
    hidden, weight, _, target = _problem()
    with torch.autocast("cpu", torch.bfloat16):
        want, got = _plain(hidden, weight, None, target), chunked_nll(hidden, weight, None, target, 5)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # the logits are the same bf16 numbers
    ours, theirs = (torch.autograd.grad(loss, (hidden, weight)) for loss in (got, want))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_bf16_weights_give_bf16_gradients() -> None:
    hidden, weight, _, target = _problem(torch.bfloat16)
    want, got = _plain(hidden, weight, None, target), chunked_nll(hidden, weight, None, target, 5)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(loss, (hidden, weight)) for loss in (got, want))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, rtol=2e-2, atol=5e-2)


def test_without_gradients_none_are_computed() -> None:
    hidden, weight, _, target = _problem()
    with torch.no_grad():
        nll = chunked_nll(hidden, weight, None, target, 5)
    assert nll.grad_fn is None
    torch.testing.assert_close(nll, _plain(hidden, weight, None, target).detach())


class _LargestFloats(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements that any floating tensor made inside has."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.numel())
        return out


def test_no_tensor_is_larger_than_a_chunk_of_logits() -> None:
    weight = torch.randn(V, H)
    found = []
    for rows in (64, 256):
        hidden, target = torch.randn(rows, H, requires_grad=True), torch.randint(0, V, (rows,))
        with _LargestFloats() as mode:
            chunked_nll(hidden, weight, None, target, 32).backward()
        found.append(mode.largest)
        assert mode.largest <= max(32 * V, rows * H)
    assert found[0] == 32 * V


def _packed_loss(*, tied: bool, head: str, chunk_rows: int) -> PackedLoss:
    torch.manual_seed(1)
    config = tiny_config()
    config.tie_word_embeddings = tied
    model = Phi3ForCausalLM(config)
    model.name_or_path = "tiny"
    use_backend(model, "sdpa")
    cfg = {
        "plain": LoraConfig(dropout=0.0),
        "saved": LoraConfig(dropout=0.0, modules_to_save=("lm_head",)),
        "lora": LoraConfig(dropout=0.0, targets=("qkv_proj", "lm_head")),
    }[head]
    loss = PackedLoss(add_lora(model, cfg, "tiny"), chunk_rows)
    fill_adapter(loss, seed=3)
    return loss


def _batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    ids_T = torch.randint(0, 300, (19,), generator=generator)
    predict_S = torch.tensor([2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 15, 16, 17])
    return {
        "ids_T": ids_T,
        "positions_T": torch.cat([torch.arange(n) for n in (9, 6, 4)]),
        "predict_S": predict_S,
        "target_S": ids_T[predict_S + 1],
        "cu_seqlens": torch.tensor([0, 9, 15, 19], dtype=torch.int32),
        "lengths": (9, 6, 4),
    }


@pytest.mark.parametrize(
    ("tied", "head", "chunked"),
    [(False, "plain", True), (True, "plain", True), (False, "saved", True), (False, "lora", False)],
)
def test_a_model_learns_the_same_through_every_kind_of_head(tied: bool, head: str, chunked: bool) -> None:
    model, batch = _packed_loss(tied=tied, head=head, chunk_rows=4), _batch()
    linear, why = plain_head(model.causal_lm.lm_head)
    assert (linear is not None) == chunked
    assert ("not a plain nn.Linear" in why) != chunked
    assert (model.loss_choice().value, model.loss_choice().why) == (
        "in chunks" if chunked else "all logits at once",
        why,
    )
    got = model(**batch)
    got.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert any("lm_head" in name for name in ours) == (head != "plain")
    model.zero_grad()
    logits = model.causal_lm(
        batch["ids_T"][None], position_ids=batch["positions_T"][None], use_cache=False, lengths=batch["lengths"]
    ).logits[0]
    want = F.cross_entropy(logits[batch["predict_S"]], batch["target_S"], reduction="sum")
    want.backward()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(ours) == set(theirs)
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-5, atol=1e-6)


def test_the_disabled_adapters_head_is_the_original_one() -> None:
    model = _packed_loss(tied=False, head="saved", chunk_rows=4)
    head = model.causal_lm.lm_head
    assert plain_head(head)[0] is head.modules_to_save["default"]
    with model.model.disable_adapter():
        assert plain_head(head)[0] is head.original_module


def test_a_weight_that_is_a_shard_goes_through_the_heads_own_forward() -> None:
    """As where nothing gathers the weight for the loss: it is empty, and only the head's own forward has it filled."""
    whole = torch.randn(V, H)
    head = nn.Linear(H, V, bias=False)
    head.weight = nn.Parameter(torch.empty(0))

    def gather(module: nn.Module, _: Any) -> None:
        module.weight.data = whole

    head.register_forward_pre_hook(gather)
    hidden, _, _, target = _problem()
    torch.testing.assert_close(HeadLoss(4)(hidden, target, head), _plain(hidden, whole, None, target))
    assert head.weight.shape == (V, H), "the head was not called"


class _AsLiger(torch.autograd.Function):
    """What the library's function is called like in version 0.8.5, computed by torch; it too needs a row."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ce_weight: Tensor | None = None,
        ignore_index: int = 0,
        lse_square_scale: float = 1.0,
        label_smoothing: float = 1.0,
        reduction: str = "mean",
    ) -> tuple[Tensor, None, None, None]:
        assert len(_input) > 0
        assert lse_square_scale == 0
        with torch.enable_grad():
            leaf = _input.detach().requires_grad_()
            logits = F.linear(leaf, weight, bias).float()
            options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
            loss = F.cross_entropy(logits, target, ce_weight, reduction=reduction, **options)
            ctx.save_for_backward(*torch.autograd.grad(loss, leaf))
        return loss.detach(), None, None, None

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return (ctx.saved_tensors[0] * grad, *(None,) * 8)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "liger_kernel.ops.fused_linear_cross_entropy"
    for parent in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    module: Any = ModuleType(name)
    module.LigerFusedLinearCrossEntropyFunction = _AsLiger
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize("with_bias", [False, True])
def test_ligers_function_is_called_for_the_sum_and_takes_autocasts_dtype(with_bias: bool) -> None:
    hidden, weight, bias, target = _problem()
    target[3] = 0  # no token is left out
    args = (hidden, weight.detach(), bias.detach() if with_bias else None, target)
    got, want = liger_nll(*args), chunked_nll(*args)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(loss / 7, hidden)[0] for loss in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(liger_nll(*args), chunked_nll(*args), rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("liger")
def test_a_head_with_ligers_kernel_takes_it_where_it_can() -> None:
    hidden, weight, _, target = _problem()
    head = nn.Linear(H, V, bias=False).requires_grad_(False)
    head.weight.copy_(weight)
    used = HeadLoss(kernel="liger")
    got = used(hidden, target, head)
    assert "AsLiger" in str(got.grad_fn)
    assert "AsLiger" not in str(HeadLoss()(hidden, target, head).grad_fn)
    torch.testing.assert_close(got, _plain(hidden, weight, None, target), rtol=1e-6, atol=1e-6)
    assert used(hidden[:0], target[:0], head).item() == 0  # the library divides by the number of rows
    other = nn.Sequential(head)
    torch.testing.assert_close(used(hidden, target, other), got, rtol=1e-6, atol=1e-6)
