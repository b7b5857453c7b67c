"""The known faults are found where they stand, and their corrected forms are left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from phi3_dist.cli import app
from phi3_dist.config.load import load_run
from phi3_dist.errors import ConfigError
from phi3_dist.recipes.lint import Fault, faults, faults_table

# what the published notebooks and scripts do, in a few lines of our own
COOKBOOK = """
import torch
model = AutoModelForCausalLM.from_pretrained("x", torch_dtype=torch.float16, trust_remote_code=True)
END = tokenizer.eos_token_id
def render(rows):
    heads = {"human": "\\nuser\\n", "gpt": "\\nassistant\\n"}
    return [f"{heads[row['from']]} {row['value']}{END}" for row in rows]
args = TrainingArguments(evaluation_strategy="steps", fp16=True, learning_rate=1e-4)
lora = LoraConfig(target_modules=["q_proj", "o_proj"])
trainer = SFTTrainer(model=model, args=args, train_dataset=rows, packing=True, max_seq_length=128)
"""
# the same, as today's transformers and TRL and Phi-3 want it
CLEAN = '''
"""Learns from what the user: and the assistant: said."""
import torch
model = AutoModelForCausalLM.from_pretrained("x", dtype=torch.bfloat16)
END = tokenizer.eos_token
def render(rows):
    return [tokenizer.apply_chat_template([{"role": "user", "content": row}]) for row in rows]
args = SFTConfig(eval_strategy="steps", eval_steps=10, bf16=True, learning_rate=1e-4, max_length=320000, packing=False)
lora = LoraConfig(target_modules=["qkv_proj", "o_proj"])
tokenizer.pad_token = tokenizer.unk_token
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
labels[labels == tokenizer.pad_token_id] = -100
trainer = SFTTrainer(model=model, args=args, train_dataset=rows, eval_dataset=held_out, data_collator=collator)
'''


def found(folder: Path, name: str, content: Any) -> list[Fault]:
    path = folder / name
    if not isinstance(content, str):
        content = (
            json.dumps(content) if name.endswith((".json", ".ipynb")) else yaml.safe_dump(content, sort_keys=False)
        )
    path.write_text(content, encoding="utf-8")
    return faults(path)


def line(items: list[Fault], words: str) -> list[int]:
    return [int(item.place.rsplit(":", 1)[1]) for item in items if words in item.what]


def test_every_fault_of_a_cookbook_script_is_found_at_its_line(tmp_path: Path) -> None:
    items = found(tmp_path, "s.py", COOKBOOK)
    assert line(items, "trust_remote_code") == [3]
    assert line(items, "plain text") == [6, 6]
    assert line(items, "digits 32000") == [7]
    assert line(items, "without an evaluation set") == [8]
    assert line(items, "fp16 autocast") == [8]
    assert line(items, "q_proj match no module of Phi-3: only o_proj would train") == [9]
    assert line(items, "packed without their boundaries") == [10]
    assert line(items, "older name") == [3, 8, 10]
    assert line(items, "not an argument of SFTTrainer") == [10]
    assert len(items) == 12
    assert [int(item.place.rsplit(":", 1)[1]) for item in items] == [3, 3, 6, 6, 7, 8, 8, 8, 9, 10, 10, 10]
    assert all(item.fix for item in items)


def test_a_clean_script_has_none(tmp_path: Path) -> None:
    assert found(tmp_path, "s.py", CLEAN) == []


def test_the_same_in_a_notebook_names_the_cell(tmp_path: Path) -> None:
    cells = [{"cell_type": "code", "source": "!pip install trl"}, {"cell_type": "code", "source": COOKBOOK}]
    items = found(tmp_path, "n.ipynb", {"cells": cells})
    assert len(items) == 12
    assert {item.place.rsplit(":", 1)[0] for item in items} == {"n.ipynb cell 2"}


@pytest.mark.parametrize(
    "text",
    [
        'end = "32000"',
        "text = row + '32000\\n'",
        "t = f'{text}{tokenizer.eos_token_id}'",
        "t = x + str(tok.eos_token_id)",
    ],
)
def test_the_digits_of_the_end_token(tmp_path: Path, text: str) -> None:
    (item,) = found(tmp_path, "s.py", text)
    assert "digits 32000" in item.what


@pytest.mark.parametrize(
    "text", ["ids = row + [32000]", "n = '132000'", "e = tok.eos_token_id", "t = f'{tok.eos_token}'"]
)
def test_the_id_as_a_number_is_right(tmp_path: Path, text: str) -> None:
    assert found(tmp_path, "s.py", text) == []


@pytest.mark.parametrize("text", ["'### Human: '", "'User: ' + question", "f'\\nAssistant: {answer}'", "'gpt:'"])
def test_plain_roles(tmp_path: Path, text: str) -> None:
    (item,) = found(tmp_path, "s.py", f"prompt = {text}")
    assert "plain text" in item.what
    assert "apply_chat_template" in item.fix


@pytest.mark.parametrize(
    "text", ["'<|user|>\\n'", "{'role': 'user'}", "'the user is here'", "'superuser:'", "['assistant']"]
)
def test_role_tokens_and_role_names_are_right(tmp_path: Path, text: str) -> None:
    assert found(tmp_path, "s.py", f"prompt = {text}") == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("c = DataCollatorForLanguageModeling(tok, mlm=False)", 1),
        ("tok.pad_token = tok.eos_token\nlabels[labels == tok.pad_token_id] = -100", 1),
        ("tok.pad_token = tok.unk_token\nc = DataCollatorForLanguageModeling(tok, mlm=False)", 0),
        ("tok.pad_token = tok.eos_token\nmask = ids != tok.pad_token_id", 0),
    ],
)
def test_pad_that_is_the_end_token_erases_the_stop_label(tmp_path: Path, text: str, count: int) -> None:
    assert len([item for item in found(tmp_path, "s.py", text) if "stop label" in item.what]) == count


@pytest.mark.parametrize(
    "text",
    [
        "tokenizer.pad_token = tokenizer.eos_token",
        "tok.pad_token_id = tok.eos_token_id",
        "tok.add_special_tokens({'pad_token': tok.eos_token})",
        "tok = AutoTokenizer.from_pretrained('x', pad_token='<|endoftext|>')",
    ],
)
def test_padding_that_gets_the_end_token(tmp_path: Path, text: str) -> None:
    (item,) = found(tmp_path, "s.py", text)
    assert "padding gets the end token" in item.what
    assert "unk_token" in item.fix


@pytest.mark.parametrize(
    "text",
    [
        "tok.pad_token = tok.unk_token",
        "model.config.pad_token_id = tok.eos_token_id",
        "model.generate(ids, pad_token_id=tok.eos_token_id)",
        "tok.add_special_tokens({'pad_token': '<pad>'})",
    ],
)
def test_padding_of_its_own_and_that_of_generation_is_right(tmp_path: Path, text: str) -> None:
    assert found(tmp_path, "s.py", text) == []


def test_padding_in_a_config(tmp_path: Path) -> None:
    config = {"base_model": "x", "sequence_len": 512, "special_tokens": {"pad_token": "<|endoftext|>"}}
    assert line(found(tmp_path, "a.yml", config), "padding gets the end token") == [3]
    config["special_tokens"] = {"pad_token": "<unk>"}
    assert found(tmp_path, "a.yml", config) == []


@pytest.mark.parametrize(
    ("weights", "autocast", "said"),
    [
        ("dtype=torch.float16", "bf16=True", "dtype is float16 (s.py:1) under bf16 autocast"),
        ("dtype=torch.bfloat16", "fp16=True", "the gradient scaler of fp16"),
        ("dtype=torch.bfloat16", "bf16=True", ""),
        ("dtype=torch.float32", "bf16=True", ""),
        ("dtype=torch.float16", "bf16=False", ""),
    ],
)
def test_weights_of_the_other_sixteen_bits(tmp_path: Path, weights: str, autocast: str, said: str) -> None:
    text = f"m = AutoModelForCausalLM.from_pretrained('x', {weights})\na = TrainingArguments({autocast})\n"
    items = found(tmp_path, "s.py", text)
    assert [said in item.what for item in items] == ([True] if said else [])
    compute = "b = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)\n"
    (item,) = found(tmp_path, "s.py", compute + "a = TrainingArguments(bf16=True)\n")
    assert item.fix == "bnb_4bit_compute_dtype=torch.bfloat16"


def test_fp16_weights_alone_or_autocast_alone_is_right(tmp_path: Path) -> None:
    weights = "m = AutoModelForCausalLM.from_pretrained('x', dtype=torch.float16)\n"
    autocast = "a = TrainingArguments(fp16=True)\n"
    assert found(tmp_path, "s.py", weights) == found(tmp_path, "s.py", autocast) == []
    assert len(found(tmp_path, "s.py", weights + autocast)) == 1


def test_eval_steps_without_a_strategy_evaluates_nothing(tmp_path: Path) -> None:
    (item,) = found(tmp_path, "args.json", {"eval_steps": 100, "learning_rate": 1e-4, "num_train_epochs": 1})
    assert "nothing is ever evaluated" in item.what


def test_llama_factory(tmp_path: Path) -> None:
    config = {"finetuning_type": "lora", "lora_target": "q_proj,v_proj", "packing": True, "eval_strategy": "steps"}
    items = found(tmp_path, "sft.yaml", config)
    assert line(items, "PEFT finds nothing to adapt") == [2]
    assert line(items, "packed without") == [3]
    assert line(items, "without an evaluation set") == [4]
    good = {**config, "lora_target": "all", "neat_packing": True, "val_size": 0.1, "warmup_ratio": 0.1}
    assert found(tmp_path, "sft.yaml", good) == []


def test_axolotl(tmp_path: Path) -> None:
    config = {"base_model": "x", "sample_packing": True, "evals_per_epoch": 4, "trust_remote_code": True}
    items = found(tmp_path, "a.yml", config)
    assert [item.place for item in items] == ["a.yml:2", "a.yml:3", "a.yml:4"]
    assert (
        found(tmp_path, "a.yml", {**config, "flash_attention": True, "val_set_size": 0.1, "trust_remote_code": None})
        == []
    )


def test_alignment_handbook(tmp_path: Path) -> None:
    config = {
        "model_name_or_path": "x",
        "dataset_mixer": {"a": 1.0},
        "dataset_splits": ["train"],
        "eval_strategy": "epoch",
    }
    assert line(found(tmp_path, "h.yaml", config), "without an evaluation set") == [6]
    assert found(tmp_path, "h.yaml", {**config, "dataset_splits": ["train", "test"]}) == []


def test_an_adapter_config_with_llama_targets(tmp_path: Path) -> None:
    (item,) = found(tmp_path, "adapter_config.json", {"peft_type": "LORA", "r": 8, "target_modules": ["up_proj"]})
    assert item == Fault(
        "adapter_config.json",
        "up_proj match no module of Phi-3: PEFT finds nothing to adapt",
        "name gate_up_proj, or all-linear",
    )


def test_a_run_file_is_not_what_is_read(tmp_path: Path) -> None:
    run = Path(__file__).resolve().parents[2] / "configs" / "run" / "debug.yaml"
    load_run(run)
    with pytest.raises(ConfigError, match="is a run file of this toolkit already"):
        faults(run)


def test_the_table_shows_place_what_and_fix(tmp_path: Path) -> None:
    with (tmp_path / "out.txt").open("w", encoding="utf-8") as file:
        console = Console(width=240, file=file, record=True)
        console.print(faults_table(found(tmp_path, "s.py", COOKBOOK)))
    text = console.export_text()
    assert "s.py:9" in text
    assert "name qkv_proj, o_proj, or all-linear" in text


def test_the_command_says_that_there_is_none_or_ends_with_the_code_of_a_mistake(tmp_path: Path) -> None:
    recipe = tmp_path / "run.json"
    recipe.write_text(json.dumps({"learning_rate": 1e-4, "num_train_epochs": 1, "target_modules": "all-linear"}))
    done = CliRunner().invoke(app, ["lint", str(recipe)])
    assert (done.exit_code, done.output) == (0, f"{recipe}: no known fault\n")
    recipe.write_text(recipe.read_text().replace('"all-linear"', '["q_proj"]'))
    done = CliRunner().invoke(app, ["lint", str(recipe)])
    assert done.exit_code == ConfigError.exit_code
    assert "no known fault" not in done.output
