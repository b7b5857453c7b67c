"""The published recipes as run files: they load, they hold the published values, and they can be compared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from phi3_dist.cli import app
from phi3_dist.config.load import diff, load_run, resolved_yaml
from phi3_dist.family.variants import FAMILIES

RUNS = Path(__file__).resolve().parents[2] / "configs" / "run"
ADAMW_DEFAULTS = {"optim.betas": [0.9, 0.999], "optim.eps": 1e-8, "optim.weight_decay": 0.0}
# every value that the four sources publish and a run file can say; see each file's head for the source
PUBLISHED: dict[str, dict[str, Any]] = {
    "model_card_lora": {
        "model.precision": "bf16",
        "model.activation_checkpointing": True,
        "data.train": "HuggingFaceH4/ultrachat_200k",
        "data.split": "train_sft",
        "data.validation_split": "test_sft",
        "data.pack_length": 2048,
        "lora.r": 16,
        "lora.alpha": 32.0,
        "lora.dropout": 0.05,
        "lora.bias": "none",
        "lora.targets": "all-linear",
        "optim.name": "adamw",
        "optim.lr": 5e-6,
        "optim.schedule": "cosine",
        "optim.warmup": 0.2,
        "train.epochs": 1.0,
        "train.micro_batch": 4,
        "train.global_batch": 4 * 1 * 4,
        "train.eval_every": 0,
        "train.seed": 0,
        "save.every": 100,
        "save.keep": 1,
        "log.every": 20,
        **ADAMW_DEFAULTS,
    },
    "cookbook_qlora": {
        "model.quantization": "nf4",
        "model.activation_checkpointing": True,
        "data.validation_share": 0.05,
        "data.pack_length": 512,
        "lora.r": 16,
        "lora.alpha": 16.0,
        "lora.dropout": 0.05,
        "optim.name": "adamw",
        "optim.lr": 1e-4,
        "optim.schedule": "linear",
        "optim.warmup": 0.1,
        "train.epochs": 3.0,
        "train.micro_batch": 8,
        "train.global_batch": 8 * 4,
        "train.eval_every": 100,
        "train.seed": 42,
        "log.every": 100,
        **ADAMW_DEFAULTS,
    },
    **{
        name: {
            "model.activation_checkpointing": True,
            "data.pack_length": 128,
            "data.max_rows": max_rows,
            "optim.name": "paged_adamw_32bit",
            "optim.lr": 1e-4,
            "optim.schedule": "linear",
            "optim.warmup": 0.0,
            "train.epochs": 3.0,
            "train.micro_batch": 7,
            "train.global_batch": 7 * 4,
            "log.every": 10,
            **ADAMW_DEFAULTS,
        }
        for name, max_rows in (("cookbook_script", None), ("cookbook_notebook", 100))
    },
}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_holds_every_published_value(name: str) -> None:
    have = flat(load_run(RUNS / f"{name}.yaml").model_dump(mode="json"))
    wanted = PUBLISHED[name]
    assert {path: have[path] for path in wanted} == wanted


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_names_a_model_that_is_supported_and_fused_targets(name: str) -> None:
    run = load_run(RUNS / f"{name}.yaml")
    assert run.model.source in {hub_id for family in FAMILIES for hub_id in family.hub_ids}
    assert run.lora.targets == "all-linear"
    assert run.train.global_batch % run.train.micro_batch == 0


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_file_loads_and_its_resolved_form_loads_to_the_same(path: Path, tmp_path: Path) -> None:
    run = load_run(path)
    again = tmp_path / path.name
    again.write_text(resolved_yaml(run), encoding="utf-8")
    assert diff(run, load_run(again)) == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_says_where_it_departs(name: str) -> None:
    text = (RUNS / f"{name}.yaml").read_text(encoding="utf-8")
    assert len(re.findall(r"^ *# published:", text, re.MULTILINE)) >= 5
    assert max(map(len, text.splitlines())) <= 120


def test_config_diff_compares_two_recipes() -> None:
    done = CliRunner().invoke(
        app, ["config", "diff", str(RUNS / "model_card_lora.yaml"), str(RUNS / "cookbook_qlora.yaml")]
    )
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert "model.quantization: none -> nf4" in lines
    assert "optim.lr: 5e-06 -> 0.0001" in lines
    assert not any(line.startswith("lora.r:") for line in lines)
