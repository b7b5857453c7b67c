"""At which token ids an answer ends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_dist.data.render.template_probe import ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["published_stops", "stop_ids"]


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Every id that ends an answer, sorted: the template's end of turn and final end, the tokenizer's eos and those
    of the model's generation config (Phi-3 lists 32000, 32001 and 32007)."""
    fmt = ChatFormat.of(tokenizer)
    found = {fmt.end_of_turn, fmt.final_end, tokenizer.eos_token_id}
    config = getattr(model, "generation_config", None)  # a PeftModel hands the attribute through
    listed = config.eos_token_id if config is not None else None
    found.update(listed if isinstance(listed, Sequence) else [listed])
    return sorted(token for token in found if token is not None)


def published_stops(folder: Path | None) -> list[int]:
    """The end ids in the generation_config.json of a base's folder; none where it has no such file, or a broken one."""
    if folder is None:
        return []
    try:
        said = json.loads((folder / "generation_config.json").read_text("utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return []
    listed = said if isinstance(said, list) else [said]
    return [token for token in listed if isinstance(token, int) and not isinstance(token, bool)]
