"""Real tokens per second of a LoRA step: this project's beside TRL's best setting and plain PEFT, taking turns.

    python -m phi3_dist.bench.throughput

Each side is a process that loads the same random Phi-3 (61 M parameters, head size 96 as in mini) and trains LoRA r=16
on every linear layer in float32 on the CPU, from the same ragged rows in packs of 1,024 tokens. In each round one
passes over all rows, then the next; the first round is warm-up and not counted. TRL's side is `SFTTrainer` with
best-fit packing, which implies padding-free batches, and its default loss, which computes logits in chunks. PEFT's side
is a loop of a few lines over this project's packs. No side compiles anything.

The share of the matrix rate counts what a LoRA step needs (see `step_flops`), whatever a side really computes, against
the products of the base's linear layers alone, timed in this project's process at the start of each round: by the
clock, and by processor time, which other work on the machine hardly changes. Memory is the peak of a process's
resident set in a round, less what it was before the model was loaded and less the weights.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from phi3_dist.bench.console import say
from phi3_dist.bench.throughput_sides import (
    LORA_RANK,
    PACK_LENGTH,
    SHAPE,
    Round,
    linear_sizes,
    save_base,
    train_ours,
    train_peft,
    train_trl,
)
from phi3_dist.machine.print_encoding import print_in_any_encoding
from phi3_dist.machine.probe import cpu_count

__all__ = ["ask", "main", "make_rows", "side_process", "step_flops"]


def make_rows(count: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """Ragged chat rows: random token ids, and where the answer begins.

    Lengths are the quantiles of a log-normal distribution, 220 tokens on average whatever the count, cut to 24 …
    1,000: many short rows, a few long ones, as in chat sets. The answer is 30 to 70 % of a row, and alone supervised.
    """
    random = np.random.default_rng(seed)
    spread = 0.7
    normal = statistics.NormalDist(math.log(220) - spread**2 / 2, spread)
    quantiles = [math.exp(normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    lengths = random.permutation(np.clip(quantiles, 24, 1000).astype(int))
    rows = []
    for length in lengths:
        ids = random.integers(3, 32000, length).tolist()
        rows.append((ids, int(length * random.uniform(0.3, 0.7))))
    return rows


def step_flops(lengths: list[int], supervised_tokens: int, shape: Mapping[str, Any] = SHAPE) -> float:
    """What LoRA on every linear layer needs at least for documents of these lengths, forward and backward.

    A frozen weight: 2 FLOPs a token forward, 2 for the input's gradient, which the first layer's qkv_proj does not
    need. An adapter weight: 6. The head: 4 a supervised token. Causal attention: half of 4·S²·h forward and of 10·S²·h
    backward.
    """
    sizes, layers = linear_sizes(shape), int(shape["num_hidden_layers"])
    hidden, vocab, tokens = int(shape["hidden_size"]), int(shape["vocab_size"]), sum(lengths)
    base = 4 * tokens * layers * sum(i * o for i, o in sizes) - 2 * tokens * sizes[0][0] * sizes[0][1]
    lora = 6 * tokens * layers * sum(LORA_RANK * (i + o) for i, o in sizes)
    head = 4 * supervised_tokens * hidden * vocab
    attention = 7 * sum(length**2 for length in lengths) * hidden * layers
    return float(base + lora + head + attention)


# --- the process that gives them turns --------------------------------------------------------------------------------


def _side(worker: Callable[..., None], log: Path, pipe: Connection, threads: int, *arguments: Any) -> None:
    """A worker whose libraries chatter into a file. On the CPU, but where `threads` is 0."""
    if threads:
        os.environ.update({"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""})  # before torch is imported
    os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        worker(pipe, *arguments)


@contextmanager
def side_process(worker: Callable[..., None], threads: int, folder: Path, *arguments: Any) -> Iterator[Connection]:
    """A process of its own for one side, ended with the block. Raises RuntimeError with its output where it failed."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    handle, name = tempfile.mkstemp(".log", f"{worker.__name__}_", folder.parent)
    os.close(handle)
    log = Path(name)
    process = context.Process(target=_side, args=(worker, log, there, threads, folder, *arguments), daemon=True)
    process.start()
    there.close()
    try:
        yield here
        here.send("stop")
        process.join(timeout=30)
    except (EOFError, BrokenPipeError) as error:
        process.join(timeout=5)
        if process.exitcode is None:
            raise  # another side's pipe broke
        output = log.read_text(errors="replace")[-3000:]
        raise RuntimeError(f"{worker.__name__} ended with exit code {process.exitcode}:\n{output}") from error
    finally:
        process.kill()


def ask(pipe: Connection, command: str) -> Any:
    pipe.send(command)
    return pipe.recv()


@dataclass(frozen=True)
class _Result:
    """Rounds that count, by side; the matrix rates at the start of each; the sides' parameter counts; other load.

    `others` is the load average of the last minute less this benchmark's own threads, at the end of each round.
    """

    rounds: dict[str, list[Round]]
    rates: list[tuple[float, float]]
    facts: dict[str, dict[str, int]]
    threads: int
    others: list[float]


def _run(rows: list[tuple[list[int], int]], rounds: int, threads: int, *, with_trl: bool) -> _Result:
    workers = {"ours": train_ours, "peft": train_peft, **({"trl": train_trl} if with_trl else {})}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name) / "base"
        with side_process(save_base, threads, folder) as maker:
            maker.recv()
        sides, facts = {}, {}
        for side, worker in workers.items():
            sides[side] = stack.enter_context(side_process(worker, threads, folder, rows))
            facts[side] = sides[side].recv()
        return _take_turns(sides, facts, rounds, threads)


