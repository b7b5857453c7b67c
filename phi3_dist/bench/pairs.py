"""Two settings of the run file's section `model`, beside each other: the time of a pass over the same packs, in turns.

    python -m phi3_dist.bench.pairs compile=true
    python -m phi3_dist.bench.pairs dequantized_layers=6 --both quantization=nf4 --both dequantized_layers=0

Both models live in one process on the CPU, in float32, on the rows of the throughput benchmark (see throughput.py): two
processes with equal settings differed by up to 3 % here, for as long as they lived. The first pass of each is not
counted and told apart: it compiles. The ratio is the median over the pairs, by processor time, which other work on the
machine hardly changes, and by the clock.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import yaml

from phi3_dist.bench.console import say
from phi3_dist.bench.throughput import make_rows, side_process
from phi3_dist.bench.throughput_sides import Round, Stand, make_token_packs, save_base
from phi3_dist.machine.print_encoding import print_in_any_encoding
from phi3_dist.machine.probe import cpu_count

__all__ = ["lines_of", "main", "settings", "take_turns"]


def settings(pairs: list[str]) -> dict[str, Any]:
    """`key=value` as fields of the section `model`, each value read as YAML."""
    return {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in pairs)}


def take_turns(
    pipe: Connection, folder: Path, rows: list[tuple[list[int], int]], models: list[dict[str, Any]], pairs: int
) -> None:
    """Send what was chosen for each of two models, then each pass of both as a pair of `Round`s, the first included."""
    stands, packs = [Stand(folder, model={"precision": "fp32", **model}) for model in models], make_token_packs(rows)
    pipe.send([[f"{choice.name}: {choice.value} ({choice.why})" for choice in stand.choices] for stand in stands])
    for number in range(pairs + 1):
        done: list[Any] = [None, None]
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            done[which] = stands[which].round(packs)
        pipe.send(done)
    pipe.recv()


def lines_of(pairs: list[list[Round]]) -> list[str]:
    """First passes, medians of the others, and the ratios of the second model to the first."""
    lines = []
    for name, (first, *others) in zip(("without", "with"), zip(*pairs, strict=True), strict=True):
        median = statistics.median(one.cpu_seconds for one in others)
        lines.append(f"{name:<8} first pass {first.seconds:.1f} s, then {median:.2f} s of processor time")
    for word, field in (("processor time", "cpu_seconds"), ("the clock", "seconds")):
        ratios = [getattr(b, field) / getattr(a, field) for a, b in pairs[1:]]
        low, middle, high = statistics.quantiles(ratios, n=4)
        below = sum(ratio < 1 for ratio in ratios)
        spread = f"half of the pairs in {low:.3f} … {high:.3f}, {below} of {len(ratios)} below 1"
        lines.append(f"with / without by {word}: {middle:.3f} ({spread})")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    print_in_any_encoding()
    parser = argparse.ArgumentParser(prog="python -m phi3_dist.bench.pairs", description=__doc__)
    parser.add_argument("setting", nargs="+", help="key=value of the section model, for the second model")
    parser.add_argument("--both", action="append", default=[], help="key=value for both models")
    parser.add_argument("--pairs", type=int, default=20, help="pairs that count (default 20)")
    parser.add_argument("--rows", type=int, default=10, help="rows of a pass (default 10, about 2,000 tokens)")
    parser.add_argument("--threads", type=int, default=cpu_count(), help="threads (default: all CPUs)")
    options = parser.parse_args(arguments)
    rows, both = make_rows(options.rows), settings(options.both)
    models = [both, {**both, **settings(options.setting)}]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "base"
        with side_process(save_base, options.threads, folder) as maker:
            maker.recv()
        with side_process(take_turns, options.threads, folder, rows, models, options.pairs) as pipe:
            plain, other = pipe.recv()
            for line in (line for line in other if line not in plain):
                say(line)
            found = [pipe.recv() for _ in range(options.pairs + 1)]
    for line in lines_of(found):
        say(line)


if __name__ == "__main__":
    main()
