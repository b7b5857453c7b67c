"""What of an adapter matters to whoever serves it: read from its JSON files and its base's, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Served", "served_of_card", "served_of_folder"]

_ORIGINAL = 4096
"""Context below which Phi-3's LongRoPE has its short factors: original_max_position_embeddings of each variant."""


@dataclass(frozen=True)
class Served:
    """An adapter as the rules see it. Ranks are of modules, contexts and windows in tokens."""

    folder: str
    base: str
    revision: str | None = None
    ranks: tuple[int, ...] = (16,)
    patterns: bool = False
    rslora: bool = False
    dora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    whole: tuple[str, ...] = ()
    taught: int = 0
    base_rows: int | None = None
    """Rows to which the base's tables must be enlarged."""
    longrope: str | None = None
    original_context: int = _ORIGINAL
    window: int | None = None
    trained_on: str = "none"
    lora_init: str = ""
    targets: tuple[str, ...] = ()
    has_tokenizer: bool = True
    """Whether the adapter's folder has one, with its chat template."""


def served_of_folder(
    folder: Path, config: Mapping[str, Any], header: Mapping[str, str], base: Mapping[str, Any]
) -> Served:
    """config: adapter_config.json. header: the metadata of the weights' file. base: the base's config.json."""
    rope = base.get("rope_parameters") or base.get("rope_scaling") or {}
    taught = config.get("trainable_token_indices") or {}
    ids = taught if isinstance(taught, list) else next(iter(taught.values()), [])
    targets = config.get("target_modules") or []
    return Served(
        folder=str(folder),
        base=str(config.get("base_model_name_or_path") or "BASE"),
        revision=config.get("revision"),
        ranks=tuple(sorted({int(config.get("r", 0)), *map(int, (config.get("rank_pattern") or {}).values())})),
        patterns=bool(config.get("rank_pattern") or config.get("alpha_pattern")),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        bias=str(config.get("bias") or "none"),
        lora_bias=bool(config.get("lora_bias")),
        whole=tuple(config.get("modules_to_save") or ()),
        taught=len(ids),
        base_rows=int(header["base_rows"]) if header.get("base_rows", "").isdecimal() else None,
        longrope=header.get("longrope"),
        original_context=int(
            rope.get("original_max_position_embeddings") or base.get("original_max_position_embeddings") or _ORIGINAL
        ),
        window=base.get("sliding_window"),
        trained_on=header.get("quantization", "none"),
        lora_init=header.get("start", ""),
        targets=tuple(targets) if not isinstance(targets, str) else (targets,),
        has_tokenizer=(folder / "tokenizer.json").is_file(),
    )


def served_of_card(contents: Mapping[str, Any], base: str) -> Served:
    """The same from a card's `contents` (adapters/model_card.py): `lora` is the run file's section or PEFT's."""
    lora = contents.get("lora") or {}
    ranks = {int(lora.get("r") or 16), *map(int, (lora.get("rank_pattern") or {}).values())}
    if str(lora.get("init") or "").startswith("pissa"):
        ranks = {2 * rank for rank in ranks}
    return Served(
        folder="path/to/this/folder",
        base=base or "path/to/base",
        revision=contents.get("revision"),
        ranks=tuple(sorted(ranks)),
        patterns=bool(lora.get("rank_pattern") or lora.get("alpha_pattern")),
        rslora=bool(lora.get("rslora") or lora.get("use_rslora")),
        dora=bool(lora.get("dora") or lora.get("use_dora")),
        bias=str(lora.get("bias") or "none"),
        whole=tuple(lora.get("modules_to_save") or ()),
        taught=int(contents.get("taught_tokens") or 0),
        base_rows=contents.get("base_rows"),
        longrope=contents.get("longrope"),
        original_context=int(contents.get("original_context") or _ORIGINAL),
        window=contents.get("window"),
        trained_on=str(contents.get("quantization") or "none"),
        lora_init=str(lora.get("init") or ""),
    )
