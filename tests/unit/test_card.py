"""The model card: its facts, its front matter, and no path of this machine."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from phi3_dist.adapters.card import adapter_card

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


def test_absolute_paths_in_other_facts_are_cut() -> None:
    card = adapter_card({**FACTS, "config": "/data/someone/run.yaml", "odd": "a|b\nc"})
    assert "/home" not in card
    assert "| config | run.yaml |" in card
    assert "| odd | a\\|b c |" in card


def test_a_fact_stands_in_the_card_once() -> None:
    """What is known has its table; `More` is for the rest, and is not there without one."""
    assert "## More" not in adapter_card(FACTS)
    card = adapter_card(
        {**FACTS, "base": "bases/phi3", "base_is_local": True, "schedule": {"lr": 1e-4}, "odd": "~/rows.jsonl"}
    )
    more = card.split("## More\n")[1].split("\n## ")[0]
    assert [line for line in more.splitlines() if line.startswith("| ") and line != "| | |"] == [
        "| schedule | lr 0.0001 |",
        "| odd | rows.jsonl |",
    ]
    assert "bases/phi3" not in card
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
