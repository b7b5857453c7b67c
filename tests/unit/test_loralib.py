"""loralib both ways, against loralib's own layers: equal where the algebra is, refused with the reason where not."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib as lora
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM

from phi3_dist.adapters.files import save_adapter, write_adapter
from phi3_dist.adapters.gather import gather_adapter
from phi3_dist.adapters.loralib.files import by_module, convert_file
from phi3_dist.adapters.loralib.layers import Layer
from phi3_dist.adapters.loralib.state_dicts import (
    lora_state_dict,
    loralib_from_peft,
    mark_only_lora_as_trainable,
    peft_from_loralib,
)
from phi3_dist.adapters.reading import read_adapter
from phi3_dist.errors import AdapterError, ConfigError
from phi3_dist.family.variants import FAMILIES, Shape
from tests.ranks.gather_bodies import same

# peft 0.21 asks transformers 5.24 for a name that is on its way out
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
BIASES = ("none", "all", "lora_only")
FLAGS = {"qkv": (True, False, True)}
FC: dict[str, Any] = {"alpha": 4, "kinds": {"fc": "linear"}}
SAID: dict[str, Any] = {"alpha": 6, "kinds": {"embed": "embedding", "fc": "linear"}, "enable_lora": FLAGS}


def randomise(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) / 4)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


class Own(nn.Module):
    """A user's model, with loralib's layers or with plain ones; a norm and a head without LoRA have biases too."""

    def __init__(self, *, loralib: bool) -> None:
        super().__init__()
        if loralib:
            self.embed = lora.Embedding(11, 8, r=3, lora_alpha=6)
            self.fc = lora.Linear(8, 6, r=3, lora_alpha=6)
            self.qkv = lora.MergedLinear(6, 12, r=3, lora_alpha=6, enable_lora=list(FLAGS["qkv"]))
        else:
            self.embed = nn.Embedding(11, 8)
            self.fc = nn.Linear(8, 6)
            self.qkv = nn.Linear(6, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(self.qkv(torch.tanh(self.fc(self.embed(ids))))))
        return result


IDS = torch.arange(11)


def own_pair(bias: str) -> tuple[Own, Own]:
    """A loralib model that has trained in a bias mode, and its base as it was."""
    trained, plain = Own(loralib=True), Own(loralib=False)
    randomise(plain, 1)
    randomise(trained, 2)
    kept = dict(lora.lora_state_dict(trained, bias))
    trained.load_state_dict({k: v for k, v in plain.state_dict().items() if k not in kept}, strict=False)
    return trained, plain


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("bias", BIASES)
def test_an_own_model_goes_to_peft_and_back(tmp_path: Path, bias: Any, suffix: str) -> None:
    trained, plain = own_pair(bias)
    state = {k: v.detach().clone() for k, v in lora.lora_state_dict(trained, bias).items()}
    source = tmp_path / f"lora{suffix}"
    torch.save(state, source) if suffix == ".pt" else save_file(state, source)
    done = convert_file(source, tmp_path / "adapter", "loralib→peft", **SAID)
    assert done.tensors == len(state)

    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert loaded.peft_config["default"].bias == bias
    close(loaded(IDS), trained.train()(IDS))
    close(loaded.merge_and_unload()(IDS), trained.eval()(IDS))

    back = convert_file(tmp_path / "adapter", tmp_path / f"back{suffix}", "peft->loralib", enable_lora=FLAGS, r=3)
    read = _read(tmp_path / f"back{suffix}")
    assert same(read, state)
    assert back.layers["qkv"] == Layer("merged", 3, 6, FLAGS["qkv"])
    assert back.layers["embed"] == Layer("embedding", 3, 6)
    assert back.notes[0] == "build embed as lora.Embedding(r=3, lora_alpha=6)"
    assert "build qkv as lora.MergedLinear(r=3, lora_alpha=6, enable_lora=[True, False, True])" in back.notes
    trained.load_state_dict(read, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".pt":
        return dict(torch.load(path, weights_only=True))
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"fc": 2}, "alpha_pattern": {"fc": 5}}])
def test_peft_becomes_loralib_layers(options: dict[str, Any]) -> None:
    """MergedLinear repeats A for each group; rank-stabilised scales and patterns become each layer's own alpha."""
    plain = Own(loralib=False)
    randomise(plain, 1)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["embed", "fc", "qkv"], bias="all", **options)
    model = get_peft_model(plain, config)
    randomise(model, 3)
    tensors = gather_adapter(model)
    every = {"qkv": (True, True, True)}
    state, layers = loralib_from_peft(tensors, config.to_dict(), enable_lora=every)
    built = Own(loralib=False)
    embed, fc, qkv = (layers[name] for name in ("embed", "fc", "qkv"))
    built.embed = lora.Embedding(11, 8, r=embed.r, lora_alpha=embed.alpha)  # type: ignore[arg-type]
    built.fc = lora.Linear(8, 6, r=fc.r, lora_alpha=fc.alpha)  # type: ignore[arg-type]
    built.qkv = lora.MergedLinear(6, 12, r=qkv.r, lora_alpha=qkv.alpha, enable_lora=list(qkv.enable_lora))  # type: ignore[arg-type]
    weights = {k.replace(".base_layer", ""): v for k, v in model.get_base_model().state_dict().items()}
    built.load_state_dict(weights, strict=False)
    missing = built.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert state["qkv.lora_A"].shape == (12, 6)
    close(built(IDS), model(IDS))
    again, again_config = peft_from_loralib(
        state,
        alpha={name: layer.alpha for name, layer in layers.items()},
        kinds=SAID["kinds"],
        enable_lora=every,
    )
    plain = Own(loralib=False)
    plain.load_state_dict({k: v for k, v in weights.items() if "lora_" not in k})
    back = get_peft_model(plain, LoraConfig(**{k: v for k, v in again_config.items() if k != "peft_version"}))
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(back, again)
    close(back(IDS), model(IDS))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_conv2d_of_peft_becomes_loralibs(stride: int) -> None:
    base = nn.Sequential(nn.Conv2d(3, 4, 3, stride=stride, padding=1))
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=5, target_modules=["0"], bias="all"))
    randomise(model, 4)
    state, layers = loralib_from_peft(gather_adapter(model), model.peft_config["default"].to_dict())
    assert state.keys() == {"0.lora_A", "0.lora_B", "0.conv.bias"}
    assert layers == {"0": Layer("conv2d", 2, 5)}
    built = nn.Sequential(lora.Conv2d(3, 4, 3, stride=stride, padding=1, r=2, lora_alpha=5))
    assert set(built.load_state_dict(state, strict=False).missing_keys) == {"0.conv.weight"}
    built[0].conv.weight.data.copy_(base[0].base_layer.weight)  # type: ignore[union-attr]
    image = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    close(built(image), model(image))
    with pytest.raises(AdapterError, match="can't hold a loralib Conv2d"):
        peft_from_loralib(state, alpha=5)
    without_bias = {k: v for k, v in state.items() if "lora_" in k}
    with pytest.raises(ConfigError, match=r"give kinds: 0=linear\|embedding\|conv2d\|merged"):
        peft_from_loralib(without_bias, alpha=5)
    with pytest.raises(AdapterError, match="can't hold"):
        peft_from_loralib(without_bias, alpha=5, kinds={"0": "conv2d"})


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=5).filter(any), st.integers(1, 4), st.integers(1, 3), st.data())
def test_merged_linear_is_a_block_diagonal_adapter(flags: list[bool], r: int, size: int, data: st.DataObject) -> None:
    """ΔW equals loralib's own, and the way back gives the same bits."""
    layer = lora.MergedLinear(5, size * len(flags), r=r, lora_alpha=7, enable_lora=flags)
    randomise(layer, data.draw(st.integers(0, 1000)))
    state = {"x.qkv." + k: v.detach() for k, v in lora.lora_state_dict(layer).items()}
    tensors, config = peft_from_loralib(state, alpha=7, enable_lora={"qkv": flags})
    a, b = tensors["base_model.model.x.qkv.lora_A.weight"], tensors["base_model.model.x.qkv.lora_B.weight"]
    assert (config["r"], config["lora_alpha"]) == (r * sum(flags), 7 * sum(flags))
    close(config["lora_alpha"] / config["r"] * b @ a, layer.merge_AB() * layer.scaling)
    back, layers = loralib_from_peft(tensors, config, enable_lora={"qkv": flags}, r=r)
    assert same(back, state)
    assert layers == {"x.qkv": Layer("merged", r, 7, tuple(flags))}


