"""The YAML at the head of a card, as the Hugging Face hub reads it: https://huggingface.co/docs/hub/model-cards.

A base, data sets and metrics are named where the hub can look them up; a license and a language are what somebody has
said, never guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["divided", "evaluation_of", "front_matter", "model_index", "said_of_hub", "with_front"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_NAMES = {
    "heldout_loss": ("loss", "held-out loss (nats a token)"),
    "loss": ("loss", "held-out loss (nats a token)"),
    "perplexity": ("perplexity", "held-out perplexity"),
    "heldout_perplexity": ("perplexity", "held-out perplexity"),
    "exact_match": ("exact_match", "exact match"),
    "rouge_l": ("rouge", "ROUGE-L"),
    "chrf": ("chrf", "chrF"),
}
"""Measures of evaluation.json: the hub's name of the metric, and ours."""
_COUNTS = ("supervised_tokens", "rows", "answers", "tokens")
_NOT_A_SIDE = ("base", "before", "difference", "samples")


def said_of_hub(source: str) -> bool:
    """Whether a name can be one of the hub's, and is not a file or folder here."""
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).exists()


def front_matter(contents: Mapping[str, Any], base: str | None) -> dict[str, Any]:
    """The head of an adapter's card. `base` is a hub id, or None; `contents` are `adapter_card`'s."""
    front: dict[str, Any] = {}
    if base:
        front["base_model"] = base
    for key in ("datasets", "language"):
        values = contents.get(key)
        if values:
            front[key] = [values] if isinstance(values, str) else list(values)
    if contents.get("license"):
        front["license"] = str(contents["license"])
    front |= {"library_name": "peft", "pipeline_tag": "text-generation"}
    front["tags"] = ["lora", "peft", "phi3", "phi3_dist", f"base_model:adapter:{base}" if base else "adapter"]
    measured = {key: contents[key] for key in ("heldout_loss", "heldout_perplexity") if contents.get(key) is not None}
    index = model_index(str(contents.get("name") or "LoRA adapter"), "held-out rows", measured, front.get("datasets"))
    return {**front, **({"model-index": index} if index else {})}


def model_index(
    name: str, rows: str, measures: Mapping[str, Any], datasets: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Measures on `rows` in the hub's form; an empty list without any. Counts and what is not a number are left out."""
    metrics = []
    for key, value in measures.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or key in _COUNTS or not math.isfinite(value):
            continue
        kind, said = _NAMES.get(key, (key, key.replace("_", " ")))
        metrics.append({"type": kind, "value": round(float(value), 6), "name": said})
    if not metrics:
        return []
    dataset = {"type": datasets[0] if datasets else "private", "name": rows}
    task = {"type": "text-generation", "name": "Text Generation"}
    return [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}]


def evaluation_of(evaluation: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What the rows of an evaluation.json are called, and the measures of the first side that is not a base."""
    rows = str(evaluation.get("data") or "held-out rows")
    rows = Path(rows).name if "/" in rows and not said_of_hub(rows) else rows
    for name, side in evaluation.items():
        if isinstance(side, Mapping) and name not in _NOT_A_SIDE and "%" not in name:
            return rows, dict(side)
    return rows, {k: v for k, v in evaluation.items() if isinstance(v, int | float) and k not in _COUNTS}


def divided(card: str) -> tuple[dict[str, Any], str]:
    """A card's head and its text. Raises ValueError for a head that is not a YAML mapping."""
    if not (card.startswith("---\n") and "\n---\n" in card):
        return {}, card
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    try:
        front = yaml.safe_load(head) or {}
    except yaml.YAMLError as error:
        raise ValueError("the front matter of the card is not YAML") from error
    if not isinstance(front, dict):
        raise ValueError("the front matter of the card is not a YAML mapping")
    return front, body


def with_front(card: str, changes: Mapping[str, Any]) -> str:
    """The card with keys of its head replaced; None takes one out. Raises ValueError as `divided`."""
    front, body = divided(card)
    front = {key: value for key, value in {**front, **changes}.items() if value is not None}
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n{body}"
