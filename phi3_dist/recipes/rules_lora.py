"""What foreign keys of LoRA's relatives mean in a run file: starts, patterns, layers, LoRA+, new tokens.

Names are PEFT's `LoraConfig`, LLaMA-Factory's (`pissa_init`, `add_special_tokens`, …) and axolotl's (`tokens`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from phi3_dist.config.schema import LORA_INITS
from phi3_dist.family.variants import FUSED_TARGETS
from phi3_dist.recipes.draft import Draft, Rule, as_flag, as_number, number
from phi3_dist.recipes.entries import Entry

__all__ = ["LORA_ALIASES", "LORA_RULES", "LORA_UNSUPPORTED"]

LORA_ALIASES: Mapping[str, str] = {
    **dict.fromkeys(("peft_layers_to_transform", "lora_layers_to_transform"), "layers_to_transform"),
    "peft_init_lora_weights": "init_lora_weights",
    **dict.fromkeys(("tokens", "add_tokens", "add_special_tokens"), "new_special_tokens"),
}


def _init(draft: Draft, entry: Entry) -> None:
    value = entry.value
    if value is True:
        draft.note(entry, "taken", "A is drawn as PEFT draws it, B starts at 0")
    elif isinstance(value, str) and re.search(LORA_INITS, value) and value != "default":
        draft.take(entry, "lora.init", value)
    else:
        draft.refuse(entry, "lora.init is default, pissa, pissa_niter_16, loftq or eva")


def _pissa(draft: Draft, entry: Entry) -> None:
    """LLaMA-Factory: 16 iterations where `pissa_iter` does not say otherwise, and -1 for the exact decomposition."""
    if not as_flag(entry.value):
        draft.note(entry, "taken", "changes nothing")
        return
    given = as_number(draft.foreign.first("pissa_iter"))
    niter = 16 if given is None else int(given)
    draft.take(entry, "lora.init", "pissa" if niter == -1 else f"pissa_niter_{niter}")


def _pissa_iter(draft: Draft, entry: Entry) -> None:
    wanted = as_flag(draft.foreign.first("pissa_init"))
    draft.note(entry, "taken", "settled together with pissa_init" if wanted else "changes nothing without pissa_init")


def _layers(draft: Draft, entry: Entry) -> None:
    value: Any = [entry.value] if isinstance(entry.value, int) and not isinstance(entry.value, bool) else entry.value
    if (
        isinstance(value, list)
        and value
        and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)
    ):
        draft.take(entry, "lora.layers", sorted(set(value)))
    else:
        draft.refuse(entry, "lora.layers takes a list of layers, counted from 0")


def _pattern(path: str, *, whole: bool) -> Rule:
    """Names of Llama's projections become the fused one's; of parts that differ the largest value counts."""

    def rule(draft: Draft, entry: Entry) -> None:
        if not isinstance(entry.value, dict):
            draft.refuse(entry, f"{path} takes names with a number each")
            return
        taken: dict[str, Any] = {}
        fused = []
        for key, given in entry.value.items():
            value = as_number(given)
            if value is None or value <= 0 or (whole and value != int(value)) or _broken(str(key)):
                draft.refuse(entry, f"{path} takes a {'whole ' if whole else ''}number above 0 for each name: {key}")
                return
            head, dot, last = str(key).rpartition(".")
            name = head + dot + FUSED_TARGETS.get(last, last)
            if name != key:
                fused.append(f"{key} is part of {name}")
            taken[name] = max(taken.get(name, 0), int(value) if whole or value == int(value) else value)
        if fused:
            draft.change(entry, path, taken, "; ".join(fused))
        else:
            draft.take(entry, path, taken)

    return rule


def _new_tokens(draft: Draft, entry: Entry) -> None:
    """A list, or LLaMA-Factory's string with commas. Of two such keys the first counts, as for every other place."""
    tokens = [part for part in entry.value.split(",") if part.strip()] if isinstance(entry.value, str) else entry.value
    if not isinstance(tokens, list) or not all(isinstance(name, str) and name.strip() for name in tokens):
        draft.refuse(entry, "model.new_tokens takes a list of tokens")
    elif not tokens:
        draft.note(entry, "taken", "changes nothing")
    else:
        names = list(dict.fromkeys(name.strip() for name in tokens))
        draft.take(entry, "model.new_tokens", names, "their rows alone train, and are saved in the adapter")


def _broken(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return True
    return False


LORA_RULES: Mapping[str, Rule] = {
    "init_lora_weights": _init,
    "pissa_init": _pissa,
    "pissa_iter": _pissa_iter,
    "layers_to_transform": _layers,
    "rank_pattern": _pattern("lora.rank_pattern", whole=True),
    "alpha_pattern": _pattern("lora.alpha_pattern", whole=False),
    "loraplus_lr_ratio": number("lora.plus_ratio", low=1),
    "new_special_tokens": _new_tokens,
}
LORA_UNSUPPORTED: Mapping[str, str] = {
    "loraplus_lr_embedding": "an adapted embedding learns with optim.lr, its B with lora.plus_ratio times that",
    "pissa_convert": "adapters of PiSSA are always saved for the plain base",
    "loftq_config": "one step of LoftQ on the NF4 base: set lora.init loftq",
    "eva_config": "EVA keeps each module's rank (rho 1)",
    "special_tokens": "the tokenizer's own are kept; tokens that it lacks go into model.new_tokens",
    "resize_vocab": "the tables get the rows that model.new_tokens needs",
    "trainable_token_indices": "model.new_tokens takes the tokens themselves, not their ids",
    "layers_pattern": "Phi-3 has one list of layers",
}
