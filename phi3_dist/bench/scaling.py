"""How the cost of a token grows: with the length of a pack, the size of the model, and the number of processes.

    python -m phi3_dist.bench.scaling [--plot FILE.png]

LoRA r=16 on every linear layer of random Phi-3s in float32 on the CPU, one thread a process, rows as in throughput.py
(220 tokens on average). In each round every case takes one turn; the first round is warm-up, medians are of the others.
Times are processor time, summed over the processes, so that other work on the machine counts little. What would be flat
if nothing but the arithmetic counted is the time for a token by pack length and by processes, and the rate in FLOPs
(see `step_flops`) by model size.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from phi3_dist.bench.console import say
from phi3_dist.bench.throughput import make_rows, side_process, step_flops
from phi3_dist.bench.throughput_sides import PACK_LENGTH, SHAPE, Round, Stand, make_token_packs, save_base
from phi3_dist.machine.print_encoding import print_in_any_encoding

__all__ = ["LENGTHS", "SIZES", "Case", "main", "ranks", "rows_of_length", "shape_of", "table", "together"]

LENGTHS = (512, 1024, 2048, 4096, 8192)
SIZES: dict[str, dict[str, Any]] = {
    "25M": {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 4, "num_attention_heads": 4},
    "47M": {"hidden_size": 480, "intermediate_size": 1280, "num_hidden_layers": 6, "num_attention_heads": 5},
    "81M": {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 8, "num_attention_heads": 8},
    "134M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8},
}
SMALLEST = "25M"


def shape_of(size: str) -> dict[str, Any]:
    """The Phi-3 configuration of one of `SIZES`."""
    heads = SIZES[size]["num_attention_heads"]
    return {**SHAPE, **SIZES[size], "num_key_value_heads": heads, "max_position_embeddings": max(LENGTHS)}


@dataclass
class Case:
    """One point of a curve: its rounds, and the FLOPs that one of them needs at least."""

    name: str
    flops: float
    rounds: list[Round]

    @property
    def us_per_token(self) -> float:
        return statistics.median(1e6 * one.cpu_seconds / one.tokens for one in self.rounds)

    @property
    def gflops_per_s(self) -> float:
        return statistics.median(self.flops / one.cpu_seconds / 1e9 for one in self.rounds)


def rows_of_length(length: int) -> list[tuple[list[int], int]]:
    """Rows that fill one pack of `length` tokens to the last: their mean length is the same for every pack length."""
    rows: list[tuple[list[int], int]] = []
    left = length
    for ids, answer in make_rows(2 * length // 220 + 8):
        if len(ids) + 24 <= left:
            rows.append((ids, answer))
            left -= len(ids)
    ids = [3 + i % 30000 for i in range(left)]
    return [*rows, (ids, left // 2)]


def _supervised(rows: list[tuple[list[int], int]]) -> int:
    return sum(len(ids) - answer for ids, answer in rows)


def _flops(rows: list[tuple[list[int], int]], size: str) -> float:
    return step_flops([len(ids) for ids, _ in rows], _supervised(rows), shape_of(size))


def serve(pipe: Connection, folder: Path, environment: dict[str, str], world: int) -> None:
    """A rank that holds every model it is asked about, and runs one pack for each (size, length) received."""
    os.environ.update(environment)
    stands: dict[str, Stand] = {}
    pipe.send("ready")
    while (asked := pipe.recv()) != "stop":
        size, length = asked
        if size not in stands:
            stands[size] = Stand(folder / size, longest_row=max(LENGTHS), world=world)
        # one full pack, which every rank gets: two times its rows might not fill two packs
        pipe.send(stands[size].round(make_token_packs(rows_of_length(length), length)))


@contextmanager
def ranks(
    folder: Path, world: int, server: Callable[..., None] = serve, *arguments: Any, cpu: bool = True
) -> Iterator[list[Connection]]:
    """The pipes of `world` ranks of one thread each, which run `server`, once they are ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as stack:
        pipes = []
        for rank in range(world):
            launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            launched |= {"ACCELERATE_USE_CPU": "true"} if cpu else {}
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            environment = {**launched, **{k: str(v) for k, v in numbers.items()}} if world > 1 else {}
            pipes.append(stack.enter_context(side_process(server, 1, folder, environment, world, *arguments)))
        for pipe in pipes:
            pipe.recv()
        yield pipes


