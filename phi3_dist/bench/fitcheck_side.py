"""fitcheck's answers beside the memory benchmark's: PyPI's `fitcheck-llm`, where it is installed, in its own process.

It plans transformers' and PEFT's own step on one GPU, batch 1, from a config.json: all logits at once, each layer as
autograd saves it. So its answer is held against that step (stock_step.py), not against this toolkit's. It is asked for
NF4 alone, which it was fitted on, and its tensors are taken without its overhead.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

from phi3_dist.bench.memory_cells import MemoryCell
from phi3_dist.family.variants import FAMILIES, Shape

__all__ = ["answers", "ask_fitcheck", "fitcheck_python"]

_SCRIPT = """
import json, sys
from fitcheck import ModelConfig, TrainingConfig, estimate, get_gpu
for line in sys.stdin:
    asked = json.loads(line)
    report = estimate(ModelConfig(**asked["model"]), TrainingConfig(**asked["training"]), get_gpu("a100-80"))
    parts = ("weight", "lora", "optimizer", "gradient", "activation")
    print(sum(getattr(report, part + "_mib") for part in parts) / 1024, flush=True)
"""


def fitcheck_python(named: str | None = None) -> str | None:
    """An interpreter that has fitcheck: the named one, this one, or that of the `fitcheck` on the path; else None."""
    if named:
        return named
    if find_spec("fitcheck") is not None:
        return sys.executable
    tool = which("fitcheck")
    if tool is None:
        return None
    first = Path(tool).read_text("utf-8", errors="replace").splitlines()[:1]
    return first[0].removeprefix("#!").strip() if first and first[0].startswith("#!") else None


def answers(cell: MemoryCell) -> bool:
    """Whether fitcheck has an answer for such a run: one GPU, NF4, batch 1."""
    return cell.world == cell.micro_batch == 1 and cell.quantization == "nf4" and not cell.kept


def _asked(cell: MemoryCell, shape: Shape) -> dict[str, Any]:
    model = {
        "name": cell.family,
        "num_params": shape.parameters,
        "hidden_size": shape.hidden,
        "num_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_kv_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.tied,
    }
    training = {
        "precision": cell.precision,
        "quantization": cell.quantization,
        "double_quant": cell.quantization == "nf4",
        "seq_len": cell.length,
        "lora_rank": cell.r,
        "lora_targets": [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],
        "grad_checkpoint": cell.checkpointing,
        "flash_attn": True,
    }
    return {"model": model, "training": training}


def ask_fitcheck(python: str, cells: Sequence[MemoryCell]) -> list[float] | None:
    """GiB of tensors for each cell, in order; None where fitcheck fails, and then it is said why."""
    shapes = {family.name: family.shape for family in FAMILIES}
    asked = [_asked(cell, replace(shapes[cell.family], layers=cell.layers)) for cell in cells]
    text = "".join(json.dumps(one) + "\n" for one in asked)
    done = subprocess.run([python, "-c", _SCRIPT], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        sys.stderr.write(f"fitcheck gave no answers: {last}\n")
        return None
    return [float(line) for line in done.stdout.split()]
