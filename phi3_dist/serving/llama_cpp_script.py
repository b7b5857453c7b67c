"""Run by the Python of an environment with xllamacpp: greedy answers of llama.cpp's own server, inside this process.

    python llama_cpp_script.py REQUEST.json ANSWER.json

REQUEST: base (GGUF), adapters (GGUF files, or null), prompts (lists of ids), new_tokens, context, perhaps texts.
ANSWER: for each adapter `answers`, by prompt the ids and the logarithm of each one's probability, and `tokens`, the ids
of each text as its tokenizer reads it; or `error`, what went wrong. Needs nothing else of this project.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any


def _server(request: dict[str, Any], adapter: str | None) -> Any:
    """One slot, float32 keys and values, plain attention: llama.cpp's flash attention computes in 16 bits."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = request["base"]
    settings.n_gpu_layers = 0
    settings.n_ctx = request["context"]
    settings.n_parallel = 1  # the context is divided among slots, and LongRoPE's factors go by a slot's share
    settings.n_batch = settings.n_ubatch = max(512, *(len(ids) for ids in request["prompts"]))
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = request.get("threads", 1)
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.fit_params = settings.warmup = False
    settings.verbosity = 0
    if adapter:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    return xllamacpp.Server(settings)


def _answer(server: Any, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """The likeliest id of each place, by llama.cpp's own logits.

    A server ends an answer at an end token and gives no probability for half a character, and what is compared
    continues past both. Therefore it is made to draw a plain letter each time; it still names the likeliest id, which
    the bias leaves as it was.
    """
    letter = _tokens(server, "a")[-1]
    ids, chosen, logprobs = list(prompt), [], []
    asked = {"n_predict": 1, "temperature": 0.0, "logprobs": 1, "cache_prompt": True, "logit_bias": [[letter, 1000.0]]}
    for _ in range(new_tokens):
        said = server.handle_completions({"prompt": ids, **asked})
        if "choices" not in said:
            raise RuntimeError(said.get("message") or json.dumps(said))
        (drawn,) = said["choices"][0]["logprobs"]["content"]
        likeliest = drawn["top_logprobs"][0]
        chosen.append(likeliest["id"])
        logprobs.append(likeliest["logprob"])
        ids.append(likeliest["id"])
    return {"ids": chosen, "logprobs": logprobs}


def _tokens(server: Any, text: str) -> list[int]:
    """The ids of a text as the server reads it: role tokens are tokens, and a beginning is put before it if asked."""
    asked = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    url = f"{server.listening_address}/tokenize"
    with urllib.request.urlopen(urllib.request.Request(url, asked, {"Content-Type": "application/json"})) as answer:
        return list(json.loads(answer.read())["tokens"])


def answers(request: dict[str, Any]) -> list[dict[str, Any]]:
    """What llama.cpp answers with each adapter, or `error`."""
    found: list[dict[str, Any]] = []
    for adapter in request["adapters"]:
        try:
            server = _server(request, adapter)
        except RuntimeError:
            found.append({"error": f"llama.cpp does not load {adapter or request['base']}"})
            continue
        said = [_answer(server, prompt, request["new_tokens"]) for prompt in request["prompts"]]
        found.append({"answers": said, "tokens": [_tokens(server, text) for text in request.get("texts", [])]})
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(answers(json.loads(Path(sys.argv[1]).read_text()))))
