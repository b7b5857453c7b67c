"""A Phi-3 folder as GGUF in float32. Prompts are ids, but a server wants words for them: made-up ones, and bytes."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np

from phi3_dist.modeling.base import find_base

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf_base(folder: Path, target: Path) -> Path:
    base = find_base(str(folder))
    config, rope = base.config, base.config.rope_parameters
    writer = gguf.GGUFWriter(str(target), "phi3")
    writer.add_context_length(config.max_position_embeddings)
    original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head = config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    words = config.vocab_size - 256
    writer.add_token_list([*(f"w{i}" for i in range(words)), *(f"<0x{i:02X}>" for i in range(256))])
    writer.add_token_types([gguf.TokenType.NORMAL] * words + [gguf.TokenType.BYTE] * 256)
    writer.add_token_scores([-float(i) for i in range(config.vocab_size)])
    if rope["rope_type"] == "longrope":
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0)
        for kind in ("long", "short"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], dtype=np.float32))
    for name in sorted(base.weights.names()):
        module = name.removesuffix(".weight")
        if module in OUTSIDE:
            ours = OUTSIDE[module]
        else:
            _, _, number, inside = module.split(".", 3)
            ours = f"blk.{number}.{NAMES[inside]}"
        writer.add_tensor(f"{ours}.weight", base.weights.whole(name).float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
