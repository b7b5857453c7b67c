"""Answers per second: this project's batches beside `transformers.generate` on the same prompts, taking turns.

    python -m phi3_dist.bench.generate [--target demo/run] [--rows 48] [--batch 16] [--rounds 3] [--server-python PATH]

Both answer the same prompts greedily with the same model in one process. transformers gets them in batches of
neighbours in length, padded on the left, and goes on until the last row of a batch has ended; here rows leave and
others join. Counted are the tokens of the answers alone, whose ends the model finds by itself. Whether the answers are
equal is said, too. By default the demo's base answers the demo's prompts: `make demo` makes both, and a run.

With --server-python, the Python of an environment that has vLLM (`make test-serve` makes one), vLLM answers them too,
in a separate process after the others: as many rows at a time, on as many threads, in float32, and the first round is
not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from phi3_dist.errors import MachineError, Problem
from phi3_dist.inference.engine import answers
from phi3_dist.inference.open_model import Opened, open_model
from phi3_dist.inference.prompts import prompt_ids, read_prompts
from phi3_dist.modeling.stop_ids import stop_ids
from phi3_dist.serving.asking import ask_plainly, why_absent
from phi3_dist.serving.rules import VLLM_RANKS

__all__ = ["main", "of_transformers", "of_vllm", "ours"]

console = Console(highlight=False, soft_wrap=True)
Made = list[list[int]]


def ours(opened: Opened, prompts: Sequence[list[int]], stops: list[int], batch: int, at_most: int) -> Made:
    """The new ids of each prompt, without the id that ended it."""
    found = dict(answers(opened.model, prompts, stops, max_new_tokens=at_most, batch_size=batch))
    return [found[i].ids for i in range(len(prompts))]


def of_transformers(opened: Opened, prompts: Sequence[list[int]], stops: list[int], batch: int, at_most: int) -> Made:
    """The same by `model.generate`, in batches of neighbours in length."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False, max_new_tokens=at_most, eos_token_id=stops, pad_token_id=stops[0], use_cache=True
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    made: Made = [[] for _ in prompts]
    for first in range(0, len(order), batch):
        which = order[first : first + batch]
        longest = max(len(prompts[i]) for i in which)
        padding = [longest - len(prompts[i]) for i in which]
        ids = [[stops[0]] * n + prompts[i] for n, i in zip(padding, which, strict=True)]
        mask = [[0] * n + [1] * (longest - n) for n in padding]
        device = opened.device
        out = opened.model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=config,
        )
        for i, row in zip(which, out[:, longest:].tolist(), strict=True):
            end = next((at for at, token in enumerate(row) if token in stops), len(row))
            made[i] = row[:end]
    return made


def of_vllm(
    opened: Opened, prompts: Sequence[list[int]], stops: list[int], words: argparse.Namespace
) -> tuple[Made, list[float]]:
    """The same by vLLM, and its tokens per second in each round. Raises MachineError where it can't answer."""
    why = why_absent("vllm", words.server_python)
    if why:
        fix = "--server-python PATH, the Python of the environment that has it (make test-serve makes one)"
        raise MachineError(Problem("vllm", why, fix))
    adapter = Path(words.target) / "adapter" if (Path(words.target) / "adapter").is_dir() else Path(words.target)
    config = opened.model.peft_config["default"] if opened.has_adapter else None
    request: dict[str, Any] = {
        "base": str(opened.base.folder or opened.base.source),
        "adapters": [str(adapter) if config else None],
        "prompts": [list(ids) for ids in prompts],
        "new_tokens": words.max_new_tokens,
        "context": max(map(len, prompts)) + words.max_new_tokens,
        "max_lora_rank": next(r for r in VLLM_RANKS if r >= (config.r if config else 1)),
        "stops": stops,
        "rounds": words.rounds + 1,
        "together": words.batch,
        "threads": torch.get_num_threads(),
    }
    (said,) = ask_plainly("vllm", words.server_python, request)
    if "error" in said:
        raise MachineError(
            Problem("vllm", str(said["error"])[:400], "phi3-dist check RUN --for vllm says what it loads")
        )
    made = [[token for token in answer["ids"] if token not in stops] for answer in said["answers"]]
    return made, [sum(map(len, made)) / seconds for seconds in said["seconds"][1:]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print each side's tokens per second, and the ratio of the rounds; 1 where the answers differ."""
    parser = argparse.ArgumentParser(prog="python -m phi3_dist.bench.generate")
    parser.add_argument("--target", default="demo/base", help="a run, an adapter or a base; make demo builds demo/base")
    parser.add_argument("--prompts", default="demo/chats/train.jsonl", help="a file of rows; make demo writes this one")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--server-python", help="a Python that has vLLM, which then answers too")
    words = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    prompts = read_prompts(Path(words.prompts))[: words.rows]
    opened = open_model(words.target)
    ids, stops = prompt_ids(opened.tokenizer, prompts), stop_ids(opened.model, opened.tokenizer)
    sides: dict[str, Callable[..., Made]] = {"phi3_dist": ours, "transformers": of_transformers}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    made: dict[str, Any] = {}
    for number in range(words.rounds + 1):  # the first one warms up
        for name, side in sides.items():
            start = time.perf_counter()
            made[name] = side(opened, ids, stops, words.batch, words.max_new_tokens)
            seconds = time.perf_counter() - start
            if number:
                rates[name].append(sum(map(len, made[name])) / seconds)
    equal = sum(a == b for a, b in zip(*made.values(), strict=True))
    for name, found in rates.items():
        console.print(f"{name:<13} {statistics.median(found):8.1f} tokens/s of answers, median of {len(found)} rounds")
    ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
    widths = f"{min(ratios):.2f} to {max(ratios):.2f}"
    console.print(f"ratio {statistics.median(ratios):.2f} ({widths}) at {torch.get_num_threads()} threads")
    if words.server_python:
        theirs, found = of_vllm(opened, ids, stops, words)
        same = sum(a == b for a, b in zip(made["phi3_dist"], theirs, strict=True))
        rate, ratio = statistics.median(found), statistics.median(rates["phi3_dist"]) / statistics.median(found)
        console.print(f"{'vllm':<13} {rate:8.1f} tokens/s of answers, median of {len(found)} rounds")
        console.print(f"phi3_dist has {ratio:.2f} of vLLM's; {same} of {len(ids)} answers are equal")
    lengths = sorted(map(len, made["phi3_dist"]))
    console.print(
        f"{equal} of {len(ids)} answers are equal; of {lengths[0]} to {lengths[-1]} tokens, {len(stops)} end ids"
    )
    return 0 if equal == len(ids) else 1


if __name__ == "__main__":
    sys.exit(main())
