"""Other toolkits' files become run files: by parsing alone, each key accounted for, and always a file that loads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from phi3_dist.config.load import load_run
from phi3_dist.config.schema import RunConfig
from phi3_dist.config.starter import FILL_IN_ROWS
from phi3_dist.errors import ConfigError
from phi3_dist.recipes import dialects
from phi3_dist.recipes.draft import Finding
from phi3_dist.recipes.importing import FILL_IN_MODEL, Imported, findings_table, import_run
from phi3_dist.recipes.rules import ALIASES, RULES, UNSUPPORTED, fused_targets
from phi3_dist.recipes.rules_joint import JOINT_KEYS

# the shape of the model card's script, shortened
SCRIPT = """
import torch
from trl import SFTTrainer

training_config = {
    "bf16": True,
    "learning_rate": 5.0e-06,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "max_steps": -1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 3,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "eval_strategy": "no",
    "warmup_ratio": 0.2,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 0,
    "log_level": "info",
}
RANK = 8
LLAMA = ["q_proj", "v_proj", "o_proj"]
peft_config = {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.05, "target_modules": LLAMA}
raise SystemExit("a script that is imported never runs")
train_conf = TrainingArguments(**training_config)
base = "microsoft/Phi-3-mini-4k-instruct"
model_kwargs = dict(attn_implementation="flash_attention_2", torch_dtype=torch.bfloat16, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(base, **model_kwargs)
tokenizer.padding_side = "right"
raw = load_dataset("HuggingFaceH4/ultrachat_200k")
trainer = SFTTrainer(
    model=model, args=train_conf, train_dataset=raw["train_sft"], eval_dataset=raw["test_sft"],
    max_seq_length=2048, packing=True,
)
"""


def write(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    if not isinstance(content, str):
        content = json.dumps(content) if name.endswith((".json", ".ipynb")) else yaml.safe_dump(content)
    path.write_text(content, encoding="utf-8")
    return path


def imported(folder: Path, name: str, content: Any, devices: int = 1) -> tuple[Imported, RunConfig]:
    done = import_run(write(folder, name, content), devices=devices)
    return done, load_run(write(folder, "run.yaml", done.run_yaml))


def finding(done: Imported, key: str) -> Finding:
    (found,) = [item for item in done.findings if item.key == key]
    return found


def test_a_script_becomes_a_run_file(tmp_path: Path) -> None:
    done, run = imported(tmp_path, "finetune.py", SCRIPT, devices=2)
    assert done.dialect == dialects.SCRIPT
    assert (run.model.source, run.model.precision) == ("microsoft/Phi-3-mini-4k-instruct", "bf16")
    assert (run.model.attention, run.model.activation_checkpointing) == ("flash_attention_2", True)
    assert (run.data.train, run.data.split) == ("HuggingFaceH4/ultrachat_200k", "train_sft")
    assert (run.data.validation, run.data.validation_split) == ("HuggingFaceH4/ultrachat_200k", "test_sft")
    assert run.data.pack_length == 2048
    assert (run.lora.r, run.lora.dropout, run.lora.targets) == (8, 0.05, ("qkv_proj", "o_proj"))
    assert (run.optim.lr, run.optim.schedule, run.optim.warmup) == (5e-6, "cosine", 0.2)
    assert (run.train.micro_batch, run.train.global_batch, run.train.epochs) == (4, 24, 1.0)
    assert (run.train.eval_every, run.train.seed, run.save.every, run.save.keep) == (0, 0, 100, 1)


def test_each_key_is_taken_changed_with_a_reason_or_not_supported(tmp_path: Path) -> None:
    done, _ = imported(tmp_path, "finetune.py", SCRIPT, devices=2)
    assert {"learning_rate", "log_level", "padding_side", "max_seq_length"} <= {item.key for item in done.findings}
    assert all(item.reason for item in done.findings if item.verdict != "taken")
    rate = finding(done, "learning_rate")
    assert (rate.verdict, rate.value, rate.target, rate.place) == ("taken", 5e-6, "optim.lr", "finetune.py:7")
    batch = finding(done, "gradient_accumulation_steps")
    assert batch.verdict == "changed"
    assert "4 per device × 3 accumulation × 2 devices = 24" in batch.reason
    assert batch.reason.split(";")[0] in " ".join(done.run_yaml.replace("#", " ").split())
    targets = finding(done, "target_modules")
    assert targets.verdict == "changed"
    assert "q_proj, v_proj match no module of Phi-3, which fuses them into qkv_proj" in targets.reason
    assert "qkv_proj adapts all the parts it fuses" in targets.reason
    assert finding(done, "trust_remote_code").verdict == "not supported"
    assert "trust_remote_code = True" in done.run_yaml
    assert "is computed" in finding(done, "lora_alpha").reason
    assert finding(done, "packing").verdict == "changed"
    places = [int(item.place.rsplit(":", 1)[1]) for item in done.findings if item.place.startswith("finetune.py:")]
    assert places == sorted(places)


def test_what_the_source_leaves_to_its_toolkit_is_filled_in_as_that_toolkit_does(tmp_path: Path) -> None:
    text = "args = TrainingArguments(output_dir='out', learning_rate=1e-4)\nlora = LoraConfig(r=4)\n"
    done, run = imported(tmp_path, "s.py", text)
    assert (run.train.micro_batch, run.train.global_batch, run.train.epochs) == (8, 8, 3.0)
    assert (run.optim.schedule, run.optim.warmup, run.train.seed) == ("linear", 0.0, 42)
    assert (run.lora.r, run.lora.alpha, run.lora.dropout) == (4, 8.0, 0.0)
    assert finding(done, "num_train_epochs").place == "TrainingArguments' default"
    assert run.save.folder == "out"


def test_a_script_without_lora_says_that_an_adapter_is_trained_instead(tmp_path: Path) -> None:
    text = "args = TrainingArguments(learning_rate=1e-4, fp16=True, save_strategy='epoch', optim='lion_32bit')"
    done, run = imported(tmp_path, "s.py", text)
    assert "training every parameter is not offered" in done.run_yaml
    assert (run.lora.r, run.lora.targets, run.model.precision) == (16, "all-linear", "auto")
    assert "loss scaling" in finding(done, "fp16").reason
    assert (finding(done, "optim").verdict, run.optim.name) == ("changed", "adamw")
    assert finding(done, "save_strategy").verdict == "changed"


def test_a_value_that_depends_on_the_hardware_becomes_auto(tmp_path: Path) -> None:
    text = "import torch\na = TrainingArguments(bf16=torch.cuda.is_bf16_supported(), learning_rate=float(RATE))"
    done, run = imported(tmp_path, "s.py", text)
    assert run.model.precision == "auto"
    assert "auto decides the same way" in finding(done, "bf16").reason
    assert finding(done, "learning_rate").verdict == "not supported"
    assert finding(done, "learning_rate").value.text == "float(RATE)"
    assert run.optim.lr == RunConfig.model_validate({"model": {"source": "x"}, "data": {"train": "x"}}).optim.lr


def test_a_notebook_is_read_cell_by_cell_and_what_is_no_python_is_named(tmp_path: Path) -> None:
    cells: list[dict[str, Any]] = [
        {"cell_type": "code", "source": ["This command is prose\n", "pip install trl"]},
        {"cell_type": "code", "source": ["%%bash\n", "pip install trl"]},
        {"cell_type": "markdown", "source": "# learning_rate = 5"},
        {"cell_type": "code", "source": ["!pip list\n", "lora_r = 16\n", "model_id = 'microsoft/phi-4'"]},
        {"cell_type": "code", "source": "peft = LoraConfig(r=lora_r, lora_alpha=16, target_modules=['q_proj','k_proj',"
                                        "'v_proj','o_proj','gate_proj','up_proj','down_proj'])\n"
                                        "bnb = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')\n"
                                        "m = AutoModelForCausalLM.from_pretrained(model_id)"},
    ]  # fmt: skip
    done, run = imported(tmp_path, "n.ipynb", {"cells": cells, "nbformat": 4})
    assert done.dialect == dialects.NOTEBOOK
    assert (run.model.source, run.model.quantization) == ("microsoft/phi-4", "nf4")
    assert (run.lora.r, run.lora.targets) == (16, "all-linear")
    assert finding(done, "target_modules").place == "n.ipynb cell 5:1"
    assert [item.place for item in done.findings if not item.key] == ["n.ipynb cell 1"]


def test_the_two_dictionaries_as_json(tmp_path: Path) -> None:
    pair = {
        "training_config": {"learning_rate": "1e-4", "warmup_steps": 10, "max_steps": 50, "num_train_epochs": 3},
        "peft_config": {"r": 16, "lora_alpha": 32, "bias": "none", "task_type": "CAUSAL_LM"},
    }
    done, run = imported(tmp_path, "recipe.json", pair)
    assert done.dialect == dialects.PAIR
    assert (run.optim.lr, run.optim.warmup, run.train.max_steps, run.train.epochs) == (1e-4, 10.0, 50, None)
    assert "max_steps says when to stop" in finding(done, "num_train_epochs").reason


def test_training_arguments_as_json(tmp_path: Path) -> None:
    done, run = imported(
        tmp_path,
        "args.json",
        {
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-4,
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "report_to": ["wandb", "tensorboard"],
            "logging_steps": 0.1,
            "eval_strategy": "epoch",
            "dataloader_num_workers": 4,
            "push_to_hub": False,
            "hub_token": None,
            "lr_scheduler_type": "cosine_with_min_lr",
        },
    )
    assert done.dialect == dialects.TRAINING_ARGUMENTS
    assert (run.optim.betas, run.log.trackers) == ((0.9, 0.95), ("wandb", "tensorboard"))
    assert finding(done, "logging_steps").verdict == "not supported"
    assert (finding(done, "eval_strategy").verdict, run.train.eval_every) == ("changed", 0)
    assert (finding(done, "lr_scheduler_type").verdict, run.optim.schedule) == ("changed", "cosine")
    assert finding(done, "dataloader_num_workers").reason
    assert finding(done, "push_to_hub").verdict == "taken"
    assert "do not say whether LoRA is used" in done.run_yaml


def test_deepspeed(tmp_path: Path) -> None:
    config = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "betas": [0.9, 0.95], "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 100}},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    }
    done, run = imported(tmp_path, "ds.json", config)
    assert done.dialect == dialects.DEEPSPEED
    assert (run.train.global_batch, run.train.micro_batch, run.model.precision) == (64, 4, "bf16")
    assert (run.optim.lr, run.optim.betas, run.optim.schedule, run.optim.warmup) == (2e-4, (0.9, 0.95), "linear", 100)
    assert "configs/accelerate/zero3_offload.yaml" in finding(done, "zero_optimization.stage").reason
    assert (run.model.source, run.data.train) == (FILL_IN_MODEL, FILL_IN_ROWS)
    assert "Replace FILL_IN" in done.run_yaml


def test_an_adapter_config(tmp_path: Path) -> None:
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "microsoft/Phi-3.5-mini-instruct",
        "r": 32,
        "lora_alpha": 64,
        "lora_dropout": 0.1,
        "target_modules": ["gate_up_proj", "qkv_proj"],
        "use_rslora": True,
        "modules_to_save": ["lm_head"],
        "init_lora_weights": "pissa",
        "rank_pattern": {"q_proj": 8, "v_proj": 16, "layers.0.mlp.gate_up_proj": 4},
        "alpha_pattern": {},
        "layers_to_transform": [1, 2],
    }
    done, run = imported(tmp_path, "adapter_config.json", config)
    assert done.dialect == dialects.PEFT
    assert (run.lora.r, run.lora.alpha, run.lora.dropout, run.lora.rslora) == (32, 64.0, 0.1, True)
    assert run.lora.targets == ("qkv_proj", "gate_up_proj")
    assert run.lora.modules_to_save == ("lm_head",)
    assert run.lora.init == "pissa"
    assert run.lora.layers == (1, 2)
    assert run.lora.rank_pattern == {"qkv_proj": 16, "layers.0.mlp.gate_up_proj": 4}
    assert "q_proj is part of qkv_proj" in finding(done, "rank_pattern").reason
    assert finding(done, "alpha_pattern").verdict == "taken"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("init_lora_weights", "olora", "default, pissa"),
        ("layers_to_transform", [-1], "counted from 0"),
        ("rank_pattern", {"o_proj": 0}, "above 0"),
        ("alpha_pattern", {"o_proj(": 2}, "for each name"),
        ("loftq_config", {"loftq_bits": 4}, "lora.init loftq"),
    ],
)
def test_what_an_adapter_config_asks_in_vain_is_told(tmp_path: Path, key: str, value: object, said: str) -> None:
    done, _ = imported(tmp_path, "adapter_config.json", {"peft_type": "LORA", "r": 8, "lora_alpha": 8, key: value})
    assert any(f.verdict == "not supported" and said in f.reason for f in done.findings if f.key.startswith(key))


def test_llama_factorys_pissa_and_lora_plus(tmp_path: Path) -> None:
    recipe = {
        **{"model_name_or_path": "m", "stage": "sft", "finetuning_type": "lora", "dataset": "d", "cutoff_len": 512},
        **{"lora_rank": 8, "lora_target": "all", "pissa_init": True, "pissa_iter": 4, "loraplus_lr_ratio": 16.0},
    }
    _, run = imported(tmp_path, "recipe.yaml", recipe)
    assert (run.lora.init, run.lora.plus_ratio) == ("pissa_niter_4", 16.0)


def test_an_alignment_handbook_recipe(tmp_path: Path) -> None:
    recipe = {
        "model_name_or_path": "microsoft/Phi-3-mini-4k-instruct",
        "model_revision": "main",
        "torch_dtype": "bfloat16",
        "dataset_mixer": {"HuggingFaceH4/ultrachat_200k": 1.0, "me/other": 0.5},
        "dataset_splits": ["train_sft", "test_sft"],
        "use_peft": True,
        "load_in_4bit": True,
        "lora_r": 16,
        "lora_alpha": 16,
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "max_seq_length": 2048,
        "learning_rate": 2.0e-4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "evaluation_strategy": "steps",
        "eval_steps": 20,
        "hub_model_id": "me/x",
    }
    done, run = imported(tmp_path, "config_qlora.yaml", recipe)
    assert done.dialect == dialects.HANDBOOK
    assert run.model_dump(mode="json")["data"]["train"] == [
        "HuggingFaceH4/ultrachat_200k",
        {"path": "me/other", "weight": 0.5, "split": None, "subset": None},
    ]
    assert run.data.validation == ("HuggingFaceH4/ultrachat_200k", "me/other")
    assert (run.data.split, run.data.validation_split) == ("train_sft", "test_sft")
    assert (run.model.quantization, run.model.revision, run.lora.targets) == ("nf4", "main", "all-linear")
    assert (run.train.global_batch, run.train.eval_every) == (8, 20)
    assert finding(done, "learning_rate").place.startswith("config_qlora.yaml:")


def test_a_llama_factory_config(tmp_path: Path) -> None:
    config = {
        "model_name_or_path": "microsoft/Phi-3-mini-4k-instruct",
        "stage": "sft",
        "finetuning_type": "lora",
        "lora_rank": 4,
        "lora_target": "q_proj,v_proj",
        "dataset": "identity,alpaca_en_demo",
        "template": "phi",
        "cutoff_len": 1024,
        "quantization_bit": 8,
        "flash_attn": "fa2",
        "val_size": 0.1,
        "eval_strategy": "steps",
        "eval_steps": 500,
        "num_train_epochs": 3.0,
        "learning_rate": 1e-4,
    }
    done, run = imported(tmp_path, "sft.yaml", config)
    assert done.dialect == dialects.LLAMA_FACTORY
    assert (run.lora.r, run.lora.alpha, run.lora.targets) == (4, 8.0, ("qkv_proj",))
    assert (run.model.quantization, run.model.attention) == ("int8", "flash_attention_2")
    assert (run.data.train, run.data.pack_length, run.data.validation_share) == (FILL_IN_ROWS, 1024, 0.1)
    assert "dataset_info.json" in finding(done, "dataset").reason
    changed = {"stage": "dpo", "finetuning_type": "full", "flash_attn": "fa4"}
    other, other_run = imported(tmp_path, "dpo.yaml", {**config, **changed})
    assert other_run.model.attention == "flash_attention_4"
    assert finding(other, "stage").verdict == "not supported"
    assert finding(other, "finetuning_type").verdict == "changed"


def test_an_axolotl_config(tmp_path: Path) -> None:
    config = {
        "base_model": "microsoft/Phi-3-mini-4k-instruct",
        "adapter": "qlora",
        "load_in_4bit": True,
        "datasets": [{"path": "me/chats", "type": "chat_template"}, {"path": "rows.jsonl", "type": "context_qa"}],
        "val_set_size": 0.05,
        "sequence_len": 4096,
        "sample_packing": True,
        "lora_target_linear": True,
        "lora_r": 32,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_epochs": 4,
        "optimizer": "adamw_bnb_8bit",
        "learning_rate": "2e-4",
        "bf16": "auto",
        "evals_per_epoch": 4,
    }
    done, run = imported(tmp_path, "qlora.yml", config)
    assert done.dialect == dialects.AXOLOTL
    assert (run.data.train, run.data.validation_share) == (("me/chats", "rows.jsonl"), 0.05)
    assert "context_qa" in finding(done, "datasets").reason
    assert (run.optim.name, run.optim.lr, run.train.epochs) == ("adamw_8bit", 2e-4, 4.0)
    assert (run.train.micro_batch, run.train.global_batch) == (2, 8)
    assert finding(done, "evals_per_epoch").verdict == "not supported"
    full, _ = imported(tmp_path, "full.yml", {k: v for k, v in config.items() if k != "adapter" and "lora" not in k})
    assert "training every parameter is not offered" in full.run_yaml


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.py", None, "no such file"),
        ("a.py", "def (", "is not Python"),
        ("a.json", "{", "is not JSON"),
        ("a.yaml", "a: [", "is not YAML"),
        ("a.yaml", "- 1", "no mapping"),
        ("a.yaml", "colour: red", "no known dialect"),
        ("a.toml", "a = 1", "has the ending .toml"),
        ("a.yaml", "distributed_type: MULTI_GPU", "Accelerate config"),
        ("a.yaml", "model: {source: x}\ndata: {train: y}", "run file of this toolkit already"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(
    tmp_path: Path, name: str, content: str | None, says: str
) -> None:
    path = tmp_path / name if content is None else write(tmp_path, name, content)
    with pytest.raises(ConfigError, match=says) as caught:
        import_run(path)
    assert name in caught.value.problems[0].where


def test_no_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="devices is 0"):
        import_run(write(tmp_path, "s.py", SCRIPT), devices=0)


def test_values_that_a_run_file_cannot_hold_give_way_to_defaults_and_are_told(tmp_path: Path) -> None:
    config = {"lora_dropout": 1.5, "r": 8, "lora_alpha": 0, "target_modules": ["fc1"], "base_model_name_or_path": " "}
    done, run = imported(tmp_path, "adapter_config.json", config)
    assert (run.lora.r, run.lora.dropout, run.lora.targets) == (8, 0.05, "all-linear")
    assert finding(done, "lora_dropout").verdict == "not supported"
    assert "below 1" in finding(done, "lora_dropout").reason
    assert run.model.source == FILL_IN_MODEL
    evaluated = {"learning_rate": 1e-4, "num_train_epochs": 1, "warmup_steps": 500, "max_steps": 100}
    done, run = imported(tmp_path, "args.json", evaluated)
    assert run.train.max_steps == 100
    assert "the learning rate would only rise" in finding(done, "warmup_steps").reason


def test_a_value_that_is_set_twice_has_one_winner_that_is_named(tmp_path: Path) -> None:
    text = "a = SFTConfig(max_seq_length=512)\ntokenizer.model_max_length = 4096\nt = SFTTrainer(max_seq_length=512)"
    done, run = imported(tmp_path, "s.py", text)
    assert run.data.pack_length == 512
    assert "set by max_seq_length at s.py:1" in finding(done, "model_max_length").reason
    names = {"per_device_train_batch_size": 2, "per_gpu_train_batch_size": 3, "learning_rate": 1e-4}
    done, run = imported(tmp_path, "args.json", names)
    assert run.train.micro_batch == 2
    assert finding(done, "per_gpu_train_batch_size").reason == "another key decides it"


def test_target_names() -> None:
    assert fused_targets(["v_proj", "q_proj"]) == (("qkv_proj",), [])
    assert fused_targets(["down_proj", "model.layers.0.mlp.up_proj"]) == (("gate_up_proj", "down_proj"), [])
    assert fused_targets(["Wqkv", "lm_head"]) == (("lm_head",), ["Wqkv"])


def test_each_alias_leads_to_a_rule() -> None:
    homeless = {
        key: name for key, name in ALIASES.items() if name not in {*RULES, *JOINT_KEYS, *UNSUPPORTED, "tokenizer"}
    }
    assert homeless == {}


_KEYS = sorted({*RULES, *JOINT_KEYS, *UNSUPPORTED, *ALIASES} - {"distributed_type"})
_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["no", "auto", "steps"])
)
_VALUES = _SCALARS | st.lists(_SCALARS, max_size=3) | st.dictionaries(st.text(), _SCALARS, max_size=2)


@given(values=st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=8), devices=st.integers(1, 9))
@example(values={"rank_pattern": {"": 2.0**40 + 1}}, devices=1)
@example(values={"model_max_length": 2.0**31}, devices=1)
def test_any_values_give_a_run_file_that_loads(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], devices: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    config = {"learning_rate": 1e-4, "num_train_epochs": 1, **values}
    pair = {"training_config": config, "peft_config": {"r": 4}}
    done, _ = imported(folder, "any.json", pair, devices)
    assert {item.key for item in done.findings} >= set(config)


def test_the_table_shows_verdicts_and_reasons(tmp_path: Path) -> None:
    done, _ = imported(tmp_path, "finetune.py", SCRIPT)
    console = Console(width=200, record=True, file=(tmp_path / "out.txt").open("w"))
    console.print(findings_table(done))
    text = console.export_text()
    assert text.splitlines()[0].strip() == dialects.SCRIPT
    assert "taken          learning_rate = 5e-06 → optim.lr" in {line.rstrip() for line in text.splitlines()}
    assert "target_modules" in text
    assert "changed" in text
    console.file.close()


@pytest.mark.parametrize(
    ("name", "values", "key", "tokens"),
    [
        ("axolotl.yaml", {"sequence_len": 512, "tokens": ["<|call|>", "<|back|>"]}, "tokens", ("<|call|>", "<|back|>")),
        (
            "factory.yaml",
            {"cutoff_len": 512, "add_special_tokens": "<a>, <b>,<a>"},
            "add_special_tokens",
            ("<a>", "<b>"),
        ),
        ("factory.yaml", {"cutoff_len": 512, "new_special_tokens": ""}, "new_special_tokens", ()),
    ],
)
def test_new_tokens_are_taken(
    name: str, values: dict[str, Any], key: str, tokens: tuple[str, ...], tmp_path: Path
) -> None:
    done, run = imported(tmp_path, name, {"learning_rate": 1e-4, "num_epochs": 1, **values})
    assert finding(done, key).verdict == "taken"
    assert run.model.new_tokens == tokens


def test_new_tokens_that_are_no_list_are_refused(tmp_path: Path) -> None:
    values = {"sequence_len": 512, "num_epochs": 1, "tokens": {"a": 1}, "special_tokens": {"pad_token": "<pad>"}}
    done, run = imported(tmp_path, "axolotl.yaml", values)
    assert [finding(done, key).verdict for key in ("tokens", "special_tokens")] == ["not supported"] * 2
    assert "model.new_tokens" in finding(done, "special_tokens").reason
    assert run.model.new_tokens == ()


UNSLOTH = """
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Phi-3-mini-4k-instruct-bnb-4bit", max_seq_length=1024)
model = FastLanguageModel.get_peft_model(
    model, r=64, lora_alpha=128, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    use_gradient_checkpointing="unsloth", random_state=3407, use_rslora=True, loftq_config=None,
)
trainer = SFTTrainer(model=model, args=SFTConfig(learning_rate=2e-4, per_device_train_batch_size=2, seed=1))
"""


def test_an_unsloth_script(tmp_path: Path) -> None:
    done, run = imported(tmp_path, "s.py", UNSLOTH)
    assert (run.lora.r, run.lora.alpha, run.lora.dropout, run.lora.rslora) == (64, 128.0, 0.0, True)
    assert run.lora.targets == ("qkv_proj", "o_proj")
    assert (run.model.source, run.model.quantization) == ("microsoft/Phi-3-mini-4k-instruct", "nf4")
    assert (run.model.activation_checkpointing, run.data.pack_length) == (True, 1024)
    assert finding(done, "model_name_or_path").verdict == "changed"
    assert finding(done, "load_in_4bit").place == "Unsloth's default"
    assert "not offered" not in done.run_yaml
    assert not [item for item in done.findings if item.key == "(no adapter)"]


def test_what_an_unsloth_script_leaves_out_is_unsloths_default(tmp_path: Path) -> None:
    text = "m = FastLanguageModel.get_peft_model(model, random_state=1)\na = SFTConfig(learning_rate=1e-4)\n"
    _, run = imported(tmp_path, "s.py", text)
    assert (run.lora.r, run.lora.alpha, run.lora.dropout, run.lora.targets) == (16, 16.0, 0.0, "all-linear")
    text = "c = LoraConfig(r=4)\nm = get_peft_model(model, c)\na = TrainingArguments(learning_rate=1e-4)\n"
    _, run = imported(tmp_path, "s.py", text)
    assert (run.lora.r, run.lora.alpha) == (4, 8.0), "PEFT's own function of that name has PEFT's defaults"


@pytest.mark.parametrize(
    ("key", "value", "verdict", "supervise"),
    [
        ("assistant_only_loss", True, "taken", "all"),
        ("assistant_only_loss", False, "changed", "all"),
        ("completion_only_loss", False, "changed", "all"),
        ("mask_history", True, "taken", "last"),
        ("train_on_prompt", True, "changed", "all"),
    ],
)
def test_what_is_learned(tmp_path: Path, key: str, value: bool, verdict: str, supervise: str) -> None:
    done, run = imported(tmp_path, "a.json", {"learning_rate": 1e-4, "num_train_epochs": 1, key: value})
    assert (finding(done, key).verdict, run.data.supervise) == (verdict, supervise)
    assert finding(done, key).target == ("data.supervise" if verdict == "taken" else "")


@pytest.mark.parametrize(
    ("values", "trackers", "project"),
    [
        ({"wandb_project": "mine"}, ("wandb",), "mine"),
        ({"mlflow_experiment_name": "mine"}, ("mlflow",), "mine"),
        ({"use_comet": True, "use_tensorboard": True}, ("comet_ml", "tensorboard"), "phi3_dist"),
        ({"wandb_project": "", "use_wandb": False}, ("tensorboard",), "phi3_dist"),
    ],
)
def test_a_trackers_project_sets_the_tracker(
    tmp_path: Path, values: dict[str, Any], trackers: tuple[str, ...], project: str
) -> None:
    _, run = imported(tmp_path, "a.yml", {"base_model": "x", "sequence_len": 512, **values})
    assert (run.log.trackers, run.log.project) == (trackers, project)


AXOLOTL_SETS = [
    {
        **{"path": "me/chats", "name": "big", "type": "chat_template", "split": "train_sft", "revision": "v1"},
        **{"field_messages": "turns", "message_property_mappings": {"role": "from", "content": "text"}},
        **{"message_field_training": "train", "roles_to_train": ["assistant"], "train_on_eos": "last", "shards": 4},
        "roles": {"user": ["human"]},
    },
    {"path": "b.jsonl", "type": {"field_instruction": "question", "field_output": "answer", "format": "{instruction}"}},
]


def test_each_key_inside_axolotls_data_sets_is_accounted_for(tmp_path: Path) -> None:
    recipe = {"base_model": "x", "sequence_len": 512, "datasets": AXOLOTL_SETS, "learning_rate": 1e-4, "num_epochs": 1}
    done, run = imported(tmp_path, "a.yml", recipe)
    told = {item.key: (item.verdict, item.target) for item in done.findings}
    for number, item in enumerate(AXOLOTL_SETS):
        for key, value in item.items():
            for inner in [f"{key}.{name}" for name in value] if isinstance(value, dict) and key != "roles" else [key]:
                assert f"datasets[{number}].{inner}" in told
    assert told["datasets[0].split"] == ("taken", "data.split")
    assert told["datasets[0].name"][0] == told["datasets[0].shards"][0] == "not supported"
    assert told["datasets[0].message_field_training"][0] == told["datasets[0].roles"][0] == "not supported"
    assert told["datasets[0].message_property_mappings.role"][0] == "taken"
    assert told["datasets[0].message_property_mappings.content"][0] == "not supported"
    assert told["datasets[0].train_on_eos"][0] == "changed"
    assert told["datasets[1].type.format"][0] == "not supported"
    assert (run.data.split, run.data.revision, run.data.supervise) == ("train_sft", "v1", "all")
    assert (run.data.columns.messages, run.data.columns.instruction) == ("turns", "question")
    assert run.data.columns.output == "answer"
    assert "datasets[0].name = big" in done.run_yaml
    keys = [item.key for item in done.findings]
    assert keys.index("datasets") < keys.index("datasets[0].path") < keys.index("learning_rate")


def test_trls_mixture_is_accounted_for(tmp_path: Path) -> None:
    sets = [{"id": "me/a", "config": "x", "split": "train_sft", "weight": 0.5, "columns": ["messages"]}]
    mixture = {"datasets": sets, "test_split_size": 0.1, "streaming": False}
    recipe = {"model_name_or_path": "m", "use_peft": True, "dataset_mixture": mixture, "learning_rate": 1e-4}
    done, run = imported(tmp_path, "h.yaml", recipe)
    verdicts = {item.key.removeprefix("dataset_mixture"): item.verdict for item in done.findings}
    assert verdicts["[0].config"] == verdicts["[0].columns"] == "not supported"
    assert verdicts["[0].weight"] == "taken"
    assert (run.data.split, run.data.validation_share) == ("train_sft", 0.1)


_INSIDE = st.dictionaries(
    st.sampled_from(["path", "name", "type", "split", "field_messages", "message_property_mappings", "roles", "odd"]),
    _VALUES,
    max_size=4,
)


@given(sets=st.lists(_INSIDE, max_size=3), name=st.sampled_from(["datasets", "test_datasets", "dataset_mixture"]))
@example(sets=[{"type": {}}], name="datasets")
def test_any_data_sets_give_a_run_file_that_loads_and_findings_of_each_key(
    tmp_path_factory: pytest.TempPathFactory, sets: list[dict[str, Any]], name: str
) -> None:
    recipe = {"base_model": "x", "sequence_len": 512, name: sets}
    done, _ = imported(tmp_path_factory.mktemp("sets"), "a.json", recipe)
    told = {re.sub(r"(\]\.\w+).*", r"\1", item.key, flags=re.DOTALL) for item in done.findings}
    assert told >= {f"{name}[{number}].{key}" for number, item in enumerate(sets) for key in item}
