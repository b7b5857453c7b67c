"""Which toolkit a file was written for, and its keys as `Entry`s."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from phi3_dist.config.load import flatten
from phi3_dist.config.yaml_text import YamlFault, read_yaml
from phi3_dist.errors import ConfigError, Problem
from phi3_dist.recipes.entries import Entry, Foreign, read_script

__all__ = [
    "AXOLOTL",
    "DEEPSPEED",
    "DIALECTS",
    "HANDBOOK",
    "LLAMA_FACTORY",
    "NOTEBOOK",
    "PAIR",
    "PEFT",
    "SCRIPT",
    "TRAINING_ARGUMENTS",
    "read_foreign",
]

SCRIPT = "Python script"
NOTEBOOK = "Jupyter notebook"
PAIR = "training_config and peft_config"
TRAINING_ARGUMENTS = "Hugging Face TrainingArguments"
DEEPSPEED = "DeepSpeed config"
PEFT = "PEFT adapter_config.json"
HANDBOOK = "alignment-handbook recipe"
LLAMA_FACTORY = "LLaMA-Factory config"
AXOLOTL = "axolotl config"
DIALECTS = (SCRIPT, NOTEBOOK, PAIR, TRAINING_ARGUMENTS, DEEPSPEED, PEFT, HANDBOOK, LLAMA_FACTORY, AXOLOTL)

_PAIR_SECTIONS: Mapping[str, str] = {
    "training_config": "training",
    "training_arguments": "training",
    "training_args": "training",
    "peft_config": "lora",
    "lora_config": "lora",
    "bnb_config": "quantization",
    "quantization_config": "quantization",
    "model_kwargs": "model",
}
_TRAINING_KEYS = frozenset({
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "num_train_epochs", "max_steps"),
    *("lr_scheduler_type", "warmup_ratio", "warmup_steps", "weight_decay", "optim", "gradient_checkpointing"),
    *("eval_strategy", "evaluation_strategy", "logging_steps", "save_steps", "save_strategy", "output_dir"),
})  # fmt: skip
_HANDBOOK_KEYS = frozenset({
    *("dataset_mixer", "dataset_mixture", "dataset_name", "use_peft", "lora_target_modules", "chat_template"),
})  # fmt: skip


def _has(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda values: any(key in values for key in keys)


# the first that fits is the dialect; the order matters, since several borrow TrainingArguments' keys
_SIGNS: tuple[tuple[str, Callable[[Mapping[str, Any]], bool]], ...] = (
    (PAIR, lambda values: any(isinstance(values.get(key), dict) for key in _PAIR_SECTIONS)),
    (DEEPSPEED, _has("zero_optimization", "train_micro_batch_size_per_gpu", "zero_allow_untested_optimizer")),
    (PEFT, lambda values: "peft_type" in values or {"r", "lora_alpha"} <= set(values)),
    (LLAMA_FACTORY, _has("finetuning_type", "cutoff_len", "lora_target", "lora_rank")),
    (AXOLOTL, _has("base_model", "sequence_len", "micro_batch_size")),
    (HANDBOOK, lambda values: "model_name_or_path" in values and bool(_HANDBOOK_KEYS & set(values))),
    (TRAINING_ARGUMENTS, lambda values: len(_TRAINING_KEYS & set(values)) >= 2),
)


def read_foreign(path: str | Path) -> Foreign:
    """Read and recognise a foreign file. Raises `ConfigError` where it is missing, damaged, or of no known dialect."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise ConfigError(Problem(str(path), what)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(Problem(str(path), f"is not UTF-8 text: {error.reason} at byte {error.start}")) from None
    kind = file.suffix.lower()
    if kind == ".py":
        return _script(file.name, SCRIPT, [(file.name, text)])
    if kind == ".ipynb":
        return _script(file.name, NOTEBOOK, _code_cells(file.name, text))
    if kind not in (".json", ".yaml", ".yml"):
        fix = "give a .py, .ipynb, .json, .yaml or .yml file"
        raise ConfigError(Problem(str(path), f"has the ending {kind or 'of no file type'}", fix))
    values, lines = _mapping(file.name, text, is_json=kind == ".json")
    dialect = _dialect_of(file.name, values)

    def place(key: str) -> str:
        return f"{file.name}:{lines[key]}" if key in lines else file.name

    return Foreign(file.name, dialect, tuple(_entries(dialect, values, place)))


