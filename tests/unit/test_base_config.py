"""A model folder's config.json: whatever stands in it, one ModelError says so, or it is a Phi-3 in one spelling."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Phi3ForCausalLM
from typer.testing import CliRunner

from phi3_dist.cli import app
from phi3_dist.config.starter import first_run_file
from phi3_dist.errors import MachineError, ModelError, Phi3DistError
from phi3_dist.family.base_config import checked_config
from phi3_dist.family.variants import recognise
from phi3_dist.modeling.base import find_base, load_full, load_quantized, tiny_config
from phi3_dist.modeling.tokenizer import tiny_tokenizer

GOOD: dict[str, Any] = json.loads(tiny_config().to_json_string())
FACTORS = {"short_factor": [1.0 + n / 8 for n in range(8)], "long_factor": [2.0 + n for n in range(8)]}
LONGROPE = {**FACTORS, "rope_type": "longrope", "original_max_position_embeddings": 4096}
DROP = object()


def changed(**changes: Any) -> dict[str, Any]:
    values = {**GOOD, "architectures": ["Phi3ForCausalLM"], **changes}
    return {key: value for key, value in values.items() if value is not DROP}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "64"}, "hidden_size is '64'; expected a whole number from 1 to 131,072"),
        ({"hidden_size": True}, "hidden_size is true"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"vocab_size": DROP}, "vocab_size is missing"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000; expected a whole number from 1 to 512"),
        ({"intermediate_size": 10**30}, "intermediate_size is 1000"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "64 is not a multiple of num_attention_heads"),
        ({"num_attention_heads": 64}, "each head turns 1 values"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": [2]}, "num_key_value_heads is [2]"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"attention_dropout": 10**400}, "attention_dropout is 1000"),
        ({"hidden_act": 5}, "hidden_act is 5"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id is [1, '2']"),
        ({"pad_token_id": 320}, "pad_token_id 320 has no row in a vocabulary of 320"),
        ({"rope_parameters": 5}, "rope_parameters is 5; expected a section"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2}}, "its type is 'linear'; Phi-3 has longrope"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta is -1"),
        ({"rope_parameters": {**LONGROPE, "long_factor": [1.0] * 7}}, "long_factor has 7 numbers; expected 8"),
        ({"rope_parameters": {**LONGROPE, "short_factor": [0.0] * 8}}, "short_factor is [0.0"),
        ({"rope_parameters": {**LONGROPE, "short_factor": None}}, "short_factor is null"),
        ({"rope_parameters": {**LONGROPE, "factor": "x"}}, "factor is 'x'"),
        (
            {"rope_scaling": {**FACTORS, "type": "su"}, "rope_parameters": None, "original_max_position_embeddings": 1},
            "original_max_position_embeddings is 1;",
        ),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised already ('awq')"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantised already ('bitsandbytes, 4 bits')"),
        ({"architectures": 5}, "its class is 5"),
        ({"architectures": [None]}, "its class is None"),
        ({"model_type": ["phi3"], "architectures": None}, "not supported"),
    ],
)  # fmt: skip
def test_each_value_that_cannot_be_is_one_message(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        checked_config(changed(**changes), "here")
    (problem,) = caught.value.problems
    assert said in problem.what
    assert len(str(problem)) < 1000
    (tmp_path / "config.json").write_text(json.dumps(changed(**changes)))
    for reader in (find_base, first_run_file):
        with pytest.raises(ModelError, match=re.escape(said)):
            reader(str(tmp_path))


def test_all_of_them_at_once() -> None:
    with pytest.raises(ModelError) as caught:
        checked_config(changed(hidden_size="64", num_attention_heads=0, rms_norm_eps=None, hidden_act=[]), "here")
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("text", ["[", "[1]", "5", "null", '"a"', "[" * 100_000, "\xff", " " * 2**21])
def test_what_is_no_object_is_one_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    for reader in (find_base, first_run_file):
        with pytest.raises(ModelError, match=r"config\.json"):
            reader(str(tmp_path))


def test_an_activation_that_no_library_has(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(changed(hidden_act="silly")))
    with pytest.raises(ModelError, match="hidden_act is 'silly'"):
        find_base(str(tmp_path))


def test_a_small_vocabulary_without_an_id_for_padding(tmp_path: Path) -> None:
    kept = checked_config(changed(pad_token_id=DROP, eos_token_id=DROP), "here")
    assert (kept["pad_token_id"], kept["eos_token_id"]) == (None, None)
    assert "pad_token_id" not in checked_config(changed(pad_token_id=DROP, vocab_size=32064), "here")


def test_nothing_else_of_the_file_steers_transformers() -> None:
    odd = {"id2label": 7, "attn_implementation": "eager", "to_dict": 1, "auto_map": {"AutoModel": "x"}, "dtype": "foo"}
    assert checked_config(changed(**odd), "here") == checked_config(changed(dtype=None), "here")


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longrope")
    config = tiny_config()
    config.max_position_embeddings = 131072
    config.rope_parameters = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, **LONGROPE}
    torch.manual_seed(0)
    Phi3ForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def as_of_2024(folder: Path, target: Path, kind: str) -> Path:
    """The same model with the config.json that the files of 2024 have: `type`, and the original length outside."""
    values = json.loads((folder / "config.json").read_text())
    del values["rope_parameters"]
    values |= {"rope_scaling": {**FACTORS, "type": kind}, "rope_theta": 10000.0}
    values["original_max_position_embeddings"] = 4096
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).symlink_to(file)
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(values))
    return target


@pytest.mark.parametrize("kind", ["su", "longrope"])
def test_su_is_longrope(kind: str, longrope: Path, tmp_path: Path) -> None:
    old, new = find_base(str(as_of_2024(longrope, tmp_path / "old", kind))), find_base(str(longrope))
    assert old.config.rope_parameters == new.config.rope_parameters
    assert old.config.rope_parameters["original_max_position_embeddings"] == 4096
    ids = torch.arange(30)[None]
    with torch.no_grad():
        ours, theirs = (load_full(base, torch.float32, torch.device("cpu"))(ids).logits for base in (old, new))
    assert torch.equal(ours, theirs)
    assert recognise(changed(rope_scaling={"type": kind}, rope_parameters=None)) is None


def test_a_base_of_2024_is_quantised_as_it_was_read(longrope: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = find_base(str(as_of_2024(longrope, tmp_path / "old", "su")))
    model = load_quantized(base, "nf4", torch.float32, torch.device("cpu"))
    assert model.config.rope_parameters["rope_type"] == "longrope"


def test_a_home_folder_is_found(longrope: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(longrope.parent))
    assert find_base(f"~/{longrope.name}").folder == longrope
    assert "precision: fp32" in first_run_file(f"~/{longrope.name}")


@pytest.mark.parametrize("source", ["x" * 300, "a/" + "x" * 300, "\0", "~nobody-of-this-name/x"])
def test_a_source_that_no_system_takes_is_one_message(source: str) -> None:
    with pytest.raises(ModelError):
        find_base(source)
    with pytest.raises(ModelError):
        first_run_file(source)


@pytest.mark.parametrize(
    ("override", "error", "said"),
    [
        ("lora.targets=[q_proj]", ModelError, "matches no module"),
        ("lora.modules_to_save=[lm_haed]", ModelError, "lm_haed"),
        ("model.adapter=nowhere", Phi3DistError, "nowhere"),
        ("log.trackers=[no_such]", MachineError, "is not a tracker"),
        ("lora.layers=[7]", ModelError, "7"),
    ],
)
def test_prepare_refuses_what_train_refuses(
    override: str, error: type[Phi3DistError], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {{source: tiny-random}}\ndata: {{train: {tmp_path}/rows.jsonl, validation_share: 0}}\n")
    told = []
    for words in (["prepare", str(run), override], ["train", str(run), f"save.folder={tmp_path}/run", override]):
        done = CliRunner().invoke(app, words)
        assert isinstance(done.exception, error), (words, done.output, done.exception)
        told.append(str(done.exception))
    assert said in told[0]
    assert told[0] == told[1]
    assert not (tmp_path / "cache").exists(), "before any row is read"