# --- Phi-3 ------------------------------------------------------------------------------------------------------------


def phi3(kv_heads: int = 4) -> Phi3ForCausalLM:
    config = Phi3Config(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, sliding_window=None, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Phi3ForCausalLM(config).eval()


def loralib_phi3() -> Phi3ForCausalLM:
    """As a user of loralib would: q and v of the fused projection, and the output projection."""
    model = phi3()
    for layer in model.model.layers:
        attention: Any = layer.self_attn
        new = {
            "qkv_proj": lora.MergedLinear(32, 96, r=2, lora_alpha=4, enable_lora=[True, False, True], bias=False),
            "o_proj": lora.Linear(32, 32, r=2, lora_alpha=4, bias=False),
        }
        for name, module in new.items():
            module.load_state_dict(getattr(attention, name).state_dict(), strict=False)
            setattr(attention, name, module)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.copy_(torch.randn(param.shape, generator=generator) / 8)
    return model


def test_a_loralib_phi3_becomes_an_adapter_of_the_plain_one(tmp_path: Path) -> None:
    model = loralib_phi3()
    torch.save({"model_state_dict": lora.lora_state_dict(model)}, tmp_path / "run.pt")
    base_config = tmp_path / "config.json"
    base_config.write_text(json.dumps(phi3().config.to_dict()))
    said = by_module(alpha=["4"], enable_lora=["qkv_proj=true,false,true"])
    convert_file(
        tmp_path / "run.pt", tmp_path / "adapter", "loralib-to-peft", alpha=said.alpha, enable_lora=said.enable_lora,
        base_config=tmp_path, base_name="microsoft/Phi-3-mini-4k-instruct",
    )  # fmt: skip
    tensors, config = read_adapter(tmp_path / "adapter")
    assert "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight" in tensors
    assert config["target_modules"] == ["o_proj", "qkv_proj"]
    assert config["base_model_name_or_path"] == "microsoft/Phi-3-mini-4k-instruct"
    assert {config["r"], *config["rank_pattern"].values()} == {2, 4}
    loaded = PeftModel.from_pretrained(phi3(), tmp_path / "adapter").eval()
    ids = torch.arange(9)[None]
    expected = model.train()(ids).logits
    assert not torch.allclose(expected, phi3()(ids).logits, atol=1e-3)
    close(loaded(ids).logits, expected)
    convert_file(
        tmp_path / "adapter",
        tmp_path / "back.pt",
        "peft→loralib",
        enable_lora=said.enable_lora,
        r=2,
        base_config=tmp_path,
    )
    assert same(torch.load(tmp_path / "back.pt", weights_only=True), dict(lora.lora_state_dict(model)))


def test_a_subset_of_layers_is_named_in_full() -> None:
    state = {k: v for k, v in lora.lora_state_dict(loralib_phi3()).items() if ".0." in k and "o_proj" in k}
    _, config = peft_from_loralib(state, alpha=4, base=Shape.of(phi3().config.to_dict()))
    assert list(config["target_modules"]) == ["model.layers.0.self_attn.o_proj"]


def adapter_of(model: nn.Module, target: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=[target]))
    return gather_adapter(peft_model), peft_model.peft_config["default"].to_dict()


