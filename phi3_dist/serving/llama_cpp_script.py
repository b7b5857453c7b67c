"""Run by the Python of an environment with llama-cpp-py-sync: greedy answers of llama.cpp, over its C interface.

    python llama_cpp_script.py REQUEST.json ANSWER.json

REQUEST: base (GGUF), adapters (GGUF files, or null), prompts (lists of ids), new_tokens, context, perhaps texts.
ANSWER: for each adapter `answers`, by prompt the ids and the logarithm of each one's probability, and `tokens`, the ids
of each text as its tokenizer reads it; or `error`, what went wrong. Needs nothing else of this project.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

FULL_PRECISION = 0  # ggml's F32, for keys and values
PLAIN_ATTENTION = 0  # its flash attention computes in 16 bits


def _context(ffi: Any, lib: Any, request: dict[str, Any], path: str | None) -> tuple[Any, Any]:
    lib.llama_backend_init()
    settings = lib.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(request["base"].encode(), settings)
    if model == ffi.NULL:
        raise RuntimeError(f"llama.cpp does not load {request['base']}")
    context = lib.llama_context_default_params()
    context.n_ctx = request["context"]
    context.n_batch = context.n_ubatch = max(512, *(len(ids) for ids in request["prompts"]))
    context.n_threads = context.n_threads_batch = request.get("threads", 1)
    context.type_k = context.type_v = FULL_PRECISION
    context.flash_attn_type = PLAIN_ATTENTION
    made = lib.llama_init_from_model(model, context)
    if made == ffi.NULL:
        raise RuntimeError("llama.cpp makes no context")
    if path:
        adapter = lib.llama_adapter_lora_init(model, path.encode())
        if adapter == ffi.NULL:
            raise RuntimeError(f"llama.cpp does not load {path}")
        if lib.llama_set_adapters_lora(
            made, ffi.new("struct llama_adapter_lora *[]", [adapter]), 1, ffi.new("float[]", [1.0])
        ):
            raise RuntimeError("llama.cpp does not apply the adapter")
    return model, made


def _answer(ffi: Any, lib: Any, made: tuple[Any, Any], prompt: list[int], new_tokens: int) -> dict[str, Any]:
    model, context = made
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    ids, chosen, logprobs = list(prompt), [], []
    for _ in range(new_tokens):
        tokens = ffi.new("llama_token[]", ids)
        if lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama.cpp decodes no more")
        logits = ffi.unpack(lib.llama_get_logits_ith(context, -1), size)
        best = max(range(size), key=logits.__getitem__)
        top = logits[best]
        chosen.append(best)
        logprobs.append(-math.log(sum(math.exp(value - top) for value in logits)))
        ids = [best]
    return {"ids": chosen, "logprobs": logprobs}


def _tokens(ffi: Any, lib: Any, model: Any, text: str) -> list[int]:
    """The ids of a text as llama-server reads it: role tokens are tokens, and a beginning is put before it if asked."""
    raw = text.encode()
    room = len(raw) + 8
    out = ffi.new("llama_token[]", room)
    count = lib.llama_tokenize(lib.llama_model_get_vocab(model), raw, len(raw), out, room, True, True)
    return list(ffi.unpack(out, count))


def answers(request: dict[str, Any]) -> list[dict[str, Any]]:
    """What llama.cpp answers with each adapter, or `error`."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, lib = get_ffi(), get_lib()
    found: list[dict[str, Any]] = []
    for path in request["adapters"]:
        try:
            made = _context(ffi, lib, request, path)
            said = [_answer(ffi, lib, made, prompt, request["new_tokens"]) for prompt in request["prompts"]]
            tokens = [_tokens(ffi, lib, made[0], text) for text in request.get("texts", [])]
            found.append({"answers": said, "tokens": tokens})
        except RuntimeError as error:
            found.append({"error": str(error)})
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(answers(json.loads(Path(sys.argv[1]).read_text()))))
