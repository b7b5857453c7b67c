"""A server of another environment is asked: a request goes to its Python as JSON, the answers come back so."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phi3_dist.errors import MachineError, Problem

__all__ = ["ASKABLE", "Answer", "Askable", "ask", "ask_plainly", "why_absent"]

Askable = Literal["vllm", "llama.cpp"]
ASKABLE: tuple[Askable, ...] = ("vllm", "llama.cpp")
_SCRIPT = {"vllm": "vllm_script.py", "llama.cpp": "llama_cpp_script.py"}
_PACKAGE = {"vllm": "vllm", "llama.cpp": "xllamacpp"}
_LAST_LINES = 3


@dataclass(frozen=True)
class Answer:
    """Ids that a server has added to a prompt, and the logarithm of each one's probability."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


def why_absent(server: Askable, python: str) -> str:
    """Why that Python can't load the server, in one line; empty where it can."""
    command = [python, "-P", "-c", f"import {_PACKAGE[server]}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=300)
    except OSError as error:
        return f"{python} cannot be started: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"{python} had not loaded it after 300 s"
    if done.returncode == 0:
        return ""
    last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
    old = re.search(r"version `(GLIBC_[\d.]+)' not found", last)
    if old:
        return f"is installed for {python}, and wants {old[1]}: the C library of this system is older"
    absent = f"No module named '{_PACKAGE[server]}'"
    return f"is not installed for {python}" if absent in last else f"{python} does not load it: {last[:300]}"


def ask(
    server: Askable, python: str, request: Mapping[str, Any], *, timeout_s: int = 1800
) -> list[Sequence[Answer] | str]:
    """Of each adapter the answers, or in one line what the server refuses.

    request: `base`, `adapters` (None: the base alone), `prompts` (ids), `new_tokens`, `context` (tokens), for
    vLLM `max_lora_rank`. Raises MachineError where the server can't be started.
    """
    return [
        " ".join(str(one["error"]).split())
        if "error" in one
        else [Answer(tuple(answer["ids"]), tuple(answer["logprobs"])) for answer in one["answers"]]
        for one in ask_plainly(server, python, request, timeout_s=timeout_s)
    ]


def ask_plainly(
    server: Askable, python: str, request: Mapping[str, Any], *, timeout_s: int = 1800
) -> list[dict[str, Any]]:
    """As `ask`, with what the server's script has written for each adapter (`vllm_script.py` says what)."""
    script = Path(__file__).with_name(_SCRIPT[server])
    with tempfile.TemporaryDirectory() as folder:
        request_file, answer_file = Path(folder) / "request.json", Path(folder) / "answer.json"
        request_file.write_text(json.dumps(dict(request)), encoding="utf-8")
        # -P: this package's folder must not come before the server's own modules
        environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}}
        try:
            done = subprocess.run(
                [python, "-P", str(script), str(request_file), str(answer_file)],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=timeout_s,
                env=environment,
            )
        except OSError as error:
            what = f"cannot be started: {error.strerror}"
            raise MachineError(Problem(python, what, "--server-python PATH, of the server's environment")) from error
        except subprocess.TimeoutExpired as error:
            raise MachineError(Problem(server, f"had not answered after {timeout_s} s", "fewer rows")) from error
        if not answer_file.is_file():
            tail = " | ".join(line.strip() for line in done.stderr.splitlines()[-_LAST_LINES:])
            what = f"ended with {done.returncode} before it answered: {tail}"
            fix = f"--server-python PATH, a Python that has {_PACKAGE[server]}"
            raise MachineError(Problem(server, what, fix))
        said: list[dict[str, Any]] = json.loads(answer_file.read_text("utf-8"))
    return said
