"""The rate of `prepare` beside that of `tokenizers.encode_batch` on the same rows.

    python -m phi3_dist.bench.prepare [--tokenizer FOLDER] [--source ROWS.jsonl]

`encode_batch` gets the rendered texts from memory and its result is thrown away; `prepare` reads the file, checks and
renders each row, tokenizes, masks, and writes and packs the cache. Both once with one thread of the tokenizer (while
that works, `prepare` reads and renders in another) and once with a thread for each core, where `prepare` has once one
process and once one for each core. Timed in turns; the last line is the smaller ratio of the medians, above 1 where
`prepare` is faster, with as many processes as `phi3-dist prepare` has by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from phi3_dist.data.cache.block_files import workers_for
from phi3_dist.machine.print_encoding import print_in_any_encoding
from phi3_dist.machine.probe import cpu_count

__all__ = ["main"]

ROUNDS = 5
TIMEOUT_S = 900
TEXT = "the a river stone walks slowly under seven old bridges while children count 42 boats and sing, then rest."


def main() -> None:
    """Time both ways in turns, each in a process of its own, and print the ratios."""
    print_in_any_encoding()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", default="tiny-random", help="folder or hub id of a tokenizer")
    parser.add_argument("--source", help="rows to prepare; made up where left out")
    parser.add_argument("--rows", type=int, default=20000, help="rows to make up")
    parser.add_argument("--one", choices=("prepare", "encode_batch"), help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(_one(options.one, options.tokenizer, Path(options.source), options.workers)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(options.source) if options.source else _made_up(Path(scratch) / "rows.jsonl", options.rows)
        cores = cpu_count()
        ratios = []
        for threads in sorted({1, cores}):
            rates: dict[int, list[float]] = {workers: [] for workers in (0, *sorted({1, threads}))}
            for _ in range(ROUNDS):
                for workers, found in rates.items():
                    found.append(_start(options.tokenizer, source, workers, threads))
            medians = {workers: statistics.median(found) for workers, found in rates.items()}
            theirs = medians.pop(0)
            sys.stdout.write(f"{threads} thread(s): encode_batch {theirs:,.0f} rows/s\n")
            for workers, ours in medians.items():
                sys.stdout.write(f"  prepare, {workers} process(es): {ours:,.0f} rows/s, ratio {ours / theirs:.2f}\n")
            ratios.append(medians[workers_for(threads)] / theirs)
    sys.stdout.write(f"{min(ratios):.2f}\n")


def _start(tokenizer: str, source: Path, workers: int, threads: int) -> float:
    """Rows a second of `prepare`, or of `encode_batch` (no workers), in a fresh process: it counts its threads once."""
    command = [sys.executable, "-m", "phi3_dist.bench.prepare", "--workers", str(workers)]
    command += ["--one", "prepare" if workers else "encode_batch", "--tokenizer", tokenizer, "--source", str(source)]
    counted = {"TOKENIZERS_PARALLELISM": str(threads > 1).lower(), "RAYON_NUM_THREADS": str(threads)}
    done = subprocess.run(
        command, env={**os.environ, **counted}, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def _one(way: str, name: str, source: Path, workers: int) -> float:
    from phi3_dist.config.schema import DataConfig
    from phi3_dist.data.blocks import read_chats
    from phi3_dist.data.prepare import prepare
    from phi3_dist.data.render.fast_template import Renderer
    from phi3_dist.family.variants import TINY_RANDOM
    from phi3_dist.modeling.tokenizer import load_tokenizer, tiny_tokenizer

    tokenizer = tiny_tokenizer() if name == TINY_RANDOM else load_tokenizer(name, None)
    cfg = DataConfig(train=str(source), validation_share=0, pack_length=4096, on_bad_row="skip", on_long_row="drop")
    if way == "prepare":
        with tempfile.TemporaryDirectory() as cache:
            began = time.perf_counter()
            rows = len(prepare(cfg, tokenizer, Path(cache), workers=workers).train.rows)
            return rows / (time.perf_counter() - began)
    chats = read_chats(cfg).train
    turns = [[{"role": m.role, "content": m.content} for m in chat.messages] for chat in chats]
    texts = Renderer(tokenizer).texts(turns)
    del chats, turns
    began = time.perf_counter()
    tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return len(texts) / (time.perf_counter() - began)


def _made_up(path: Path, n: int) -> Path:
    words = TEXT.split()
    with path.open("w", encoding="utf-8") as file:
        for i in range(n):
            question, answer = (" ".join(words[(i * k + j) % len(words)] for j in range(60)) for k in (3, 7))
            file.write(json.dumps({"prompt": f"{i}: {question}", "completion": answer}) + "\n")
    return path


if __name__ == "__main__":
    main()
