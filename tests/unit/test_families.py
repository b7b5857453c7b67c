"""The family table, checked against transformers' own class on the meta device."""

from __future__ import annotations

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from phi3_dist.errors import ModelError
from phi3_dist.family.variants import FAMILIES, Family, check_targets, recognise, refuse_unsupported

BY_NAME = {family.name: family for family in FAMILIES}
LINEAR_NAMES = [
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
]


def hf_config(family: Family) -> dict[str, object]:
    shape = family.shape
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "rope_scaling": {"type": "longrope"} if family.rope == "longrope" else None,
    }


@pytest.mark.parametrize(
    ("name", "parameters", "qkv", "gate_up"),
    [
        ("mini-4k", 3_821_079_552, 9216, 16384),
        ("mini-128k and 3.5-mini", 3_821_079_552, 9216, 16384),
        ("medium-4k", 13_960_238_080, 7680, 35840),
        ("Phi-4-mini", 3_836_021_760, 5120, 16384),
        ("Phi-4", 14_659_507_200, 7680, 35840),
    ],
)
def test_published_numbers(name: str, parameters: int, qkv: int, gate_up: int) -> None:
    family = BY_NAME[name]
    assert (family.parameters, family.shape.qkv_out, family.shape.gate_up_out) == (parameters, qkv, gate_up)


@pytest.mark.parametrize("name", ["mini-4k", "Phi-4-mini"])
def test_counts_equal_the_real_class(name: str) -> None:
    shape = BY_NAME[name].shape
    small = Phi3Config(
        num_hidden_layers=2,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        model = Phi3ForCausalLM(small)
    model.tie_weights()
    per_layer = shape.linear_parameters // shape.layers + 2 * shape.hidden
    assert sum(p.numel() for p in model.parameters()) == shape.parameters - (shape.layers - 2) * per_layer
    for part, (columns, rows) in shape.linear_sizes.items():
        weight = next(p for n, p in model.named_parameters() if n.endswith(f"layers.0.{where(part)}.{part}.weight"))
        assert tuple(weight.shape) == (rows, columns)


def where(part: str) -> str:
    return "self_attn" if part in ("qkv_proj", "o_proj") else "mlp"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_family_is_recognised_by_structure(family: Family) -> None:
    config = hf_config(family)
    refuse_unsupported(config)
    assert recognise(config) is family
    assert recognise({**config, "num_hidden_layers": 3}) is None


def test_rope_is_read_in_both_spellings() -> None:
    config = hf_config(BY_NAME["mini-4k"])
    del config["rope_scaling"]
    assert recognise({**config, "rope_parameters": {"rope_type": "longrope"}}) is BY_NAME["mini-128k and 3.5-mini"]
    assert recognise({**config, "rope_parameters": {"rope_type": "default"}}) is BY_NAME["mini-4k"]
    assert recognise({"hidden_size": 3072}) is None


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"architectures": ["Phi3SmallForCausalLM"], "model_type": "phi3small"}, "Phi-3-small"),
        ({"model_type": "phi3small"}, "Phi-3-small"),
        ({"architectures": ["Phi3ForCausalLM"], "blocksparse_block_size": 64}, "Phi-3-small"),
        ({"architectures": ["Phi3VForCausalLM"], "model_type": "phi3_v"}, "Phi-3-vision"),
        ({"architectures": ["PhiMoEForCausalLM"], "model_type": "phimoe"}, "mixture of experts"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "LlamaForCausalLM"),
        ({}, "no architecture at all"),
    ],
)
def test_other_models_are_refused_by_name(config: dict[str, object], word: str) -> None:
    with pytest.raises(ModelError, match=word) as caught:
        refuse_unsupported(config)
    assert "microsoft/Phi-3-mini-4k-instruct" in caught.value.problems[0].fix


def test_targets() -> None:
    assert check_targets("all-linear", LINEAR_NAMES) == []
    assert check_targets(["qkv_proj", "self_attn.o_proj"], LINEAR_NAMES) == []
    llama = check_targets(["q_proj", "o_proj", "up_proj", "gate_up_prj", "xyz"], LINEAR_NAMES)
    assert [problem.where for problem in llama] == [
        "lora.targets[0]",
        "lora.targets[2]",
        "lora.targets[3]",
        "lora.targets[4]",
    ]
    assert "name qkv_proj" in llama[0].fix
    assert "name gate_up_proj" in llama[1].fix
    assert llama[2].fix == "did you mean gate_up_proj?"
    assert "down_proj, gate_up_proj, o_proj, qkv_proj" in llama[3].fix
    # the end of a name counts only from a dot on
    assert check_targets(["proj"], LINEAR_NAMES)


def test_llama_names_stay_where_the_model_has_them() -> None:
    assert check_targets(["q_proj"], ["layers.0.q_proj"]) == []
    assert "did you mean q_proj?" in check_targets(["q_poj"], ["layers.0.q_proj"])[0].fix
