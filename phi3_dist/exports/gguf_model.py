"""`--as gguf-merged`: base and adapter as one GGUF file that llama.cpp serves alone, and an Ollama Modelfile.

Its weights are written one after the other, so that two of them are in memory and not the model. It is read back as
llama.cpp reads it, shapes and LongRoPE's factors from its own fields, before it is held against the live model.
Source of the keys: llama.cpp, src/models/phi3.cpp and convert_hf_to_gguf.py's Phi-3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM
from transformers.initialization import no_init_weights

from phi3_dist.errors import AdapterError, Problem
from phi3_dist.exports.gguf_names import ARCHITECTURE, gguf_library, gguf_name, module_of
from phi3_dist.exports.gguf_tokenizer import Vocabulary, strips_after_roles, vocabulary_of, write_vocabulary
from phi3_dist.exports.merged import Into, merger, weight_names
from phi3_dist.exports.modelfile import MODELFILE, modelfile
from phi3_dist.exports.open_adapter import Opened

__all__ = ["MODEL", "STORED", "Stored", "read_gguf_model", "refuse_for_gguf_model", "stored_as", "write_gguf_model"]

MODEL = "model.gguf"
Stored = Literal["f32", "f16", "bf16"]
STORED: tuple[Stored, ...] = ("f32", "f16", "bf16")
_TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_FILE_TYPE = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
_FACTORS = "rope_factors_{}.weight"


def stored_as(opened: Opened, requested: Stored | None) -> Stored:
    """The type of its matrices: the base's, unless another is asked for."""
    weights = opened.base.weights
    own = weights.rows("model.embed_tokens.weight", 0, 0).dtype
    weights.close()
    if requested is not None:
        return requested
    return next((name for name in STORED if _TORCH[name] == own), STORED[0])


def refuse_for_gguf_model(opened: Opened, tokenizer: Any) -> Vocabulary:
    """The vocabulary, where llama.cpp can be this model. Raises AdapterError with what it can't."""
    config, where = opened.base.config, str(opened.folder)
    words = vocabulary_of(tokenizer, opened.rows, where)
    rope = config.rope_parameters
    if rope.get("rope_type") not in ("default", "longrope"):
        what = f"its base has rope_type {rope.get('rope_type')!r}, which llama.cpp's Phi-3 does not have"
        raise AdapterError(Problem(where, what, "phi3-dist export … --as merged, for vLLM or transformers"))
    unknown = [name for name in weight_names(opened) if gguf_name(name.removesuffix(".weight")) is None]
    if unknown:
        what = f"its base has {unknown[0]}, for which llama.cpp's Phi-3 has no name"
        raise AdapterError(Problem(where, what, "phi3-dist export … --as merged, for vLLM or transformers"))
    return words


def write_gguf_model(
    opened: Opened, folder: Path, words: Vocabulary, tokenizer: Any, *, into: Into, stored: Stored
) -> None:
    """Write model.gguf and Modelfile into `folder`. Raises AdapterError, OSError."""
    gguf = gguf_library()
    writer = gguf.GGUFWriter(str(folder / MODEL), ARCHITECTURE)
    try:
        _write_metadata(writer, gguf, opened, stored, tokenizer)
        write_vocabulary(writer, words, tokenizer)
        factors = _factors(opened.base.config)
        names = {name: gguf_name(name.removesuffix(".weight")) for name in weight_names(opened)}
        for kind, values in factors.items():
            writer.add_tensor_info(_FACTORS.format(kind), values.shape, values.dtype, values.nbytes)
        for name, theirs in names.items():
            _announce(writer, gguf, str(theirs), _shape(opened, name), stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in factors.values():
            writer.write_tensor_data(values)
        merge = merger(opened, into, _TORCH[stored])
        for name in names:
            writer.write_tensor_data(_bytes_of(merge(name), stored))
    finally:
        writer.close()
        opened.base.weights.close()
    head = (f"FROM ./{MODEL}",)
    (folder / MODELFILE).write_text(modelfile(opened, tokenizer, head), encoding="utf-8")


def _write_metadata(writer: Any, gguf: Any, opened: Opened, stored: Stored, tokenizer: Any) -> None:
    config = opened.base.config
    rope, heads = config.rope_parameters, config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    tables = _rotary(config)
    own = opened.run.name if opened.run else opened.folder.name
    # llama.cpp knows by this name that white space after role tokens goes
    writer.add_name(f"{own} (Phi-3)" if strips_after_roles(tokenizer) else own.lower().replace("phi-3", "phi 3"))
    writer.add_type("model")
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPE[stored]])
    writer.add_vocab_size(opened.rows)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if head_size != config.hidden_size // heads:
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(2 * len(tables.inv_freq))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_rope_scaling_orig_ctx_len(_original(config))
    writer.add_sliding_window(config.sliding_window or 0)
    if rope.get("rope_type") == "longrope":
        writer.add_rope_scaling_attn_factors(float(tables.attention_scaling))


