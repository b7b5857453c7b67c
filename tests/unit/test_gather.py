"""The gather in one process: PEFT's own names and values, the three bias modes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from phi3_dist.adapters.gather import gather_adapter, gather_adapter_with_stats
from phi3_dist.adapters.select import check_tensors, expected_keys
from phi3_dist.errors import AdapterError
from tests.ranks.gather_bodies import KINDS, Wrapper, same, tiny_peft

# peft 0.21 asks transformers 5.24 for a name that is on its way out
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Biased(nn.Module):
    """Two linears and a norm, all with biases; Phi-3 has none."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.outer = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.outer(self.norm(self.inner(x)))
        return result


def biased_peft(bias: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(Biased(), LoraConfig(r=2, target_modules=["inner"], bias=bias, **options))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn_like(param))
    return model


class Loralib(nn.Module):
    """What `loralib.Linear` looks like: lora_A and lora_B beside weight and bias, no PEFT."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)
        self.layer.lora_A = nn.Parameter(torch.randn(2, 6))
        self.layer.lora_B = nn.Parameter(torch.randn(5, 2))
        self.head = nn.Linear(5, 4)
        for name, param in self.named_parameters():
            param.requires_grad_("lora_" in name)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("wrapped", [False, True])
def test_equals_peft_to_the_bit(kind: str, wrapped: bool) -> None:
    model = tiny_peft(kind)
    gathered = gather_adapter(Wrapper(model) if wrapped else model)
    expected = get_peft_model_state_dict(model)
    assert same(gathered, expected)
    assert expected_keys(model) == {k: (v.shape, v.dtype) for k, v in expected.items()}


def test_the_result_is_a_copy_that_training_does_not_change() -> None:
    model = tiny_peft()
    gathered = gather_adapter(model)
    kept = {k: v.clone() for k, v in gathered.items()}
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1)
    assert same(gathered, kept)


def test_one_process_moves_nothing() -> None:
    _, stats = gather_adapter_with_stats(tiny_peft())
    assert (stats.moved_bytes, stats.buckets) == (0, 0)
    assert stats.tensor_bytes == 4 * sum(p.numel() for p in tiny_peft().parameters() if p.requires_grad)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_bias_modes_are_pefts(bias: str) -> None:
    model = biased_peft(bias)
    gathered = gather_adapter(model)
    assert same(gathered, get_peft_model_state_dict(model))
    assert len(gathered) == {"none": 2, "all": 5, "lora_only": 3}[bias]


@pytest.mark.parametrize("asked", ["none", "all", "lora_only"])
@pytest.mark.parametrize("config", ["none", "all", "lora_only"])
def test_a_bias_mode_that_is_asked_for_overrides_the_config(asked: Any, config: str) -> None:
    """The names are those that PEFT gives a model made with that mode."""
    gathered = gather_adapter(biased_peft(config), bias=asked)
    assert gathered.keys() == get_peft_model_state_dict(biased_peft(asked)).keys()


def test_modules_to_save_with_a_bias_and_trainable_tokens() -> None:
    model = biased_peft("none", modules_to_save=["outer"])
    assert same(gather_adapter(model), get_peft_model_state_dict(model))
    phi3 = tiny_peft().unload()
    config = LoraConfig(r=2, target_modules=["o_proj"], trainable_token_indices={"embed_tokens": [3, 5]})
    tokens = get_peft_model(phi3, config)
    gathered = gather_adapter(tokens)
    assert same(gathered, get_peft_model_state_dict(tokens))
    assert any("trainable_tokens_delta" in key for key in gathered)


def test_the_named_adapter_of_two() -> None:
    model = tiny_peft()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj"]))
    model.set_adapter("second")
    for name in ("default", "second"):
        assert same(gather_adapter(model, adapter_name=name), get_peft_model_state_dict(model, adapter_name=name))
    with pytest.raises(AdapterError, match="one of default, second"):
        gather_adapter(model, adapter_name="third")


def test_loralib_modules() -> None:
    model = Loralib()
    lora = {"layer.lora_A", "layer.lora_B"}
    assert set(gather_adapter(model)) == lora
    assert set(gather_adapter(model, bias="none")) == lora
    assert set(gather_adapter(model, bias="lora_only")) == lora | {"layer.bias"}
    assert set(gather_adapter(model, bias="all")) == lora | {"layer.bias", "head.bias"}
    assert torch.equal(gather_adapter(model)["layer.lora_A"], model.layer.lora_A)  # type: ignore[arg-type]


def test_a_tensor_that_trains_but_would_not_be_saved_is_refused() -> None:
    model = tiny_peft()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(AdapterError, match=r"model\.norm\.weight: trains, but the PEFT config does not save it"):
        gather_adapter(model)


def test_values_that_are_not_finite_are_refused_all_at_once() -> None:
    model = tiny_peft()
    params = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        params[0].view(-1)[0] = float("nan")
        params[3].view(-1)[0] = float("inf")
    with pytest.raises(AdapterError) as caught:
        gather_adapter(model)
    assert str(caught.value).count("base_model") == 2
    assert "NaN or infinity" in str(caught.value)


def test_empty_meta_and_integer_tensors_are_refused() -> None:
    model = Loralib()
    model.layer.lora_A = nn.Parameter(torch.zeros(0, 6))
    model.layer.lora_B = nn.Parameter(torch.zeros(5, 2, dtype=torch.uint8), requires_grad=False)
    model.head.lora_A = nn.Parameter(torch.zeros(2, 5, device="meta"))
    with pytest.raises(AdapterError) as caught:
        gather_adapter(model, bias="none")
    for text in ("layer.lora_A: has no elements", "layer.lora_B (torch.uint8)", "head.lora_A: is on the meta device"):
        assert text in str(caught.value)
    with pytest.raises(AdapterError, match="no tensor to save"):
        gather_adapter(nn.Linear(2, 2).requires_grad_(False))


def test_check_tensors_names_every_difference() -> None:
    wanted = {k: (torch.Size((2, 3)), torch.float32) for k in ("gone", "shape", "dtype", "good")}
    have = {
        "extra": torch.zeros(1),
        "shape": torch.zeros(3, 2),
        "dtype": torch.zeros(2, 3, dtype=torch.bfloat16),
        "good": torch.zeros(2, 3),
    }
    text = "\n".join(str(p) for p in check_tensors(have, wanted))
    for part in ("gone: missing", "extra: not expected", "shape (3, 2): another shape", "bfloat16: another dtype"):
        assert part in text
    assert "good" not in text
    assert check_tensors({"good": have["good"]}, {"good": wanted["good"]}) == []


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="bucket_mib is 0"):
        gather_adapter(tiny_peft(), bucket_mib=0)
    with pytest.raises(AdapterError, match="'some' is not a mode"):
        gather_adapter(tiny_peft(), bias="some")  # type: ignore[arg-type]