@pytest.mark.parametrize("base", [Shape.of(phi3(2).config.to_dict()), None])
def test_grouped_query_attention_has_no_merged_linear(base: Shape | None) -> None:
    """32 + 16 + 16 rows, as in medium and Phi-4 in small; with three groups, and with those that do fit."""
    tensors, config = adapter_of(phi3(2), "qkv_proj")
    flags = (True, False, True)
    with pytest.raises(AdapterError, match="of 64 outputs is not a MergedLinear of 3 groups"):
        loralib_from_peft(tensors, config, enable_lora={"qkv_proj": flags}, base=base)
    with pytest.raises(
        AdapterError, match=r"2 groups of 32 rows cut across .*q has 32, k has 16, v has 16: grouped-query"
    ):
        loralib_from_peft(tensors, config, enable_lora={"qkv_proj": (True, True)}, base=base)
    state, _ = loralib_from_peft(tensors, config, enable_lora={"qkv_proj": (True,) * 4}, base=base)
    again, _ = peft_from_loralib(state, alpha=8, enable_lora={"qkv_proj": (True,) * 4}, base=base)
    assert len(again) == len(tensors)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.shape.qkv_out % 3 == 0], ids=lambda f: f.name)
@pytest.mark.parametrize("known", [True, False])
def test_merged_linear_on_the_published_models(family: Any, known: bool) -> None:
    """The builds that loralib allows: right for mini, silently wrong for medium and Phi-4, and so refused here."""
    shape = family.shape
    name = "model.layers.0.self_attn.qkv_proj"
    state = {f"{name}.lora_A": torch.ones(2, shape.hidden), f"{name}.lora_B": torch.ones(2 * shape.qkv_out // 3, 1)}
    said: dict[str, Any] = {"alpha": 1, "enable_lora": {"qkv_proj": (True, False, True)}}

    def convert() -> dict[str, Tensor]:
        return peft_from_loralib(state, **said, base=shape if known else None)[0]

    if not shape.grouped_query:
        rows = convert()[f"base_model.model.{name}.lora_B.weight"].any(dim=1)
        third = shape.qkv_out // 3
        assert rows.view(3, third).all(dim=1).tolist() == [True, False, True]
        return
    with pytest.raises(AdapterError, match=r"groups of 2560 rows cut across .*q has 5120, k has 1280.*grouped-query"):
        convert()


# --- asked for, and refused -------------------------------------------------------------------------------------------


def own_state() -> dict[str, Tensor]:
    return dict(lora.lora_state_dict(Own(loralib=True)))


def test_all_that_a_file_does_not_say_is_asked_for_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        peft_from_loralib(own_state())
    text = str(caught.value)
    assert "embed and 2 more: alpha is not in a file of loralib" in text
    assert "give kinds: fc=linear|embedding" in text
    assert "qkv: enable_lora is not in a file of loralib (lora_A (6, 6), lora_B (8, 3))" in text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"alpha": {"fc": 6, "embed": 6}}, "qkv: alpha is not in a file"),
        ({"alpha": 0}, "alpha must be above 0"),
        ({"alpha": {"fcc": 6}}, "'fcc' is not an adapted module"),
        ({"kinds": {**SAID["kinds"], "other": "linear"}}, "the adapted modules end in embed, fc, qkv"),
        ({"enable_lora": {"qkv": (True, True, True)}}, "do not fit 3 enabled groups of 3"),
        ({"enable_lora": {"qkv": (False,)}}, "do not fit 0 enabled groups"),
        ({"enable_lora": {}}, "enable_lora is not in a file"),
        ({"enable_lora": {**FLAGS, "fc": (True,)}}, "enable_lora is given for what kinds calls linear"),
        ({"kinds": {**SAID["kinds"], "qkv": "linear"}, "enable_lora": {}}, "lora_A has rank 6, lora_B 3"),
    ],
)
def test_answers_that_do_not_fit_the_file(change: dict[str, Any], text: str) -> None:
    with pytest.raises((ConfigError, AdapterError)) as caught:
        peft_from_loralib(own_state(), **{**SAID, **change})
    assert text in str(caught.value)