def _script(name: str, dialect: str, cells: list[tuple[str, str]]) -> Foreign:
    entries, trees, unread = read_script(cells)
    if not trees:
        raise ConfigError(*([Problem(part.place, part.why) for part in unread] or [Problem(name, "holds no code")]))
    return Foreign(name, dialect, tuple(entries), tuple(trees), tuple(unread))


def _code_cells(name: str, text: str) -> list[tuple[str, str]]:
    """(place, Python text) of each code cell. Magics and shell lines become comments: lines keep their number."""
    values, _ = _mapping(name, text, is_json=True)
    cells: list[tuple[str, str]] = []
    found = values.get("cells")
    if not isinstance(found, list):
        raise ConfigError(Problem(name, "has no list of cells", "save the notebook in format 4, as Jupyter does now"))
    for number, cell in enumerate(found, 1):
        if not isinstance(cell, dict) or cell.get("cell_type") != "code":
            continue
        source = cell.get("source", "")
        parts = source if isinstance(source, list) else [source]
        lines = "".join(part for part in parts if isinstance(part, str)).splitlines()
        if not any(line.lstrip().startswith("%%") for line in lines):
            code = "\n".join("#" + line if line.lstrip().startswith(("!", "%")) else line for line in lines)
            cells.append((f"{name} cell {number}", code))
    return cells


def _mapping(name: str, text: str, *, is_json: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """The top-level mapping, and the line of each of its keys where the text is YAML."""
    lines: dict[str, int] = {}
    try:
        if is_json:
            values = json.loads(text)
        else:
            document = read_yaml(text, place=str, name=name, merge=True)
            if document.problems:
                raise ConfigError(
                    *(replace(problem, where=f"{name}: {problem.where}") for problem in document.problems)
                )
            values = document.values
            lines = {key: int(line) for key, line in document.places.items() if "." not in key}
    except json.JSONDecodeError as error:
        raise ConfigError(Problem(f"{name}:{error.lineno}", f"is not JSON: {error.msg}")) from None
    except YamlFault as error:
        raise ConfigError(Problem(f"{name}:{error.line}" if error.line else name, error.what)) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists a thousand deep
        raise ConfigError(Problem(name, f"is not JSON that can be read: {error}")) from None
    if not isinstance(values, dict):
        raise ConfigError(Problem(name, "holds no mapping of keys to values", f"known are: {', '.join(DIALECTS)}"))
    return {str(key): value for key, value in values.items()}, lines


def _dialect_of(name: str, values: Mapping[str, Any]) -> str:
    if isinstance(values.get("model"), dict) and isinstance(values.get("data"), dict):
        raise ConfigError(Problem(name, "is a run file of this toolkit already", f"phi3-dist config show {name}"))
    if "distributed_type" in values or "compute_environment" in values:
        fix = "give it to accelerate launch --config_file; a run file holds no topology"
        raise ConfigError(Problem(name, "is an Accelerate config, which says where a run runs and not what it is", fix))
    for dialect, fits in _SIGNS:
        if fits(values):
            return dialect
    shown = ", ".join(list(values)[:6]) or "none"
    raise ConfigError(Problem(name, f"is of no known dialect (its keys: {shown})", f"known are: {', '.join(DIALECTS)}"))


def _entries(dialect: str, values: Mapping[str, Any], place: Callable[[str], str]) -> Iterator[Entry]:
    if dialect == PAIR:
        for section, inner in values.items():
            if isinstance(inner, dict):
                name = _PAIR_SECTIONS.get(section, "")
                yield from (Entry(str(key), value, place(section), name) for key, value in inner.items())
            else:
                yield Entry(section, inner, place(section))
    elif dialect == DEEPSPEED:
        yield from (Entry(key, value, place(key.split(".")[0]), "deepspeed") for key, value in flatten(values).items())
    else:
        section = {PEFT: "lora", TRAINING_ARGUMENTS: "training"}.get(dialect, "")
        yield from (Entry(key, value, place(key), section) for key, value in values.items())
