"""The model card: its facts, its front matter, and no path of this machine."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from phi3_dist.adapters.front_matter import evaluation_of, model_index, with_front
from phi3_dist.adapters.model_card import adapter_card

FACTS: dict[str, Any] = {
    "name": "my run",
    "base": "microsoft/Phi-3-mini-4k-instruct",
    "base_is_local": False,
    "lora": {"r": 16, "alpha": 32.0, "dropout": 0.05, "targets": ("o_proj", "qkv_proj"), "dora": False},
    "data_fingerprint": "0123abcd",
    "rows": 1234,
    "heldout_loss": 1.5,
    "heldout_perplexity": None,
    "versions": {"peft": "0.21.2"},
}


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    loaded = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(loaded, dict)
    return loaded


def test_facts_stand_in_the_card() -> None:
    card = adapter_card(FACTS)
    front = front_matter(card)
    assert front["library_name"] == "peft"
    assert front["base_model"] == "microsoft/Phi-3-mini-4k-instruct"
    assert "lora" in front["tags"]
    for row in (
        "| rank r | 16 |",
        "| rows | 1,234 |",
        "0123abcd",
        "| peft | 0.21.2 |",
        "o_proj, qkv_proj",
        "| DoRA | no |",
    ):
        assert row in card
    assert "| held-out loss (nats a token) | 1.5 |" in card
    assert "perplexity" not in card, "a fact that is None is left out"
    assert 'from_pretrained("microsoft/Phi-3-mini-4k-instruct", dtype="auto")' in card


def test_a_local_base_is_shown_by_its_folder_name_alone() -> None:
    card = adapter_card({**FACTS, "base": "/data/someone/models/my-phi3", "base_is_local": True})
    assert "/home" not in card
    assert "local folder `my-phi3`" in card
    assert "base_model" not in front_matter(card), "the hub would look for it"
    assert 'from_pretrained("path/to/my-phi3"' in card


def test_facts_for_machines_stand_in_no_card() -> None:
    card = adapter_card({**FACTS, "config": "/data/someone/run.yaml", "odd": "a|b\nc"})
    assert "/home" not in card
    assert "run.yaml" not in card
    assert "## More" not in card


def test_a_fact_stands_in_the_card_once_and_under_a_name_for_people() -> None:
    optim = {"name": "adamw", "lr": 1e-4, "betas": (0.9, 0.999), "schedule": "cosine"}
    lora = {**FACTS["lora"], "layers": None, "modules_to_save": (), "rank_pattern": {}}
    card = adapter_card({**FACTS, "base": "bases/phi3", "base_is_local": True, "optim": optim, "lora": lora})
    titles = [line for line in card.splitlines() if line.startswith("## ")]
    assert len(titles) == len(set(titles))
    assert "| learning rate | 0.0001 |" in card
    assert "| optimizer | adamw |" in card
    for raw in ("None", "betas", "rank_pattern", "max_grad_norm", "bases/phi3"):
        assert raw not in card, raw
    assert card.count("0123abcd") == 1


@pytest.mark.parametrize(("kept", "other"), [("long", "short"), ("short", "long")])
def test_the_factors_of_longrope_are_told_and_loaded(kept: str, other: str) -> None:
    card = adapter_card({**FACTS, "longrope": kept, "quantization": "nf4", "revision": "v1"})
    assert f"| LongRoPE factors: serve it with these, whatever the length | {kept} |" in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert f'factors["{other}_factor"] = factors["{kept}_factor"]' in code
    assert 'AutoConfig.from_pretrained("microsoft/Phi-3-mini-4k-instruct", revision="v1")' in code
    assert ", config=config, quantization_config=quantized)" in code
    assert "AutoConfig" not in adapter_card(FACTS)


def test_a_card_of_nothing_is_still_a_card() -> None:
    card = adapter_card({})
    assert front_matter(card)["tags"]
    assert "PeftModel.from_pretrained" in card
    assert "| torch |" in card


def test_a_base_whose_tables_must_grow_is_told_in_the_table_and_in_the_code() -> None:
    card = adapter_card({**FACTS, "base_rows": 100_353})
    assert "| rows that the base's tables must have | 100,353 |" in card
    assert "\nbase.resize_token_embeddings(100353, mean_resizing=False)" in card
    assert "resize_token_embeddings" not in adapter_card(FACTS)


@pytest.mark.parametrize(
    ("kind", "init", "said"),
    [
        ("nf4", "default", "trained on the base in nf4"),
        ("nf4", "loftq", "for the base in NF4 alone"),
        ("int8", "default", "trained on the base in int8"),
    ],
)
def test_a_quantised_base_is_told_and_loaded(kind: str, init: str, said: str) -> None:
    card = adapter_card({**FACTS, "quantization": kind, "precision": "bf16", "lora": {"init": init}, "base_rows": 9})
    assert f"| quantisation of the base | {kind} |" in card
    assert said in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert ('bnb_4bit_compute_dtype="bfloat16"' in code) == (kind == "nf4")
    assert ", quantization_config=quantized)\nbase.resize_token_embeddings(9," in code
    assert "BitsAndBytes" not in adapter_card(FACTS)


# --- the hub's conventions ------------------------------------------------------------------------------------------


def hub_card(facts: dict[str, Any]) -> ModelCard:
    """As huggingface_hub reads it; errors in the metadata are raised."""
    return ModelCard(adapter_card(facts), ignore_metadata_errors=False)


def test_the_head_is_what_the_hub_reads() -> None:
    card = hub_card({**FACTS, "license": "mit", "language": "en", "datasets": ["a/chats"], "heldout_perplexity": 4.5})
    data = card.data
    assert data.base_model == "microsoft/Phi-3-mini-4k-instruct"
    assert (data.license, data.language, data.datasets) == ("mit", ["en"], ["a/chats"])
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert "base_model:adapter:microsoft/Phi-3-mini-4k-instruct" in data.tags
    assert {(r.metric_type, r.metric_value, r.dataset_type) for r in data.eval_results} == {
        ("loss", 1.5, "a/chats"),
        ("perplexity", 4.5, "a/chats"),
    }


def test_nothing_is_guessed_for_the_hub() -> None:
    data = hub_card({**FACTS, "base": "/data/me/phi3", "base_is_local": True, "heldout_loss": None}).data.to_dict()
    assert not {"license", "language", "datasets", "base_model", "model-index"} & set(data)


def test_an_evaluation_is_the_adapters_and_not_the_bases() -> None:
    said = {
        "base": {"heldout_loss": 2.0},
        "adapter": {"heldout_loss": 1.0, "exact_match": 0.5, "supervised_tokens": 9, "odd": float("nan")},
        "difference": {"heldout_loss": -1.0},
        "data": "/data/me/rows.jsonl",
        "samples": [{"prompt": "a"}],
    }
    rows, measures = evaluation_of(said)
    assert rows == "rows.jsonl"
    card = with_front(adapter_card(FACTS), {"model-index": model_index("mine", rows, measures)})
    results = ModelCard(card, ignore_metadata_errors=False).data.eval_results
    assert {(r.metric_type, r.metric_value, r.dataset_name) for r in results} == {
        ("loss", 1.0, "rows.jsonl"),
        ("exact_match", 0.5, "rows.jsonl"),
    }


@pytest.mark.parametrize(
    ("more", "wanted", "unwanted"),
    [
        (
            {},
            ("--max-lora-rank 16", "vllm serve microsoft/Phi-3-mini-4k-instruct", "--lora OUT/adapter.gguf"),
            "Merge it",
        ),
        ({"longrope": "short"}, ("--max-model-len 4096", "-c 4096"), "-c 8192"),
        ({"longrope": "long"}, ("--max-model-len 8192", "-c 8192"), "-c 4096"),
        ({"lora": {"dora": True}}, ("vLLM does not load DoRA", "llama.cpp computes no DoRA", "Merge it"), "vllm serve"),
        (
            {"lora": {"init": "loftq"}, "quantization": "nf4"},
            ("--quantization bitsandbytes", "--into nf4"),
            "llama-server",
        ),
    ],
)
def test_how_to_serve_it_comes_from_the_rules(more: dict[str, Any], wanted: tuple[str, ...], unwanted: str) -> None:
    section = adapter_card({**FACTS, **more}).split("## How to serve it\n")[1].split("## Versions")[0]
    for text in wanted:
        assert text in section
    assert unwanted not in section
