"""What each foreign key means in a run file: one rule a key, under the name that Hugging Face gives it.

Names and defaults are those of transformers' `TrainingArguments`, TRL's `SFTConfig`, PEFT's `LoraConfig`, DeepSpeed's
JSON, LLaMA-Factory and axolotl; `ALIASES` brings them to one name. Rules that need several keys are in rules_joint.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from phi3_dist.family.variants import FUSED_TARGETS, LINEARS
from phi3_dist.recipes.draft import Draft, Rule, as_flag, as_number, flag, number, text
from phi3_dist.recipes.entries import Entry
from phi3_dist.recipes.rules_extras import TRAINER_ALIASES, TRAINER_RULES, TRAINER_UNSUPPORTED
from phi3_dist.recipes.rules_lora import LORA_ALIASES, LORA_RULES, LORA_UNSUPPORTED

__all__ = ["ALIASES", "RULES", "UNSUPPORTED", "fused_targets", "unsupported_by_prefix"]

ALIASES: Mapping[str, str] = {
    **dict.fromkeys(("base_model", "base_model_name_or_path", "model_id", "model_name"), "model_name_or_path"),
    "model_revision": "revision",
    "base_model_revision": "revision",
    **dict.fromkeys(("tokenizer_name", "tokenizer_name_or_path", "tokenizer_config"), "tokenizer"),
    **dict.fromkeys(("dtype", "bnb_4bit_compute_dtype"), "torch_dtype"),
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "quantization_bit": "load_in_bits",
    "bnb_4bit_use_double_quant": "double_quantization",
    "_attn_implementation": "attn_implementation",
    "flash_attn": "attn_implementation",
    **dict.fromkeys(("max_length", "cutoff_len", "sequence_len", "model_max_length"), "max_seq_length"),
    **dict.fromkeys(("sample_packing", "neat_packing"), "packing"),
    **dict.fromkeys(("val_size", "val_set_size", "test_split_size"), "test_size"),
    "lora_r": "r",
    "lora_rank": "r",
    **dict.fromkeys(("lora_target", "lora_target_modules"), "target_modules"),
    **dict.fromkeys(("lora_modules_to_save", "additional_target"), "modules_to_save"),
    **LORA_ALIASES,
    **TRAINER_ALIASES,
    "peft_use_rslora": "use_rslora",
    "peft_use_dora": "use_dora",
    "optimizer.params.lr": "learning_rate",
    "scheduler.params.warmup_max_lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "scheduler.type": "lr_scheduler_type",
    "scheduler.params.warmup_num_steps": "warmup_steps",
    **dict.fromkeys(("optimizer", "optimizer.type"), "optim"),
    "optimizer.params.weight_decay": "weight_decay",
    "optimizer.params.betas": "betas",
    "optimizer.params.eps": "adam_epsilon",
    "gradient_clipping": "max_grad_norm",
    "num_epochs": "num_train_epochs",
    **dict.fromkeys(("micro_batch_size", "train_micro_batch_size_per_gpu"), "per_device_train_batch_size"),
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "steps_per_print": "logging_steps",
    "wandb_run_name": "run_name",
}


def fused_targets(names: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """Phi-3's modules for a list of target names, in the model's order, and the names that it has no module for."""
    known = (*LINEARS, "lm_head", "embed_tokens")
    ends = [name.rsplit(".", 1)[-1] for name in names]
    found = {FUSED_TARGETS.get(end, end) for end in ends}
    strange = [name for name, end in zip(names, ends, strict=True) if FUSED_TARGETS.get(end, end) not in known]
    return tuple(name for name in known if name in found), strange


def _targets(draft: Draft, entry: Entry) -> None:
    value = entry.value
    if isinstance(value, str) and value.lower() in ("all-linear", "all"):
        draft.take(entry, "lora.targets", "all-linear")
        return
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(
        isinstance(name, str) and re.fullmatch(r"[\w.]+", name) for name in names
    ):
        reason = "a pattern cannot be carried over: all linear modules are adapted; list them to narrow it"
        draft.change(entry, "lora.targets", "all-linear", reason)
        return
    fused, strange = fused_targets(names)
    reasons = []
    llama = [name for name in names if name.rsplit(".", 1)[-1] in FUSED_TARGETS]
    if llama:
        into = sorted({FUSED_TARGETS[name.rsplit(".", 1)[-1]] for name in llama})
        reasons.append(f"{', '.join(llama)} match no module of Phi-3, which fuses them into {' and '.join(into)}")
        whole = [f for f in into if not {name for name, to in FUSED_TARGETS.items() if to == f} <= set(llama)]
        reasons += [f"{name} adapts all the parts it fuses" for name in whole]
    if strange:
        reasons.append(f"{', '.join(strange)} are not modules of Phi-3")
    if not fused:
        draft.change(entry, "lora.targets", "all-linear", "; ".join([*reasons, "all linear modules are adapted"]))
    elif reasons:
        targets: Any = "all-linear" if fused == LINEARS else list(fused)
        draft.change(entry, "lora.targets", targets, "; ".join(reasons))
    else:
        draft.take(entry, "lora.targets", list(fused))


def _bias(draft: Draft, entry: Entry) -> None:
    if entry.value in ("none", "all", "lora_only"):
        draft.take(entry, "lora.bias", entry.value)
    else:
        draft.refuse(entry, "lora.bias is none, all or lora_only")


def _modules_to_save(draft: Draft, entry: Entry) -> None:
    value = entry.value
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        draft.take(entry, "lora.modules_to_save", names)
    else:
        draft.refuse(entry, "lora.modules_to_save takes a list of names")


_SCHEDULES: Mapping[str, str] = {
    **{"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"},
    **{"warmupdecaylr": "linear", "warmuplr": "constant", "warmupcosinelr": "cosine"},
}


def _schedule(draft: Draft, entry: Entry) -> None:
    name = str(entry.value).lower()
    if name in _SCHEDULES:
        draft.take(entry, "optim.schedule", _SCHEDULES[name])
    else:
        near = "cosine" if "cosine" in name else "linear"
        draft.change(entry, "optim.schedule", near, f"{entry.value} does not exist here; {near} is nearest")


_OPTIMIZERS: Mapping[str, str] = {
    **dict.fromkeys(("adamw", "adam", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"), "adamw"),
    **{"adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit"},
    **{"paged_adamw_32bit": "paged_adamw_32bit", "paged_adamw": "paged_adamw_32bit"},
    "paged_adamw_8bit": "paged_adamw_8bit",
}


def _optimizer(draft: Draft, entry: Entry) -> None:
    name = str(entry.value).lower()
    if name in _OPTIMIZERS:
        draft.take(entry, "optim.name", _OPTIMIZERS[name])
    else:
        draft.change(
            entry, "optim.name", "adamw", f"{entry.value} does not exist here; its learning rate may not suit AdamW"
        )


def _beta(draft: Draft, entry: Entry) -> None:
    given = [as_number(draft.foreign.first(f"adam_beta{n}") or default) for n, default in ((1, 0.9), (2, 0.999))]
    value = entry.value if entry.key.endswith("betas") else given
    if isinstance(value, list) and len(value) == 2 and all(as_number(item) is not None for item in value):
        draft.take(entry, "optim.betas", [as_number(item) for item in value])
    else:
        draft.refuse(entry, "optim.betas takes two numbers")


_DTYPES: Mapping[str, str] = {"bfloat16": "bf16", "bf16": "bf16", "float32": "fp32", "float": "fp32", "auto": "auto"}
FP16 = "fp16 needs loss scaling, which is refused here; auto is bf16, or fp32 on hardware without fast bf16"


def _dtype(draft: Draft, entry: Entry) -> None:
    name = str(entry.value).removeprefix("torch.")
    if "model.precision" in draft.values:
        same = _DTYPES.get(name) == draft.values["model.precision"]
        first = draft.set_by["model.precision"].key
        draft.note(entry, "taken" if same else "changed", "" if same else f"{first} has settled the compute dtype")
    elif name in ("float16", "fp16", "half"):
        draft.change(entry, "model.precision", "auto", FP16)
    elif name in _DTYPES:
        draft.take(entry, "model.precision", _DTYPES[name])
    else:
        draft.refuse(entry, "model.precision is auto, bf16 or fp32")


def _mixed(draft: Draft, entry: Entry) -> None:
    name = "bf16" if "bf16" in entry.key else "fp16"
    if str(entry.value).lower() == "auto":
        draft.take(entry, "model.precision", "auto")
    elif not as_flag(entry.value):
        draft.note(entry, "taken", "changes nothing")
    elif name == "bf16":
        draft.take(entry, "model.precision", "bf16")
    else:
        draft.change(entry, "model.precision", "auto", FP16)


def _four_bit(draft: Draft, entry: Entry) -> None:
    bits = as_number(entry.value) if entry.key == "quantization_bit" else (4 if "4bit" in entry.key else 8)
    wanted = entry.key == "quantization_bit" or as_flag(entry.value)
    if not wanted:
        draft.note(entry, "taken", "changes nothing")
    elif bits in (4, 8):
        draft.take(entry, "model.quantization", "nf4" if bits == 4 else "int8")
    else:
        draft.refuse(entry, "quantization is nf4 (4 bits) or int8 (8 bits)")


def _quant_type(draft: Draft, entry: Entry) -> None:
    if entry.value == "nf4":
        draft.note(entry, "taken", "the only 4-bit type here")
    else:
        draft.note(entry, "changed", f"{entry.value} is not offered; 4-bit weights are NF4")


def _double_quant(draft: Draft, entry: Entry) -> None:
    on = as_flag(entry.value)
    draft.note(entry, "taken" if on else "changed", "nf4 is always double quantised here")


def _attention(draft: Draft, entry: Entry) -> None:
    name = str(entry.value).lower()
    names = {**{f"fa{n}": f"flash_attention_{n}" for n in (2, 3, 4)}, "flex_attention": "flex"}
    name = names.get(name, name)
    if name in (*names.values(), "sdpa", "auto"):
        draft.take(entry, "model.attention", name)
    else:
        draft.change(entry, "model.attention", "auto", f"{entry.value} is not offered; auto chooses and says why")


def _if_on(path: str, value: str) -> Rule:
    """A rule for a switch: on, `path` gets `value`; off, it changes nothing."""

    def rule(draft: Draft, entry: Entry) -> None:
        if as_flag(entry.value):
            draft.take(entry, path, value)
        else:
            draft.note(entry, "taken", "changes nothing")

    return rule


def _checkpointing_kwargs(draft: Draft, entry: Entry) -> None:
    reentrant = isinstance(entry.value, dict) and entry.value.get("use_reentrant", True)
    reason = "checkpointing is non-reentrant: the other kind loses LoRA's gradients"
    draft.note(entry, "changed" if reentrant else "taken", reason)


def _packing(draft: Draft, entry: Entry) -> None:
    if as_flag(entry.value):
        draft.note(entry, "changed", "rows are always packed, and documents of a pack never attend to each other")
    else:
        draft.note(entry, "changed", "rows are always packed: a step of n packs may hold more rows than n")


def _pack_length(draft: Draft, entry: Entry) -> None:
    number("data.pack_length", whole=True, low=16)(draft, entry)
    if draft.values.get("data.pack_length") == as_number(entry.value) and "data.on_long_row" not in draft.values:
        draft.values["data.on_long_row"] = "cut_turn"
        draft.comments["data.on_long_row"] = [
            "longer rows are cut after an answer that fits, and counted; the source cuts anywhere, in silence"
        ]


def _held_out(draft: Draft, entry: Entry) -> None:
    share = as_number(entry.value)
    if share is None or share >= 1 or share < 0:
        draft.refuse(entry, "held-out rows are a share below 1 here: set data.validation_share")
    else:
        draft.take(entry, "data.validation_share", share, "drawn by a hash of the prompt, not by a seed")


_TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab")


def _trackers(draft: Draft, entry: Entry) -> None:
    names = [entry.value] if isinstance(entry.value, str) else entry.value
    if names in ([], ["none"]):
        draft.take(entry, "log.trackers", [])
    elif isinstance(names, list) and all(name in _TRACKERS for name in names):
        draft.take(entry, "log.trackers", names)
    else:
        draft.change(entry, "log.trackers", ["tensorboard"], f"trackers here are {', '.join(_TRACKERS)}")


def _adapter_kind(draft: Draft, entry: Entry) -> None:
    name = str(entry.value).lower()
    if name in ("lora", "qlora", "true", "causal_lm", "sft"):
        draft.note(entry, "taken", "what this toolkit does")
    elif name in ("full", "freeze", "false"):
        draft.note(entry, "changed", FULL)
    else:
        draft.refuse(entry, "only supervised fine-tuning of chats with LoRA is offered")


FULL = "training every parameter is not offered: an adapter is trained instead, by the values under lora"


def _template(draft: Draft, entry: Entry) -> None:
    own = re.search(r"phi|tokenizer_default", str(entry.value).lower())
    draft.note(entry, "taken" if own else "changed", "the template of the tokenizer folder is used")


def _fixed(draft: Draft, entry: Entry) -> None:
    draft.note(entry, "taken", "what this toolkit does")


def _inputs(draft: Draft, entry: Entry) -> None:
    if as_flag(entry.value):
        draft.note(entry, "changed", "prompts are never learned, only what the assistant says")
    else:
        draft.note(entry, "taken", "only what the assistant says is learned")


RULES: Mapping[str, Rule] = {
    "revision": text("model.revision"),
    "tokenizer": text("model.tokenizer"),
    "torch_dtype": _dtype,
    **dict.fromkeys(("bf16", "fp16"), _mixed),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "load_in_bits"), _four_bit),
    "bnb_4bit_quant_type": _quant_type,
    "double_quantization": _double_quant,
    "attn_implementation": _attention,
    **dict.fromkeys(("flash_attention", "use_flash_attention_2"), _if_on("model.attention", "flash_attention_2")),
    "gradient_checkpointing_kwargs": _checkpointing_kwargs,
    "max_seq_length": _pack_length,
    "packing": _packing,
    "test_size": _held_out,
    "max_samples": number("data.max_rows", whole=True, low=1),
    "train_on_inputs": _inputs,
    "r": number("lora.r", whole=True, low=1),
    "lora_alpha": number("lora.alpha"),
    "lora_dropout": number("lora.dropout", low=0),
    "bias": _bias,
    "target_modules": _targets,
    "lora_target_linear": _if_on("lora.targets", "all-linear"),
    "modules_to_save": _modules_to_save,
    "use_rslora": flag("lora.rslora"),
    "use_dora": flag("lora.dora"),
    **LORA_RULES,
    **dict.fromkeys(("task_type", "peft_type", "finetuning_type", "use_peft", "adapter", "stage"), _adapter_kind),
    **dict.fromkeys(("do_train", "inference_mode"), _fixed),
    **dict.fromkeys(("template", "chat_template"), _template),
    "learning_rate": number("optim.lr"),
    "lr_scheduler_type": _schedule,
    "optim": _optimizer,
    "weight_decay": number("optim.weight_decay", low=0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "betas"), _beta),
    "adam_epsilon": number("optim.eps"),
    "max_grad_norm": number("optim.max_grad_norm", low=0),
    "num_train_epochs": number("train.epochs"),
    "seed": number("train.seed", whole=True, low=0),
    "output_dir": text("save.folder"),
    "save_total_limit": number("save.keep", whole=True, low=1),
    "logging_steps": number("log.every", whole=True, low=1),
    "report_to": _trackers,
    "run_name": text("name"),
    **TRAINER_RULES,
}
"""By canonical name. Batch sizes, warm-up, steps, evaluation, saving and data are settled from several keys at once."""

_TOPOLOGY = "topology belongs in the Accelerate config of the launch"
_NO_PADDING = "nothing is padded here"
_HUB = "nothing is uploaded while training"
_LOADING = "loading is settled by the strategy"
_PROCESSES = "`phi3-dist prepare --workers` says how many"
_COLUMNS = "rows are rendered by the tokenizer's template, and columns named in data.columns"
UNSUPPORTED: Mapping[str, str] = {
    "trust_remote_code": "remote code is never run; the native Phi-3 class is used",
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "local_rank", "tensor_parallel", "use_cpu", "no_cuda"), _TOPOLOGY
    ),
    **dict.fromkeys(("padding_side", "pad_token", "pad_to_multiple_of", "pad_to_sequence_len"), _NO_PADDING),
    **dict.fromkeys(("group_by_length", "length_column_name", "padding"), _NO_PADDING),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_batch_size"), "held-out packs go through in micro batches"),
    **dict.fromkeys(("use_cache", "device_map", "low_cpu_mem_usage", "quantization_config"), _LOADING),
    **dict.fromkeys(("remove_unused_columns", "dataset_kwargs", "dataset_text_field", "add_eos_token"), _COLUMNS),
    "overwrite_cache": "prepared rows are found by a fingerprint of all that they come from, and are never stale",
    **dict.fromkeys(("preprocessing_num_workers", "dataset_num_proc", "dataset_processes"), _PROCESSES),
    "plot_loss": "`phi3-dist report` draws the curves",
    "overwrite_output_dir": "say --overwrite on the command line",
    "resume_from_checkpoint": "say --resume on the command line; a requeued job needs nothing",
    "load_best_model_at_end": "set save.final: best, which makes the state with the lowest held-out loss the adapter",
    "early_stopping_patience": "set train.patience, in evaluations, and train.min_improvement",
    "logging_dir": "logs are in the run folder",
    "save_safetensors": "adapters are always safetensors",
    "evals_per_epoch": "held-out loss is measured every n steps: set train.eval_every",
    "saves_per_epoch": "checkpoints are written every n steps: set save.every",
    "lr_scheduler_kwargs": "schedules have no further settings",
    "neftune_noise_alpha": "noise on embeddings is not offered",
    "data_seed": "train.seed also orders the packs",
    **LORA_UNSUPPORTED,
    **TRAINER_UNSUPPORTED,
    "tf32": "float32 matrix products are left as torch has them",
}


def unsupported_by_prefix(key: str) -> str:
    """The reason for a family of keys that share a beginning, or nothing."""
    families = (
        *(("hub_", _HUB), ("push_to_hub", _HUB), ("ddp_", _TOPOLOGY), ("fsdp", _TOPOLOGY), ("deepspeed", _TOPOLOGY)),
        *(("zero_", _TOPOLOGY), ("dataloader_", "the batch of a step is planned globally"), ("wandb_", "")),
    )
    return next((reason for beginning, reason in families if key.startswith(beginning)), "")
