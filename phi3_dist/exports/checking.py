"""`phi3-dist check`: what a server will do with an adapter, by its rules, and what it does when it is asked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phi3_dist.errors import ConfigError, MachineError, Problem
from phi3_dist.exports.drift import Rows, compute_dtype, live_model, rows_for, tokenizer_of
from phi3_dist.exports.gguf_file import ADAPTER, write_gguf_adapter
from phi3_dist.exports.open_adapter import Opened, open_adapter
from phi3_dist.exports.whole_folder import new_folder
from phi3_dist.serving.asking import ASKABLE, Answer, ask, why_absent
from phi3_dist.serving.rules import SERVERS, VLLM_RANKS, Server, Verdict, judge
from phi3_dist.serving.served import Served, served_of_folder

__all__ = ["Trial", "check", "served_of", "try_server"]

CLOSE = 0.05
"""Most that two programs' logarithms of one probability may differ. llama.cpp keeps 16 bits in its attention: on a
model of wild weights (tests/serve) it was off by 0.02, vLLM by 1e-4."""
_PROMPTS, _NEW_TOKENS, _LONGEST_PROMPT = 4, 16, 128


@dataclass(frozen=True)
class Trial:
    """A server's greedy answers beside the live model's, by token ids."""

    refused: str
    """What the server said instead of answering; empty where it answered."""
    prompts: int = 0
    same: int = 0
    """Answers that are the live model's, token for token."""
    ties: int = 0
    """Those that part where the live model holds two tokens for nearly equal, and agree before that."""
    largest: float = 0.0
    """Largest difference of the logarithms of a token's probability, up to where they part."""
    origin: str = ""

    @property
    def right(self) -> bool:
        return not self.refused and self.same + self.ties == self.prompts and self.largest <= CLOSE

    def __str__(self) -> str:
        if self.refused:
            return f"refused: {self.refused[:400]}"
        ties = f", {self.ties} diverging at a tie" if self.ties else ""
        off = f"log-probabilities at most {self.largest:.1e} off"
        return f"{self.same} of {self.prompts} greedy answers are the live model's{ties}; {off}, on {self.origin}"


def served_of(opened: Opened) -> Served:
    """What the rules ask of an adapter. A local base is named by its path: it is served here."""
    base: dict[str, Any] = opened.base.config.to_dict()
    config = {**opened.config, "base_model_name_or_path": opened.base.source}
    header = {**opened.metadata, "quantization": opened.trained_on, "start": opened.lora_init}
    return served_of_folder(opened.folder, config, header, base)


def check(where: str | Path, server: Server, *, base: str | None = None) -> tuple[Opened, Verdict]:
    """What `server` (vllm, llama.cpp, transformers, peft) will do with the adapter of a run or a folder.

    Raises ConfigError for another server, and what `open_adapter` raises.
    """
    if server not in SERVERS:
        raise ConfigError(Problem("--for", f"{server!r} is not a known server", f"one of {', '.join(SERVERS)}"))
    opened = open_adapter(where, base)
    return opened, judge(served_of(opened), server)


def try_server(
    opened: Opened, server: Server, python: str, *, server_base: str | None = None, data: str | None = None
) -> Trial:
    """Start the server in the environment of `python`, and compare its greedy answers with the live model's.

    server_base: what it loads as the base, which for llama.cpp is a GGUF file. Raises ConfigError, MachineError.
    """
    if server not in ASKABLE:
        what = f"starts no server for {server}: the live model is PEFT's"
        raise ConfigError(Problem("--run", what, f"--for {' or '.join(ASKABLE)}"))
    if server == "llama.cpp" and server_base is None:
        what = "needs the base as a GGUF file"
        raise ConfigError(Problem("--server-base", what, "--server-base base.gguf (convert_hf_to_gguf.py makes one)"))
    if opened.base.folder is None and server_base is None:
        raise ConfigError(Problem("--run", f"{opened.base.source} has no folder to serve", "--server-base FOLDER"))
    tokenizer = tokenizer_of(opened)
    rows = rows_for(opened, tokenizer, data)
    prompts = prompts_of(rows)
    served = served_of(opened)
    context = 2 * served.original_context if served.longrope == "long" else min(
        served.original_context, max(512, *(len(p) + _NEW_TOKENS for p in prompts))
    )  # fmt: skip
    request: dict[str, Any] = {"prompts": prompts, "new_tokens": _NEW_TOKENS, "context": context}
    if server == "llama.cpp":
        return _try_llama_cpp(opened, python, request | {"base": str(server_base)}, rows)
    request |= {
        "base": server_base or str(opened.base.folder),
        "adapters": [str(opened.folder)],
        "max_lora_rank": next((r for r in VLLM_RANKS if r >= max(served.ranks)), VLLM_RANKS[-1]),
    }
    (answers,) = ask("vllm", python, request)
    return compared(answers, opened, prompts, rows)


