"""LoRA, QLoRA and FP8 on one GPU at Phi-3-mini's real shape: tokens per second, share of the matrix rate, memory.

    python -m phi3_dist.bench.gpu

Random weights (3.8 B), LoRA r=16 on every linear layer, bf16, packs of 2,048, 4,096 and 8,192 tokens of ragged rows.
Each case is a process of its own, so that none sees another's memory; one round is warm-up, the median of the others
counts. The share is that of bf16 products of the base's own sizes, timed in the same process, for FP8 too. Packs of
8,192 recompute activations. Not yet run: it was written where no GPU could be had.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from phi3_dist.bench.scaling import rows_of_length
from phi3_dist.bench.sides import SHAPE, Round, Stand, make_token_packs, matrix_flops_per_s, save_base
from phi3_dist.bench.throughput import ask, side_process, step_flops

__all__ = ["CASES", "LENGTHS", "MINI", "Case", "lines_of", "main", "serve"]

LENGTHS = (2048, 4096, 8192)
CASES: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "QLoRA (nf4)": {"quantization": "nf4"},
    "LoRA, FP8 base": {"fp8": True},
}
MINI: dict[str, Any] = {
    **SHAPE,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "sliding_window": 2047,
    "dtype": "bfloat16",
}
_RECOMPUTE_FROM = 8192


@dataclass(frozen=True)
class Case:
    """What one process found. `flops_per_s` is the matrix rate; `weights_mib` the model's, `device` the card's name."""

    name: str
    length: int
    rounds: list[Round]
    flops: float
    flops_per_s: float
    weights_mib: float
    device: str

    @property
    def tokens_per_s(self) -> float:
        return statistics.median(one.tokens_per_s for one in self.rounds)

    @property
    def share(self) -> float:
        return statistics.median(self.flops / one.seconds for one in self.rounds) / self.flops_per_s


def serve(pipe: Connection, folder: Path, shape: Mapping[str, Any], name: str, length: int, *, cpu: bool) -> None:
    """One case: its matrix rate, a warm-up round, then one `Round` for each "round" received."""
    import torch

    rows = rows_of_length(length)
    rate, _ = matrix_flops_per_s(shape, length, cuda=not cpu)
    model = {"precision": "fp32" if cpu else "bf16", "activation_checkpointing": length >= _RECOMPUTE_FROM}
    stand = Stand(folder, longest_row=length, use_cpu=cpu, model={**model, **CASES[name]})
    packs = make_token_packs(rows, length)
    first = stand.round(packs)
    device = "CPU" if cpu else torch.cuda.get_device_name()
    flops = step_flops([len(ids) for ids, _ in rows], first.supervised_tokens, shape)
    pipe.send({"flops": flops, "flops_per_s": rate, "weights_mib": stand.meter.weights_mib, "device": device})
    while pipe.recv() != "stop":
        pipe.send(stand.round(packs))


def _serve(pipe: Connection, folder: Path, shape: Mapping[str, Any], name: str, length: int) -> None:
    serve(pipe, folder, shape, name, length, cpu=False)


def lines_of(cases: list[Case]) -> list[str]:
    """The table, in Markdown: it is meant for the README."""
    lines = [
        f"{cases[0].device}:" if cases else "no case ran",
        "",
        "| | pack | tokens/s | of the matrix rate | weights, MiB | peak over them, MiB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {case.name} | {case.length:,} | {case.tokens_per_s:,.0f} | {case.share:.0%} | {case.weights_mib:,.0f} "
        f"| {max(one.peak_mib for one in case.rounds):,.0f} |"
        for case in cases
    ]
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Measure every case and print the table. Ends with 1 where there is no CUDA device."""
    parser = argparse.ArgumentParser(prog="python -m phi3_dist.bench.gpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default 5)")
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        sys.stdout.write("no CUDA device: this benchmark needs one (make bench-throughput runs on a CPU)\n")
        sys.exit(1)
    cases = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "base"
        with side_process(save_base, 0, folder, {"": MINI}) as maker:
            maker.recv()
        for length in LENGTHS:
            for kind in CASES:
                with side_process(_serve, 0, folder, MINI, kind, length) as pipe:
                    facts = pipe.recv()
                    rounds = [ask(pipe, "round") for _ in range(options.rounds)]
                cases.append(Case(kind, length, rounds, **facts))
                sys.stdout.write(f"{lines_of(cases)[-1]}\n")
    for line in lines_of(cases):
        sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()
