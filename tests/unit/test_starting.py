"""`phi3-dist config new`: the first run file of each variant loads, and holds what the preset says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from phi3_dist.cli import app
from phi3_dist.config.load import load_run
from phi3_dist.config.schema import RunConfig
from phi3_dist.config.starter import first_run_file
from phi3_dist.errors import ConfigError, ModelError
from phi3_dist.family.variants import FAMILIES, LINEARS, PRESETS, Family
from phi3_dist.planning.preview import shape_of_source
from tests.small_models import small_phi3
from tests.unit.test_family_models import full_size_config


def loaded(folder: Path, text: str) -> RunConfig:
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 120
    return load_run(folder / "run.yaml")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_variant_by_hub_id_and_by_its_folder(family: Family, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(full_size_config(family)))
    preset = PRESETS[family.name]
    for source in (*family.hub_ids, str(tmp_path)):
        text = first_run_file(source, "rows.jsonl")
        assert text.startswith(f"# A first run file for {family.name}.")
        assert preset.reason in text
        run = loaded(tmp_path, text)
        assert (run.model.source, run.model.precision) == (source, preset.precision)
        assert (run.data.train, run.data.pack_length) == ("rows.jsonl", preset.pack_length)
        assert run.lora.targets == ("all-linear" if preset.targets == LINEARS else preset.targets)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_hub_id_is_known_in_small_letters_to_the_run_file_and_to_the_plan(family: Family, tmp_path: Path) -> None:
    source = family.hub_ids[0].lower()
    run = loaded(tmp_path, first_run_file(source, "rows.jsonl"))
    assert run.model.source == source
    assert shape_of_source(run) is family


def test_a_phi3_of_another_size_gets_the_usual_values_within_its_positions(tmp_path: Path) -> None:
    small_phi3(max_position_embeddings=512).save_pretrained(tmp_path)
    run = loaded(tmp_path, first_run_file(str(tmp_path)))
    assert (run.data.pack_length, run.model.precision) == (512, "fp32")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "no config.json in the folder"),
        ("{", "config.json cannot be read"),
        ('{"architectures": ["PhiForCausalLM"]}', "Phi-1 and Phi-2 are another class"),
        ('{"architectures": ["Phi3ForCausalLM"]}', "num_hidden_layers is missing"),
    ],
)
def test_what_this_toolkit_does_not_train_is_refused(config: str | None, said: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=said):
        first_run_file(str(tmp_path))


def test_the_verb_writes_a_file_and_replaces_none(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "first.yaml"
    words = ["config", "new", "microsoft/Phi-3.5-mini-instruct", "--rows", "chats.jsonl", "-o", str(path)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0
    assert done.output.startswith(f"written: {path}; look at it with phi3-dist config show ")
    assert load_run(path).data.train == "chats.jsonl"
    written = path.read_text()
    assert CliRunner().invoke(app, words).exit_code != 0
    assert path.read_text() == written
    (tmp_path / "file").write_text("")
    words[-1] = str(tmp_path / "file" / "x.yaml")
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, ConfigError), "a folder that is a file"
    assert "FILL_IN_rows.jsonl" in CliRunner().invoke(app, words[:3]).output