def test_what_is_no_loralib_state_is_refused() -> None:
    state = own_state()
    del state["fc.lora_B"]
    state["fc.weight"] = torch.zeros(6, 8)
    state["qkv.lora_A"] = torch.zeros(0, 6)
    with pytest.raises(AdapterError) as caught:
        peft_from_loralib(state, **SAID)
    for text in ("fc: has lora_A alone", "fc.weight: is not a lora_A", "qkv.lora_A: has shape (0, 6)"):
        assert text in str(caught.value)
    with pytest.raises(AdapterError, match="no lora_A and lora_B"):
        peft_from_loralib({}, alpha=1)
    wrong_base = {"model.layers.0.self_attn.o_proj.lora_A": torch.ones(2, 7)}
    wrong_base["model.layers.0.self_attn.o_proj.lora_B"] = torch.ones(32, 2)
    with pytest.raises(AdapterError, match="7 inputs and 32 outputs, the base has 32 and 32"):
        peft_from_loralib(wrong_base, alpha=1, base=Shape.of(phi3().config.to_dict()))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"use_dora": True}, "DoRA's magnitudes"),
        ({"lora_bias": True}, "a bias of lora_B"),
        ({"modules_to_save": ["head"]}, "modules trained in full"),
        ({"init_lora_weights": "pissa"}, "pissa trains on a base that it has changed"),
    ],
)
def test_what_loralib_cannot_hold_is_refused(options: dict[str, Any], text: str) -> None:
    model = get_peft_model(Own(loralib=False), LoraConfig(r=2, target_modules=["fc"], **options))
    with pytest.raises(AdapterError) as caught:
        loralib_from_peft(gather_adapter(model), model.peft_config["default"].to_dict())
    assert text in str(caught.value)


