"""Run by the Python of an environment with vLLM: its greedy answers, in one process and in float32 on a CPU.

    python vllm_script.py REQUEST.json ANSWER.json

REQUEST: base (folder or hub id), adapters (a list of folders, or null for the base alone), prompts (lists of ids),
new_tokens, context, max_lora_rank. ANSWER: for each adapter `answers`, by prompt the ids and the logarithm of each
one's probability, or `error`, what went wrong. Needs nothing else of this project.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def _engine(request: dict[str, Any]) -> Any:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    with_lora = any(request["adapters"])
    return LLM(
        model=request["base"],
        dtype=request.get("dtype", "float32"),
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=request["context"],
        enable_lora=with_lora,
        **({"max_lora_rank": request["max_lora_rank"]} if with_lora else {}),
    )


def _answers(llm: Any, request: dict[str, Any], number: int) -> list[dict[str, Any]]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    folder = request["adapters"][number]
    adapter = LoRARequest(f"adapter{number}", number + 1, folder) if folder else None
    if adapter is not None:
        # by itself first: one that is refused within a request leaves that in the scheduler, for ever
        llm.llm_engine.add_lora(adapter)
    sampling = SamplingParams(
        temperature=0, max_tokens=request["new_tokens"], ignore_eos=True, logprobs=1, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    found = []
    for out in llm.generate(prompts, sampling, lora_request=adapter, use_tqdm=False):
        first = out.outputs[0]
        ids = list(first.token_ids)
        found.append({"ids": ids, "logprobs": [p[i].logprob for i, p in zip(ids, first.logprobs, strict=True)]})
    return found


def answers(request: dict[str, Any]) -> list[dict[str, Any]]:
    """What vLLM answers with each adapter, or `error`: whatever the server refuses is the answer."""
    try:
        llm = _engine(request)
    except Exception as error:  # noqa: BLE001
        return [{"error": f"{type(error).__name__}: {error}"} for _ in request["adapters"]]
    found: list[dict[str, Any]] = []
    for number in range(len(request["adapters"])):
        try:
            found.append({"answers": _answers(llm, request, number)})
        except Exception as error:  # noqa: BLE001
            found.append({"error": f"{type(error).__name__}: {error}"})
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(answers(json.loads(Path(sys.argv[1]).read_text()))))