def _try_llama_cpp(opened: Opened, python: str, request: dict[str, Any], rows: Rows) -> Trial:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, new_folder(Path(folder) / "gguf") as made:
        write_gguf_adapter(opened, made)
        (answers,) = ask("llama.cpp", python, request | {"adapters": [str(made / ADAPTER)]})
    return compared(answers, opened, request["prompts"], rows)


def prompts_of(rows: Rows) -> list[list[int]]:
    """Each row up to its first supervised token, the last tokens of a long one."""
    found = []
    for ids, supervised in zip(rows.ids, rows.supervised, strict=True):
        first = supervised.index(True)
        found.append(list(ids[:first])[-_LONGEST_PROMPT:])
    return [prompt for prompt in found if prompt][:_PROMPTS]


def compared(answers: Sequence[Answer] | str, opened: Opened, prompts: Sequence[Sequence[int]], rows: Rows) -> Trial:
    """A server's answers held against the live model's."""
    if isinstance(answers, str):
        return Trial(answers)
    model = live_model(opened, compute_dtype(opened.base))
    same = ties = 0
    largest = 0.0
    for prompt, theirs in zip(prompts, answers, strict=True):
        ids, logprobs, gaps = greedy(model, prompt, len(theirs.ids))
        part = next((i for i, (a, b) in enumerate(zip(ids, theirs.ids, strict=True)) if a != b), len(ids))
        same += part == len(ids)
        ties += part < len(ids) and gaps[part] <= CLOSE
        off = [abs(a - b) for a, b in zip(logprobs[:part], theirs.logprobs[:part], strict=True)]
        largest = max([largest, *off])
    return Trial("", len(prompts), same, ties, largest, rows.origin)


@contextmanager
def _no_end(model: Any) -> Iterator[None]:
    """`generate` takes the model's end ids where it is given none."""
    ends, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        yield
    finally:
        model.generation_config.eos_token_id = ends


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], list[float], list[float]]:
    """Greedy ids, the logarithm of each one's probability, and how far ahead of the next best it was.

    As many as asked, past an end id too, as the servers are asked for.
    """
    from transformers import GenerationConfig

    device = model.get_input_embeddings().weight.device
    ids_1T = torch.tensor([list(prompt)], device=device)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    with _no_end(model):
        out = model.eval().generate(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=config)
    best = [logits[0].float().log_softmax(-1).topk(2) for logits in out.logits]
    ids = [int(top.indices[0]) for top in best]
    return ids, [float(top.values[0]) for top in best], [float(top.values[0] - top.values[1]) for top in best]


def report_lines(verdict: Verdict) -> list[str]:
    """The verdict as a person reads it."""
    lines = [f"{verdict.server}: {verdict.summary}"]
    for finding in verdict.findings:
        flags = f" → {finding.flags}" if finding.flags else ""
        lines.append(f"  {finding.effect:8}{finding.what}{flags}")
        lines += [f"          fix: {finding.fix}"] if finding.fix else []
        lines += [f"          source: {finding.source}"] if finding.source else []
    return [*lines, "", verdict.command] if verdict.command else lines


def as_json(verdict: Verdict, trial: Trial | None) -> str:
    """The same for a program."""
    document = {
        "server": verdict.server,
        "loads": verdict.loads,
        "right": verdict.right,
        "command": verdict.command,
        "findings": [vars(finding) for finding in verdict.findings],
        "trial": {**vars(trial), "right": trial.right} if trial else None,
    }
    return json.dumps(document, indent=2)


def require(server: Server, python: str) -> None:
    """Raises MachineError where that Python has no such server, or one that it can't load, with the reason."""
    if server not in ASKABLE:
        return
    why = why_absent(server, python)
    if why:
        fix = "--server-python PATH, the Python of the environment that has it (make test-serve makes one)"
        raise MachineError(Problem(server, why, fix))