def together(pipes: list[Connection], asked: Any) -> Round:
    """One round on every rank at once: the tokens of the world, the slowest rank's clock, the sum of processor time."""
    for pipe in pipes:
        pipe.send(asked)
    done = [pipe.recv() for pipe in pipes]
    slowest, cpu = max(one.seconds for one in done), sum(one.cpu_seconds for one in done)
    return Round(done[0].tokens, done[0].supervised_tokens, slowest, max(one.peak_mib for one in done), cpu)


def measure(rounds: int) -> dict[str, list[Case]]:
    """The three curves."""
    by_length = [Case(f"{n:,}", _flops(rows_of_length(n), SMALLEST), []) for n in LENGTHS]
    by_size = [Case(size, _flops(rows_of_length(PACK_LENGTH), size), []) for size in SIZES]
    by_world = [Case(str(n), n * _flops(rows_of_length(PACK_LENGTH), "47M"), []) for n in (1, 2)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "bases"
        with side_process(save_base, 1, folder, {size: shape_of(size) for size in SIZES}) as maker:
            maker.recv()
        with ranks(folder, 1) as one, ranks(folder, 2) as two:
            for number in range(rounds + 1):
                turns = [(case, one, (SMALLEST, n)) for case, n in zip(by_length, LENGTHS, strict=True)]
                turns += [(case, one, (case.name, PACK_LENGTH)) for case in by_size]
                turns += [(by_world[0], one, ("47M", PACK_LENGTH)), (by_world[1], two, ("47M", PACK_LENGTH))]
                for case, pipes, asked in turns:
                    done = together(pipes, asked)
                    if number:
                        case.rounds.append(done)
    return {"pack length, tokens": by_length, "model": by_size, "processes": by_world}


def table(curves: dict[str, list[Case]]) -> list[str]:
    """The curves as lines of text: time for a token and rate, each beside the first case's."""
    lines = []
    for what, cases in curves.items():
        lines.append(f"{what:<22} {'µs/token':>9} {'of first':>9} {'GFLOP/s':>9} {'of first':>9}")
        first = cases[0]
        for case in cases:
            times, rate = case.us_per_token / first.us_per_token, case.gflops_per_s / first.gflops_per_s
            lines.append(f"{case.name:<22} {case.us_per_token:9.0f} {times:9.2f} {case.gflops_per_s:9.1f} {rate:9.2f}")
    return lines


def plot(curves: dict[str, list[Case]], file: Path) -> None:
    """The three curves side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    shown = (("CPU µs a token", "us_per_token"), ("GFLOP/s", "gflops_per_s"), ("CPU µs a token", "us_per_token"))
    for axes, (what, cases), (label, field) in zip(panels, curves.items(), shown, strict=True):
        values = [getattr(case, field) for case in cases]
        axes.plot([case.name for case in cases], values, marker="o")
        axes.set(xlabel=what, ylabel=label, ylim=(0, 1.15 * max(values)))
        axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, and draw it where `--plot` says."""
    print_in_any_encoding()
    parser = argparse.ArgumentParser(prog="python -m phi3_dist.bench.scaling", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count (default 3)")
    parser.add_argument("--plot", type=Path, help="draw the curves into this PNG")
    options = parser.parse_args(arguments)
    curves = measure(options.rounds)
    for line in table(curves):
        say(line)
    sys.stdout.write(f"load average at the end: {os.getloadavg()[0]:.1f}\n")
    if options.plot:
        plot(curves, options.plot)
        sys.stdout.write(f"plot: {options.plot}\n")


if __name__ == "__main__":
    main()