def test_convolutions_that_differ_and_other_methods_are_refused() -> None:
    tensors = {"base_model.model.c.lora_A.weight": torch.ones(4, 6, 3, 1), "base_model.model.c.lora_B.weight": torch.ones(8, 4, 1, 1)}  # fmt: skip  # noqa: E501
    config = {"peft_type": "LORA", "lora_alpha": 4}
    with pytest.raises(AdapterError, match="kernel is 3×1"):
        loralib_from_peft(tensors, config)
    tensors = {"base_model.model.c.lora_A.weight": torch.ones(4, 6, 3, 3), "base_model.model.c.lora_B.weight": torch.ones(8, 2, 1, 1)}  # fmt: skip  # noqa: E501
    with pytest.raises(AdapterError, match="grouped convolution"):
        loralib_from_peft(tensors, config)
    with pytest.raises(AdapterError, match=r"peft_type: is IA3[\s\S]*lora_alpha: is missing"):
        loralib_from_peft(tensors, {"peft_type": "IA3"})


def test_merged_linear_loses_no_row_and_no_rank() -> None:
    tensors, config = adapter_of(Own(loralib=False), "qkv")
    filled = {k: torch.ones_like(v) for k, v in tensors.items()}
    with pytest.raises(AdapterError, match=r"rows of groups that enable_lora leaves out[\s\S]*qkv=true,true,true"):
        loralib_from_peft(filled, config, enable_lora=FLAGS)
    with pytest.raises(AdapterError, match="not block-diagonal"):
        loralib_from_peft(filled, config, enable_lora={"qkv": (True, True)}, r=1)
    with pytest.raises(ConfigError, match="rank 2 cannot become 2 groups of rank 7"):
        loralib_from_peft(filled, config, enable_lora={"qkv": (True, True)}, r=7)
    with pytest.raises(ConfigError, match="no layer becomes one"):
        loralib_from_peft(filled, config, r=1)
    with pytest.raises(ConfigError, match="'fc' is not an adapted module"):
        loralib_from_peft(filled, config, enable_lora={"fc": (True,)})


# --- files ------------------------------------------------------------------------------------------------------------


class Runs:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (Path.touch, (Path("ran"),))  # type: ignore[return-value]


