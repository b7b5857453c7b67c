"""What the keys around TrainingArguments mean: what is learned (TRL, LLaMA-Factory), loggers (axolotl), Unsloth's own.

Sources: TRL's `SFTConfig`, Unsloth's `FastLanguageModel.get_peft_model`, axolotl's and LLaMA-Factory's lists of keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi3_dist.family.variants import FAMILIES
from phi3_dist.recipes.draft import Draft, Rule, as_flag
from phi3_dist.recipes.entries import Entry

__all__ = ["TRAINER_ALIASES", "TRAINER_RULES", "TRAINER_UNSUPPORTED", "UNSLOTH_DEFAULTS"]

TRAINER_ALIASES: Mapping[str, str] = {
    "use_gradient_checkpointing": "gradient_checkpointing",
    "comet_project_name": "comet_project",
    "mlflow_experiment_name": "mlflow_project",
    "trackio_project_name": "trackio_project",
    "swanlab_project_name": "swanlab_project",
}
UNSLOTH_DEFAULTS: Mapping[str, Any] = {
    "r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
"""`FastLanguageModel.get_peft_model`'s own."""


def _assistant_only(draft: Draft, entry: Entry) -> None:
    on = as_flag(entry.value)
    if on is None:
        draft.refuse(entry, "expected true or false")
    elif on:
        draft.take(entry, "data.supervise", "all", "every turn of the assistant, and nothing else")
    else:
        draft.note(entry, "changed", "prompts are never learned, only what the assistant says")


def _on_prompt(draft: Draft, entry: Entry) -> None:
    if as_flag(entry.value):
        draft.note(entry, "changed", "prompts are never learned, only what the assistant says")
    else:
        draft.note(entry, "taken", "only what the assistant says is learned")


def _last_turn(draft: Draft, entry: Entry) -> None:
    if as_flag(entry.value):
        draft.take(entry, "data.supervise", "last")
    else:
        draft.note(entry, "taken", "every turn of the assistant is learned")


def _project(tracker: str) -> Rule:
    """A rule for the name of a tracker's project, which in its own tool switches that tracker on."""

    def rule(draft: Draft, entry: Entry) -> None:
        if not isinstance(entry.value, str):
            draft.refuse(entry, "log.project takes text")
            return
        draft.take(entry, "log.project", entry.value, f"and {tracker} is the tracker")
        _track(draft, entry, tracker)

    return rule


def _tracker(name: str) -> Rule:
    def rule(draft: Draft, entry: Entry) -> None:
        if as_flag(entry.value):
            _track(draft, entry, name)
            draft.note(entry, "taken", "", "log.trackers")
        else:
            draft.note(entry, "taken", "changes nothing")

    return rule


def _track(draft: Draft, entry: Entry, tracker: str) -> None:
    names = draft.values.get("log.trackers", [])
    draft.values["log.trackers"] = [*names, *([] if tracker in names else [tracker])]
    draft.set_by.setdefault("log.trackers", entry)


def _checkpointing(draft: Draft, entry: Entry) -> None:
    on = as_flag(entry.value)
    path = "model.activation_checkpointing"
    if on is not None:
        draft.take(entry, path, on)
    elif entry.value == "unsloth":
        draft.change(entry, path, True, "torch's own, which keeps activations on the device")
    else:
        draft.refuse(entry, f"{path} takes true or false")


def _model(draft: Draft, entry: Entry) -> None:
    """Unsloth's copies of the family lead back to the model that they were made of."""
    name = entry.value
    if not isinstance(name, str):
        draft.refuse(entry, "model.source takes text")
        return
    owner, _, last = name.rpartition("/")
    plain = last.lower().removesuffix("-bnb-4bit").removesuffix("-unsloth").removesuffix("-bnb-4bit")
    ids = {hub_id.rpartition("/")[2].lower(): hub_id for family in FAMILIES for hub_id in family.hub_ids}
    if owner.lower() == "unsloth" and plain in ids:
        draft.change(entry, "model.source", ids[plain], f"{name} is a copy of another class, or quantised already")
    else:
        draft.take(entry, "model.source", name)


TRAINER_RULES: Mapping[str, Rule] = {
    "model_name_or_path": _model,
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss"), _assistant_only),
    "train_on_prompt": _on_prompt,
    "mask_history": _last_turn,
    "gradient_checkpointing": _checkpointing,
    "wandb_project": _project("wandb"),
    "comet_project": _project("comet_ml"),
    "mlflow_project": _project("mlflow"),
    "trackio_project": _project("trackio"),
    "swanlab_project": _project("swanlab"),
    "use_wandb": _tracker("wandb"),
    "use_comet": _tracker("comet_ml"),
    "use_mlflow": _tracker("mlflow"),
    "use_tensorboard": _tracker("tensorboard"),
    "use_swanlab": _tracker("swanlab"),
}
_ENVIRONMENT = "the tracker reads it from its own environment variables"
TRAINER_UNSUPPORTED: Mapping[str, str] = {
    "random_state": "train.seed also draws the adapter's start",
    **dict.fromkeys(("wandb_entity", "wandb_mode", "wandb_name", "wandb_run_id", "mlflow_tracking_uri"), _ENVIRONMENT),
    **dict.fromkeys(("wandb_watch", "wandb_log_model"), "trackers get numbers, and no models"),
}