def _rotary(config: Phi3Config) -> Any:
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    return Phi3RotaryEmbedding(config)


def _original(config: Phi3Config) -> int:
    rope = config.rope_parameters
    return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)


def _factors(config: Phi3Config) -> dict[str, NDArray[np.float32]]:
    rope = config.rope_parameters
    if rope.get("rope_type") != "longrope":
        return {}
    return {kind: np.array(rope[f"{kind}_factor"], dtype=np.float32) for kind in ("long", "short")}


def _shape(opened: Opened, name: str) -> tuple[int, ...]:
    weights = opened.base.weights
    table = name in ("model.embed_tokens.weight", "lm_head.weight")
    stored = name if name in weights.names() else "model.embed_tokens.weight"
    rows, *others = weights.shape(stored)
    return (max(rows, opened.rows) if table else rows, *others)


def _announce(writer: Any, gguf: Any, name: str, shape: tuple[int, ...], stored: Stored) -> None:
    """A vector is in float32 whatever the matrices are: llama.cpp multiplies norms in it."""
    kind = "f32" if len(shape) == 1 else stored
    size = 4 if kind == "f32" else 2
    plain = np.dtype({"f32": np.float32, "f16": np.float16, "bf16": np.uint8}[kind])
    said = (*shape[:-1], 2 * shape[-1]) if kind == "bf16" else shape  # of bf16 the library wants bytes
    raw = gguf.GGMLQuantizationType.BF16 if kind == "bf16" else None
    writer.add_tensor_info(name, said, plain, int(np.prod(shape)) * size, raw)


def _bytes_of(weight: Tensor, stored: Stored) -> NDArray[Any]:
    if weight.ndim == 1:
        return np.asarray(weight.float().contiguous().numpy())
    exact = weight.to(_TORCH[stored]).contiguous()
    return np.asarray((exact.view(torch.int16) if stored == "bf16" else exact).numpy())


# --- read back ------------------------------------------------------------------------------------------------------


def read_gguf_model(path: Path, dtype: torch.dtype) -> Phi3ForCausalLM:
    """The model that such a file is, by its own fields and tensors alone, on the CPU."""
    reader = gguf_library().GGUFReader(str(path))
    tensors = {str(tensor.name): tensor for tensor in reader.tensors}
    config = _config_of(reader, tensors)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights(), torch.device("meta"):
            model = Phi3ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    state = {
        f"{module_of(name)}.weight": _tensor_of(tensor).to(dtype)
        for name, tensor in tensors.items()
        if not name.startswith("rope_factors_")
    }
    missing = model.load_state_dict(state, strict=False, assign=True).missing_keys
    if set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set()):
        raise AdapterError(Problem(str(path), f"has no {missing[0]}", "export it again, and report this"))
    model.tie_weights()
    model.model.rotary_emb = _rotary(config)
    return model.eval()


def _tensor_of(tensor: Any) -> Tensor:
    if tensor.tensor_type.name == "BF16":
        flat = torch.from_numpy(tensor.data.copy()).view(torch.bfloat16)
        return flat.reshape([int(size) for size in reversed(tensor.shape)])
    return torch.from_numpy(tensor.data.copy())


def _config_of(reader: Any, tensors: dict[str, Any]) -> Phi3Config:
    def value_of(key: str, default: Any = None) -> Any:
        field = reader.fields.get(f"{ARCHITECTURE}.{key}")
        return default if field is None else field.contents()

    heads, hidden = value_of("attention.head_count"), value_of("embedding_length")
    head_size = value_of("attention.key_length", hidden // heads)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": value_of("rope.freq_base")}
    if (share := value_of("rope.dimension_count") / head_size) != 1:
        rope["partial_rotary_factor"] = share
    if _FACTORS.format("long") in tensors:
        rope |= {f"{k}_factor": tensors[_FACTORS.format(k)].data.astype(float).tolist() for k in ("long", "short")}
        rope |= {
            "rope_type": "longrope",
            "original_max_position_embeddings": value_of("rope.scaling.original_context_length"),
            "attention_factor": value_of("rope.scaling.attn_factor"),
        }
    return Phi3Config(
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        hidden_size=hidden,
        intermediate_size=value_of("feed_forward_length"),
        num_hidden_layers=value_of("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=value_of("attention.head_count_kv"),
        head_dim=head_size,
        max_position_embeddings=value_of("context_length"),
        rms_norm_eps=value_of("attention.layer_norm_rms_epsilon"),
        rope_parameters=rope,
        sliding_window=None,  # llama.cpp reads the whole text
        tie_word_embeddings="output.weight" not in tensors,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