def test_files_that_are_not_loralibs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.lora_A": Runs()}, "evil.pt")
    torch.save({"fc.lora_A": 3}, "numbers.pt")
    Path("damaged.pt").write_bytes(b"PK\x03\x04 no more")
    Path("damaged.safetensors").write_bytes(b"no")
    Path("empty.pt").touch()
    texts = {
        "evil.pt": "not a pickle of tensors alone",
        "numbers.pt": "not a dict of tensors",
        "damaged.pt": "is damaged",
        "damaged.safetensors": "is damaged",
        "empty.pt": "is damaged",
        "gone.pt": "cannot be read: No such file",
        ".": "cannot be read: Is a directory",
    }
    for name, text in texts.items():
        with pytest.raises(AdapterError) as caught:
            convert_file(name, "adapter", "loralib→peft", alpha=1)
        assert text in str(caught.value), name
    assert not Path("ran").exists()
    assert not Path("adapter").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_was_written_here_says_how_it_was_built_and_is_held_to_it(tmp_path: Path, suffix: str) -> None:
    """Of a file without alpha, 32 in place of 16 is twice the update, without a word."""
    trained, plain = own_pair("none")
    torch.save(dict(lora.lora_state_dict(trained)), tmp_path / "lora.pt")
    convert_file(tmp_path / "lora.pt", tmp_path / "adapter", "loralib→peft", **SAID)
    file = tmp_path / f"back{suffix}"
    convert_file(tmp_path / "adapter", file, "peft→loralib", enable_lora=FLAGS, r=3)
    other: dict[str, Any]
    for other, said in (
        ({"alpha": 12}, "alpha: is 12, and back"),
        ({"alpha": {"qkv": 3}}, "says of qkv: lora.MergedLinear(r=3, lora_alpha=6"),
        ({"kinds": {"fc": "embedding"}}, "kinds: is embedding"),
        ({"enable_lora": {"qkv": (True, True, False)}}, "enable_lora: is (True, True, False)"),
        ({"enable_lora": {"fc": (True,)}}, "says of fc: lora.Linear"),
    ):
        with pytest.raises(ConfigError) as caught:
            convert_file(file, tmp_path / "again", "loralib→peft", **other)
        assert said in str(caught.value)
    assert not (tmp_path / "again").exists()
    convert_file(file, tmp_path / "same", "loralib→peft", alpha=6)
    convert_file(file, tmp_path / "again", "loralib→peft")
    assert same(read_adapter(tmp_path / "again")[0], read_adapter(tmp_path / "adapter")[0])
    close(PeftModel.from_pretrained(plain, tmp_path / "again").eval()(IDS), trained.train()(IDS))
    trained.load_state_dict(torch.load(file, weights_only=True) if suffix == ".pt" else _read(file), strict=False)


def test_what_a_file_says_of_its_layers_may_be_damaged(tmp_path: Path) -> None:
    for number, said in enumerate(
        ("{", "[1]", '{"fc": 3}', '{"fc": {"kind": "cube", "r": 1, "alpha": 1, "enable_lora": []}}')
    ):
        save_file(own_state(), tmp_path / f"{number}.safetensors", metadata={"loralib_layers": said})
        with pytest.raises(AdapterError, match="is damaged"):
            convert_file(tmp_path / f"{number}.safetensors", tmp_path / "adapter", "loralib→peft", **SAID)


def test_tensors_of_integers_are_no_loralib_file(tmp_path: Path) -> None:
    torch.save({"fc.lora_A": torch.ones(2, 8, dtype=torch.int8), "fc.lora_B": torch.ones(6, 2)}, tmp_path / "lora.pt")
    with pytest.raises(AdapterError, match=r"fc.lora_A: is torch.int8, which does not train"):
        convert_file(tmp_path / "lora.pt", tmp_path / "adapter", "loralib→peft", **FC)


def test_a_file_saved_from_ddp_loses_its_prefix(tmp_path: Path) -> None:
    torch.save({f"module.{k}": v for k, v in own_state().items()}, tmp_path / "ddp.pth")
    convert_file(tmp_path / "ddp.pth", tmp_path / "adapter", "loralib→peft", **SAID)
    assert "base_model.model.fc.lora_A.weight" in read_adapter(tmp_path / "adapter")[0]