def _take_turns(sides: dict[str, Connection], facts: dict[str, dict[str, int]], rounds: int, threads: int) -> _Result:
    rates, others, found = [], [], {name: [ask(pipe, "round")] for name, pipe in sides.items()}
    for number in range(rounds):
        rates.append(ask(sides["ours"], "rate"))
        turns = list(sides.items())
        for name, pipe in turns if number % 2 == 0 else reversed(turns):
            found[name].append(ask(pipe, "round"))
        others.append(max(os.getloadavg()[0] - threads, 0.0))
    ours = found["ours"][0]
    for done in found.values():
        if (done[0].tokens, done[0].supervised_tokens) != (ours.tokens, ours.supervised_tokens):
            raise RuntimeError(f"the sides do not train the same tokens: {ours} and {done[0]}")
    return _Result({name: done[1:] for name, done in found.items()}, rates, facts, threads, others)


def _names(result: _Result) -> dict[str, str]:
    names = {"ours": "phi3_dist", "peft": f"PEFT {metadata.version('peft')} in a plain loop, the same packs"}
    if "trl" in result.rounds:
        names["trl"] = f"TRL {metadata.version('trl')}, bfd packing, padding-free, chunked loss"
    return names


def _report(result: _Result, rows: list[tuple[list[int], int]], say: Callable[[str], None]) -> dict[str, Any]:
    lengths = [len(ids) for ids, _ in rows]
    first = result.rounds["ours"][0]
    flops = step_flops(lengths, first.supervised_tokens)
    clock, cpu = (statistics.median(rates) for rates in zip(*result.rates, strict=True))
    say(
        f"random Phi-3, {result.facts['ours']['parameters'] / 1e6:.1f} M parameters with LoRA r={LORA_RANK} on every "
        f"linear layer ({result.facts['ours']['trainable'] / 1e6:.2f} M trained), float32, "
        f"{result.threads} of {os.cpu_count()} CPUs"
    )
    say(
        f"{len(rows)} rows, {sum(lengths):,} tokens (mean {statistics.mean(lengths):.0f}), "
        f"{first.supervised_tokens:,} supervised; packs of {PACK_LENGTH:,}; {len(result.rates)} rounds after a warm-up"
    )
    say(
        f"matrix rate: {clock / 1e9:.1f} GFLOP/s (median over the rounds), {cpu / 1e9:.1f} by processor time; "
        f"others' load: {statistics.median(result.others):.1f} processes"
    )
    say(f"{'':<58} {'tok/s':>7} {'lowest … highest':>18} {'of matrix rate':>14} {'by CPU':>7} {'peak MiB':>9}")
    figures: dict[str, Any] = {"matrix_flops_per_s": result.rates, "others": result.others}
    names = _names(result)
    for name, done in result.rounds.items():
        speeds = [one.tokens_per_s for one in done]
        paired = list(zip(done, result.rates, strict=True))
        share = statistics.median(flops / one.seconds / rate for one, (rate, _) in paired)
        cpu_share = statistics.median(flops / max(one.cpu_seconds, 1e-9) / rate for one, (_, rate) in paired)
        peak_mib = max(one.peak_mib for one in done)
        spread = f"{min(speeds):.0f} … {max(speeds):.0f}"
        shares = f"{share:14.0%} {cpu_share:7.0%}"
        say(f"{names[name]:<58} {statistics.median(speeds):7.0f} {spread:>18} {shares} {peak_mib:9.0f}")
        figures[name] = {
            "tokens_per_s": statistics.median(speeds),
            "share": share,
            "cpu_share": cpu_share,
            "peak_mib": peak_mib,
        }
        figures[name]["rounds"] = [asdict(one) for one in done]
    _compare(result, names, figures, say)
    return figures


def _compare(result: _Result, names: dict[str, str], figures: dict[str, Any], say: Callable[[str], None]) -> None:
    ours = result.rounds["ours"]
    figures["ratios"] = {}
    for peer, done in result.rounds.items():
        if peer == "ours":
            continue
        ratios = [mine.tokens_per_s / theirs.tokens_per_s for mine, theirs in zip(ours, done, strict=True)]
        memory = figures["ours"]["peak_mib"] / figures[peer]["peak_mib"]
        figures["ratios"][peer] = statistics.median(ratios)
        each = "  ".join(f"{ratio:.2f}" for ratio in ratios)
        say(f"beside {names[peer]}: speed {statistics.median(ratios):.2f} ({each}), peak memory {memory:.2f}")
    if "trl" in result.rounds:
        figures["ratio"] = figures["ratios"]["trl"]
        say(f"ratio to the best peer: {figures['ratio']:.2f}")


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print its table; `--json FILE` also writes its figures."""
    print_in_any_encoding()
    parser = argparse.ArgumentParser(prog="python -m phi3_dist.bench.throughput", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--rows", type=int, default=36, help="rows of a round (default 36, about 8,000 tokens)")
    parser.add_argument("--threads", type=int, default=cpu_count(), help="threads of a side (default: all CPUs)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    rows = make_rows(options.rows)
    with_trl = find_spec("trl") is not None
    figures = _report(_run(rows, options.rounds, options.threads, with_trl=with_trl), rows, say)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    if not with_trl:
        say("TRL is not installed, so there is no peer to compare with: pip install 'phi3-dist[bench]'")
        sys.exit(1)


if __name__ == "__main__":
    main()
