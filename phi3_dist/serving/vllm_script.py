"""Run by the Python of an environment with vLLM: its greedy answers, in one process and in float32 on a CPU.

    python vllm_script.py REQUEST.json ANSWER.json

REQUEST: base (folder or hub id), adapters (a list of folders, or null for the base alone), prompts (lists of ids),
new_tokens, context, max_lora_rank. To be timed: stops (ids that end an answer), rounds, together (rows at a time),
threads. ANSWER: for each adapter `answers`, by prompt the ids and the logarithm of each one's probability, and
`seconds` of each round; or `error`, what went wrong. Needs nothing else of this project.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def _engine(request: dict[str, Any]) -> Any:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if "threads" in request:  # as many as the other side has, and where the system puts them
        os.environ |= {"OMP_NUM_THREADS": str(request["threads"]), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
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
        **({"max_num_seqs": request["together"]} if "together" in request else {}),
    )


def _answers(llm: Any, request: dict[str, Any], number: int) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    folder = request["adapters"][number]
    adapter = LoRARequest(f"adapter{number}", number + 1, folder) if folder else None
    if adapter is not None:
        # by itself first: one that is refused within a request leaves that in the scheduler, for ever
        llm.llm_engine.add_lora(adapter)
    timed = "rounds" in request
    ends = {"stop_token_ids": request["stops"]} if "stops" in request else {"ignore_eos": True}
    sampling = SamplingParams(
        temperature=0, max_tokens=request["new_tokens"], logprobs=None if timed else 1, detokenize=False, **ends
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    seconds, outputs = [], []
    for _ in range(request.get("rounds", 1)):
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, lora_request=adapter, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    found = []
    for out in outputs:
        first = out.outputs[0]
        ids = list(first.token_ids)
        logprobs = [] if timed else [p[i].logprob for i, p in zip(ids, first.logprobs, strict=True)]
        found.append({"ids": ids, "logprobs": logprobs})
    return {"answers": found, "seconds": seconds}


def answers(request: dict[str, Any]) -> list[dict[str, Any]]:
    """What vLLM answers with each adapter, or `error`: whatever the server refuses is the answer."""
    try:
        llm = _engine(request)
    except Exception as error:  # noqa: BLE001
        return [{"error": f"{type(error).__name__}: {error}"} for _ in request["adapters"]]
    found: list[dict[str, Any]] = []
    for number in range(len(request["adapters"])):
        try:
            found.append(_answers(llm, request, number))
        except Exception as error:  # noqa: BLE001
            found.append({"error": f"{type(error).__name__}: {error}"})
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(answers(json.loads(Path(sys.argv[1]).read_text()))))