def test_a_loralib_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    torch.save(own_state(), tmp_path / "lora.pt")
    convert_file(tmp_path / "lora.pt", tmp_path / "adapter", "loralib→peft", **SAID)
    before = sorted(tmp_path.iterdir())

    def convert(target: str, **more: Any) -> None:
        convert_file(tmp_path / "adapter", tmp_path / target, "peft→loralib", **more)

    with pytest.raises(AdapterError, match=r"lora\.pt: exists"):
        convert("lora.pt")
    with pytest.raises(ConfigError, match=r"'\.txt' is not a form of loralib's files"):
        convert("lora.txt")
    with pytest.raises(AdapterError, match=r"cannot be written: (Not a directory|File exists)"):
        convert("lora.pt/below.pt")
    with pytest.raises(ConfigError, match="alpha: is not for peft→loralib"):
        convert("new.pt", alpha=3)
    with pytest.raises(ConfigError, match="r: is not for loralib→peft"):
        convert_file(tmp_path / "lora.pt", tmp_path / "other", "loralib→peft", r=3, **SAID)
    with pytest.raises(ConfigError, match="loralib-to-peft or peft-to-loralib"):
        convert_file(tmp_path / "lora.pt", tmp_path / "other", "sideways")
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        convert("new.pt", base_config=tmp_path / "config.json")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, suffix: str) -> None:
    """The kernel refuses to write past a size, as a full disk does."""
    tensors, config = peft_from_loralib({"fc.lora_A": torch.ones(64, 64), "fc.lora_B": torch.ones(64, 64)}, **FC)
    write_adapter(tmp_path / "adapter", tensors, config, card="a card")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with pytest.raises(AdapterError, match="cannot be written"):
            convert_file(tmp_path / "adapter", tmp_path / f"lora{suffix}", "peft→loralib")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_words_of_a_command_line() -> None:
    said = by_module(alpha=["fc=8", "qkv=4.5"], enable_lora=["qkv=True,false"], kinds=["fc=linear"])
    assert said.alpha == {"fc": 8, "qkv": 4.5}
    assert said.enable_lora == {"qkv": (True, False)}
    assert said.kinds == {"fc": "linear"}
    assert by_module(alpha=["32"]).alpha == 32
    assert by_module().alpha is None
    with pytest.raises(ConfigError) as caught:
        by_module(alpha=["x", "fc=1", "fc=2"], enable_lora=["true", "q=yes"], kinds=["fc=conv", "linear"])
    for text in ("'x' is not a number", "'fc' is given twice", "'yes' for 'q'", "'true' for ''", "'conv' for 'fc'"):
        assert text in str(caught.value)


# --- loralib's functions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", BIASES)
def test_loralibs_functions_on_its_own_layers(bias: Any) -> None:
    ours, theirs = Own(loralib=True), Own(loralib=True)
    theirs.load_state_dict(ours.state_dict())
    mark_only_lora_as_trainable(ours, bias)
    lora.mark_only_lora_as_trainable(theirs, bias)
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == {
        n: p.requires_grad for n, p in theirs.named_parameters()
    }
    assert same(lora_state_dict(ours, bias), dict(lora.lora_state_dict(theirs, bias)))


@pytest.mark.parametrize("bias", BIASES)
def test_loralibs_functions_on_peft_models(tmp_path: Path, bias: Any) -> None:
    """What trains is what `lora_state_dict` gives and what `save_adapter` saves, whatever the config said before."""
    model = get_peft_model(Own(loralib=False), LoraConfig(r=2, target_modules=["fc", "qkv"]))
    mark_only_lora_as_trainable(model, bias)
    trains = {n.replace(".default", "") for n, p in model.named_parameters() if p.requires_grad}
    assert len(trains) == {"none": 4, "lora_only": 6, "all": 8}[bias]
    assert lora_state_dict(model, bias).keys() == trains
    save_adapter(model, tmp_path / "adapter", card="a card")
    tensors, config = read_adapter(tmp_path / "adapter")
    assert tensors.keys() == trains
    assert config["bias"] == bias


def test_another_bias_mode_is_refused() -> None:
    model = Own(loralib=True)
    for function in (mark_only_lora_as_trainable, lora_state_dict):
        with pytest.raises(AdapterError, match="'some' is not a mode"):
            function(model, "some")  # type: ignore[operator]
