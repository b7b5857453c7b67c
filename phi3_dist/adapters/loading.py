"""A saved adapter on a base in memory, with what it needs of it: rows beyond the base's tables, LongRoPE's factors.

The header of adapter_model.safetensors says how many rows the tables must have, and which factors it was trained with.
PEFT 0.21 does not look there: without the rows it ends with an IndexError, and with a row shorter than the base's
original context transformers takes the short factors, whatever the adapter was trained with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi3_dist.adapters.for_plain_base import MOVED_BASE
from phi3_dist.adapters.reading import read_metadata
from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import AdapterError, Problem
from phi3_dist.modeling.base import Base
from phi3_dist.modeling.lora import quiet_peft
from phi3_dist.modeling.rope import pin_longrope

__all__ = [
    "load_adapter",
    "not_to_go_on_from",
    "rows_fact",
    "rows_needed",
    "too_few_rows",
    "trained_fact",
    "without_frozen_tables",
]

_ROWS, _FACTORS = "base_rows", "longrope"
_TABLE = re.compile(r"base_model\.model\.(.+)\.token_adapter\.base_layer\.weight$")
_OTHER_FORWARD = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Keys of PEFT's LoraConfig under which tensors of the same names and shapes compute something else."""


def rows_fact(base: Base) -> dict[str, str]:
    """What the header of an adapter says of a base that was enlarged; nothing of another."""
    return {_ROWS: str(base.enlarged_rows)} if base.enlarged_rows else {}


def trained_fact(cfg: RunConfig) -> dict[str, str]:
    """What the header says of a base that was quantised while it trained, and of a start that means that base."""
    if cfg.model.quantization == "none":
        return {}
    return {"quantization": cfg.model.quantization, "start": cfg.lora.init}


def taught_ids(config: Mapping[str, Any]) -> list[int]:
    """The ids whose rows PEFT's configuration lists as trained."""
    listed = config.get("trainable_token_indices") or []
    return sorted({i for ids in (listed.values() if isinstance(listed, Mapping) else [listed]) for i in ids})


def rows_needed(folder: Path, config: Mapping[str, Any], have: int) -> int:
    """Rows of embedding that the adapter needs of a base that has `have`; 0: any number will do.

    By its header, or by its taught ids: PEFT saves no header. Raises AdapterError where those leave rows between that
    neither the base nor the adapter has.
    """
    said = read_metadata(folder).get(_ROWS)
    if said is None:
        beyond = [i for i in taught_ids(config) if i >= have]
        if beyond != list(range(have, have + len(beyond))):
            what = f"has a trained token row {beyond[-1]:,}, and the base has {have:,} rows"
            raise AdapterError(Problem(str(folder), what, "load it on the base that it was trained on"))
        return have + len(beyond) if beyond else 0
    if not said.isdecimal():
        what = f"says {_ROWS} {said!r}, which is not a number of rows"
        raise AdapterError(Problem(str(folder), what, "save the adapter again"))
    return int(said)


def too_few_rows(folder: Path, config: Mapping[str, Any], rows: int) -> list[Problem]:
    """The problem of a base with `rows` rows that the adapter in `folder` can't be used on, or none."""
    needed = rows_needed(folder, config, rows)
    if rows >= needed:
        return []
    what = f"has {rows:,} rows of embedding, and the adapter in {folder} has new tokens up to row {needed:,}"
    return [Problem("model.source", what, "name the adapter's folder as model.tokenizer, and its model.new_tokens")]


def not_to_go_on_from(folder: Path, config: Mapping[str, Any]) -> list[Problem]:
    """Why a run would not train on what the adapter in `folder` is, though its tensors may fit; or nothing."""
    where, kind = "model.adapter", str(config.get("peft_type"))
    if kind != "LORA":
        return [Problem(where, f"{folder} holds an adapter of the kind {kind}", "give a LoRA adapter")]
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(MOVED_BASE):
        what = f"{folder} was trained with {start} beside a base that it had changed; it does not fit the plain one"
        fix = "save it with PEFT's path_initial_model_for_weight_conversion first"
        return [Problem(where, what, fix)]
    said = [key for key in _OTHER_FORWARD if config.get(key)]
    what = f"{folder} was trained with {', '.join(said)}, which a run here has not"
    return [Problem(where, what, "merge it into the base and train from that")] if said else []


def without_frozen_tables(values: Mapping[str, Tensor], base: Base, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The adapter without the embedding and head that PEFT 0.21 saves whole once their tables have grown.

    Beside taught rows they are the base's own. Raises AdapterError where they are not.
    """
    kept, problems, taught = dict(values), [], set(taught_ids(config))
    for name, value in values.items():
        found = _TABLE.match(name)
        if found is None:
            continue
        tied = base.config.tie_word_embeddings and found[1] == "lm_head"
        stored = base.weights.whole("model.embed_tokens.weight" if tied else f"{found[1]}.weight")
        rows = [i for i in range(min(len(stored), len(value))) if i not in taught]
        if value.shape[1:] != stored.shape[1:] or not torch.equal(stored[rows].to(value.dtype), value[rows]):
            what = f"{name} is another table than the base's, and a run keeps the base's"
            problems.append(Problem("model.adapter", what, "train on the base that the adapter was trained on"))
        del kept[name]
    if problems:
        raise AdapterError(*problems)
    return kept


def _pin(model: Any, folder: Path) -> None:
    factors = read_metadata(folder).get(_FACTORS)
    if factors is None:
        return
    if factors not in ("short", "long"):
        what = f"says {_FACTORS} {factors!r}, which is neither short nor long"
        raise AdapterError(Problem(str(folder), what, "save the adapter again"))
    if pin_longrope(model, 0, "short" if factors == "short" else "long") is None:
        what = f"was trained with LongRoPE's {factors} factors, and this base has none"
        raise AdapterError(Problem(str(folder), what, "load it on the base that it was trained on"))
    model.model.rotary_emb.to(model.get_input_embeddings().weight.device)


def load_adapter(model: Any, folder: Path) -> Any:
    """The PEFT model of `model`, a Phi3ForCausalLM, and the adapter in `folder`.

    Enlarges its tables where need be, and pins LongRoPE to the factors that the adapter was trained with.
    Raises AdapterError where the folder's weights can't be read, or the base has no such factors.
    """
    from peft import PeftConfig, PeftModel

    _pin(model, folder)
    have = model.get_input_embeddings().num_embeddings
    config = PeftConfig.from_pretrained(str(folder))
    needed = rows_needed(folder, config.to_dict(), have)
    if needed > have:
        # the adapter holds the rows: what they start with is never read
        model.resize_token_embeddings(needed, mean_resizing=False)
    with quiet_peft():
        return PeftModel.from_pretrained(model, str(folder), config=config)
