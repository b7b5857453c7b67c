"""The README.md of what an export leaves: an adapter's own card with a note, or a merged model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from phi3_dist.exports.drift import Drift
from phi3_dist.exports.open_adapter import Opened

__all__ = ["export_card", "gguf_card", "merged_card"]

_NOTES = {
    "split": "with separate q_proj, k_proj, v_proj, gate_proj and up_proj, for servers that want Llama's names: "
    "each has its rows of the fused B, and the same A. The base in the Phi-3 form has no such modules.",
    "one-rank": "at one rank and one alpha for all modules, without patterns and rsLoRA: the scale of each is part of "
    "its B. The update is the same.",
    "gguf": "as llama.cpp reads it, with an Ollama Modelfile whose FROM line you fill in: "
    "`llama-server -m base.gguf --lora adapter.gguf`. The scale of each module is folded into its B.",
    "combine": "made of several by PEFT's add_weighted_adapter:",
}


def export_card(opened: Opened, kind: str, more: str = "") -> str:
    """The adapter's own card, where it has one, below what this form of it is."""
    path = opened.folder / "README.md"
    card = path.read_text("utf-8", errors="replace") if path.is_file() else "# LoRA adapter\n"
    note = f"\n> This is the adapter {_NOTES[kind]}{' ' + more + '.' if more else ''}\n"
    head, title, rest = card.partition("\n# ")
    if not title:
        return card + note
    line, _, body = rest.partition("\n")
    return f"{head}\n# {line}\n{note}{body}"


def merged_card(opened: Opened, what: str, drift: Drift) -> str:
    """The card of a merged model. A local base is named by its folder alone."""
    return (
        _merged_head(opened, what, drift, "transformers")
        + """
```python
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
tokenizer = PreTrainedTokenizerFast.from_pretrained("path/to/this/folder")
```
"""
    )


def gguf_card(opened: Opened, what: str, drift: Drift) -> str:
    """The card of a merged model in llama.cpp's form."""
    factors = opened.metadata.get("longrope")
    original = opened.base.config.rope_parameters.get("original_max_position_embeddings", 4096)
    context = {None: "", "short": f" -c {original} -np 1", "long": f" -c {2 * original} -np 1"}[factors]
    return (
        _merged_head(opened, what, drift, "gguf")
        + f"""
```bash
llama-server -m model.gguf{context}
ollama create my-model -f Modelfile
```
"""
    )


def _merged_head(opened: Opened, what: str, drift: Drift, library: str) -> str:
    local = opened.base.folder is not None and Path(opened.base.source).is_dir()
    base = Path(opened.base.source).resolve().name if local else opened.base.source
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    if not local and "/" in base:
        front["base_model"], front["base_model_relation"] = base, "finetune"
    front["tags"] = ["phi3", "lora", "merged"]
    name = opened.run_config.name if opened.run_config and opened.run_config.name else opened.folder.name
    factors = opened.metadata.get("longrope")
    rope = ""
    if factors is not None:
        original = opened.base.config.rope_parameters.get("original_max_position_embeddings", 4096)
        how = f"up to {original} tokens" if factors == "short" else f"over {original} tokens"
        rope = f"\nIt was trained with LongRoPE's {factors} factors: serve it with a context of {how}.\n"
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {name}, merged

`{base}` with a LoRA adapter merged into it by phi3_dist: {what}.

Compared with the adapter on its base: {drift}.
{rope}"""
