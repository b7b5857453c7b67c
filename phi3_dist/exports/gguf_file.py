"""`--as gguf`: the adapter as llama.cpp reads it, and an Ollama Modelfile beside.

llama.cpp's Phi-3 keeps qkv and gate/up fused as the checkpoints do, so that LoRA on them is exact: attn_qkv and ffn_up.
It scales each pair by alpha / rank, alpha being one for all; without one, by 1. The scale of each module is therefore
written into its B, which says rsLoRA and alphas by module too (llama.cpp, src/llama-adapter.{h,cpp}).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi3_dist.errors import AdapterError, Problem
from phi3_dist.exports.gguf_names import ARCHITECTURE, gguf_library, gguf_name, module_of
from phi3_dist.exports.modelfile import MODELFILE, modelfile
from phi3_dist.exports.open_adapter import Opened
from phi3_dist.exports.weight_updates import AdapterContents, Update

__all__ = ["ADAPTER", "read_gguf_adapter", "refuse_for_gguf", "write_gguf_adapter"]

ADAPTER = "adapter.gguf"


def refuse_for_gguf(opened: Opened) -> None:
    """Raises AdapterError with all that an adapter of llama.cpp can't say."""
    contents, where = opened.contents, str(opened.folder)
    merge = "phi3-dist export … --as gguf-merged: base and adapter as one GGUF file"
    problems = []
    if contents.dora:
        problems.append(Problem(where, "is of DoRA, whose norms llama.cpp does not compute", merge))
    if contents.whole:
        what = f"has {', '.join(sorted(contents.whole))} trained in full, and llama.cpp's adapters hold A and B alone"
        problems.append(Problem(where, what, merge))
    if contents.taught:
        what = "has new tokens, which the tokenizer in the base's GGUF file does not know"
        problems.append(Problem(where, what, merge))
    if opened.base.config.tie_word_embeddings and "lm_head" in contents.updates:
        what = "adapts a head that shares its weights with the embedding: llama.cpp has no tensor of that name"
        problems.append(Problem(where, what, merge))
    unknown = [m for m in contents.updates if gguf_name(m) is None]
    if unknown:
        problems.append(Problem(where, f"adapts {unknown[0]}, for which llama.cpp's Phi-3 has no name", merge))
    if problems:
        raise AdapterError(*problems)


def write_gguf_adapter(opened: Opened, folder: Path, tokenizer: Any = None) -> None:
    """Write adapter.gguf into `folder`, and with the tokenizer Ollama's Modelfile. Raises AdapterError, OSError."""
    refuse_for_gguf(opened)
    gguf = gguf_library()
    writer = gguf.GGUFWriter(str(folder / ADAPTER), ARCHITECTURE)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    # no alpha: llama.cpp then scales by 1, and the scale of each module stands in its B
    writer.add_string("general.name", opened.folder.name if opened.run is None else opened.run.name)
    for module, update in sorted(opened.contents.updates.items()):
        a, b = update.a.float(), update.b.float() * update.scale
        # rows of an embedding are looked up in A: llama.cpp wants it turned
        pair = (a.T, b) if update.embedding else (a, b)
        for letter, tensor in zip("ab", pair, strict=True):
            writer.add_tensor(f"{gguf_name(module)}.lora_{letter}", tensor.contiguous().numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    if tokenizer is not None:
        made_of = f"# The base: a GGUF file made of {_base_name(opened)}, or an Ollama model of it."
        head = (made_of, "FROM ./base.gguf", f"ADAPTER ./{ADAPTER}")
        (folder / MODELFILE).write_text(modelfile(opened, tokenizer, head), encoding="utf-8")


def read_gguf_adapter(path: Path) -> AdapterContents:
    """What such a file says, as llama.cpp computes with it."""
    reader = gguf_library().GGUFReader(str(path))
    halves: dict[str, dict[str, Tensor]] = {}
    for tensor in reader.tensors:
        name, _, letter = str(tensor.name).rpartition(".lora_")
        halves.setdefault(name, {})[letter] = torch.from_numpy(tensor.data.copy())
    alpha = reader.fields.get("adapter.lora.alpha")
    contents = AdapterContents()
    for name, half in halves.items():
        module = module_of(name)
        embedding = module == "model.embed_tokens"
        rank = half["b"].shape[1]
        scale = float(alpha.parts[-1][0]) / rank if alpha is not None else 1.0
        contents.updates[module] = Update(half["a"].T if embedding else half["a"], half["b"], scale, None, embedding)
    return contents


def _base_name(opened: Opened) -> str:
    return Path(opened.base.source).name if opened.base.folder else opened.base.source
