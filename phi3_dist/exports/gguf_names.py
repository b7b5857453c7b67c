"""llama.cpp's names for Phi-3's weights: qkv and gate/up stay fused, as in the checkpoints (src/llama-arch.cpp)."""

from __future__ import annotations

import re
from typing import Any

from phi3_dist.errors import MachineError, Problem

__all__ = ["ARCHITECTURE", "gguf_library", "gguf_name", "module_of"]

ARCHITECTURE = "phi3"
_INSIDE = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTSIDE = {"lm_head": "output", "model.embed_tokens": "token_embd", "model.norm": "output_norm"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


def gguf_library() -> Any:
    """Raises MachineError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        what = "writes GGUF files, and is not installed"
        raise MachineError(Problem("gguf", what, "pip install gguf")) from error
    return gguf


def gguf_name(module: str) -> str | None:
    """llama.cpp's name of a module's weight; None for a module that its Phi-3 has not."""
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.weight"
    match = _LAYER.fullmatch(module)
    inside = _INSIDE.get(match[2]) if match else None
    return f"blk.{match[1]}.{inside}.weight" if match and inside else None


def module_of(name: str) -> str:
    """The module whose weight has that name. Raises StopIteration for a name that `gguf_name` never gives."""
    plain = name.removesuffix(".weight")
    match = _BLOCK.fullmatch(plain)
    if match:
        return f"model.layers.{match[1]}.{next(ours for ours, theirs in _INSIDE.items() if theirs == match[2])}"
    return next(ours for ours, theirs in _OUTSIDE.items() if theirs == plain)
