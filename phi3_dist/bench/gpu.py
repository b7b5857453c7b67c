"""LoRA, QLoRA and FP8 on one GPU at Phi-3-mini's real shape: tokens per second, share of the matrix rate, memory.

    python -m phi3_dist.bench.gpu

Random weights (3.8 B), LoRA r=16 on every linear layer, bf16, packs of 2,048, 4,096 and 8,192 tokens of ragged rows.
Each case is a process of its own, so that none sees another's memory; one round is warm-up, the median of the others
counts. The share is that of bf16 products of the base's own sizes, timed in the same process, for FP8 too. Packs of
8,192 recompute activations. Below the table stand the kernels of `model.loss`, head and cross-entropy of a pack with
every token supervised, forward and backward in turns in one process, with the memory each takes at its peak. A case
that cannot run says why in its row, and the others run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from phi3_dist.bench.console import say
from phi3_dist.bench.scaling import rows_of_length
from phi3_dist.bench.throughput import ask, side_process, step_flops
from phi3_dist.bench.throughput_sides import MIB, SHAPE, Round, Stand, make_token_packs, matrix_flops_per_s, save_base
from phi3_dist.machine.print_encoding import print_in_any_encoding
from phi3_dist.machine.probe import package_versions
from phi3_dist.planning.loss import why_not_liger

__all__ = [
    "CASES",
    "LENGTHS",
    "MINI",
    "Case",
    "NotRun",
    "lines_of",
    "loss_lines",
    "main",
    "run_case",
    "serve",
    "serve_losses",
    "time_losses",
]

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


def time_losses(
    losses: Mapping[str, Callable[..., Any]], rows: int, shape: Mapping[str, Any], rounds: int, *, cpu: bool
) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds and peak MiB over what stood before, of each loss in each round after the first; they take turns.

    A loss is `(hidden (rows, H), weight (V, H), bias, target (rows)) -> scalar`. On a CPU the memory is not measured.
    """
    import torch

    device, dtype = ("cpu", torch.float32) if cpu else ("cuda", torch.bfloat16)
    torch.manual_seed(0)
    hidden, vocab = int(shape["hidden_size"]), int(shape["vocab_size"])
    hidden_SH = torch.randn(rows, hidden, device=device, dtype=dtype, requires_grad=True)
    weight_VH = torch.randn(vocab, hidden, device=device, dtype=dtype) / hidden**0.5
    target_S = torch.randint(0, vocab, (rows,), device=device)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in losses}
    for number in range(rounds + 1):
        for name in list(losses) if number % 2 == 0 else reversed(list(losses)):
            hidden_SH.grad = None
            before_mib, start_s = 0.0, time.perf_counter()
            if not cpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before_mib, start_s = torch.cuda.memory_allocated() / MIB, time.perf_counter()
            (losses[name](hidden_SH, weight_VH, None, target_S) / rows).backward()
            if not cpu:
                torch.cuda.synchronize()
            peak_mib = 0.0 if cpu else torch.cuda.max_memory_allocated() / MIB - before_mib
            found[name].append(((time.perf_counter() - start_s) * 1e3, peak_mib))
    return {name: done[1:] for name, done in found.items()}


def serve_losses(pipe: Connection, _: Path, shape: Mapping[str, Any], rows: int, rounds: int, *, cpu: bool) -> None:
    """Send what `time_losses` finds for each kernel of `model.loss` that can run here."""
    from phi3_dist.modeling.loss import chunked_nll, liger_nll

    losses: dict[str, Callable[..., Any]] = {"chunked": chunked_nll}
    if not why_not_liger("cpu" if cpu else "cuda", package_versions(), targets=(), saved=(), new_tokens=False)[0]:
        losses["liger"] = liger_nll
    pipe.send(time_losses(losses, rows, shape, rounds, cpu=cpu))
    pipe.recv()


def _serve_losses(pipe: Connection, folder: Path, shape: Mapping[str, Any], rows: int, rounds: int) -> None:
    serve_losses(pipe, folder, shape, rows, rounds, cpu=False)


def loss_lines(rows: int, found: Mapping[str, list[tuple[float, float]]]) -> list[str]:
    """One line for each kernel, and the median ratio of the pairs; or what Liger's lacks."""
    lines = []
    for name, done in found.items():
        times, peaks = zip(*done, strict=True)
        lines.append(f"model.loss={name}, {rows:,} rows: {statistics.median(times):.2f} ms, peak {max(peaks):,.0f} MiB")
    if "liger" not in found:
        why, fix = why_not_liger("cuda", package_versions(), targets=(), saved=(), new_tokens=False)
        return [*lines, f"model.loss=liger was not timed: {why} ({fix})"]
    ratios = [ours / theirs for (ours, _), (theirs, _) in zip(found["chunked"], found["liger"], strict=True)]
    return [*lines, f"chunked / liger: {statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"]


@dataclass(frozen=True)
class NotRun:
    """A case that could not run here, and why in one line."""

    name: str
    length: int
    why: str


def lines_of(cases: Sequence[Case | NotRun]) -> list[str]:
    """The table, in Markdown: it is meant for the docs."""
    devices = [case.device for case in cases if isinstance(case, Case)]
    lines = [
        f"{devices[0]}:" if devices else "no case ran",
        "",
        "| | pack | tokens/s | of the matrix rate | weights, MiB | peak over them, MiB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {case.name} | {case.length:,} | {case.tokens_per_s:,.0f} | {case.share:.0%} | {case.weights_mib:,.0f} "
        f"| {max(one.peak_mib for one in case.rounds):,.0f} |"
        if isinstance(case, Case)
        else f"| {case.name} | {case.length:,} | not run: {case.why} | | | |"
        for case in cases
    ]
    return lines


def run_case(folder: Path, name: str, length: int, rounds: int) -> Case | NotRun:
    """One case in a process of its own, whose failure is its own: no bitsandbytes, another torch, too little memory."""
    try:
        with side_process(_serve, 0, folder, MINI, name, length) as pipe:
            facts = pipe.recv()
            done = [ask(pipe, "round") for _ in range(rounds)]
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1].strip()
        return NotRun(name, length, last.replace("|", "/")[:200])
    return Case(name, length, done, **facts)


def main(arguments: list[str] | None = None) -> None:
    """Measure every case and print the table. Ends with 1 where there is no CUDA device."""
    print_in_any_encoding()
    parser = argparse.ArgumentParser(prog="python -m phi3_dist.bench.gpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default 5)")
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        sys.stdout.write("no CUDA device: this benchmark needs one (make bench-throughput runs on a CPU)\n")
        sys.exit(1)
    cases: list[Case | NotRun] = []
    losses: dict[int, dict[str, list[tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "base"
        with side_process(save_base, 0, folder, {"": MINI}) as maker:
            maker.recv()
        for length in LENGTHS:
            for kind in CASES:
                cases.append(run_case(folder, kind, length, options.rounds))
                sys.stdout.write(f"{lines_of(cases)[-1]}\n")
        for length in LENGTHS:
            with side_process(_serve_losses, 0, folder, MINI, length, options.rounds) as pipe:
                losses[length] = pipe.recv()
    for line in (*lines_of(cases), "", *(line for item in losses.items() for line in loss_lines(*item))):
        say(line)


if __name__ == "__main__":
    main()
