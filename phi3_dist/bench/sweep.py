"""A sweep beside its candidates one after the other: wall time with start-up, tokens a second, peak memory.

    python -m phi3_dist.bench.sweep [--candidates 8] [--lengths 256 1024] [--rounds 3] [--halving]

In each round the sweep runs as one process, and then each candidate as `phi3-dist train` does alone; all from prepared
data, on the same random base in float32. Steps, start, held-out losses and saving are what a user waits for. Memory is
the largest resident set of a process. With `--halving` a sweep that ends the worse half at steps 8, 16 and 32 of 64
runs beside the same sweep without, and nothing else. With `--gpu` all is in bf16 on one GPU, on a larger base, and
memory is what `nvidia-smi` shows above what was in use before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from shutil import which
from typing import Any

import yaml

from phi3_dist.bench.console import say
from phi3_dist.bench.load import write_base
from phi3_dist.machine.print_encoding import print_in_any_encoding

__all__ = ["main", "sweep_files"]


def _rows(file: Path, length: int, count: int) -> None:
    """Chats of text whose tokens nearly fill a pack each, a byte a token."""
    words = "the quick brown fox jumps over a lazy dog while seven wizards box "
    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            text = (f"{number} " + words * (length // 8))[: length // 2 - 24]
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]
            out.write(json.dumps({"messages": messages}) + "\n")


def _used_mib() -> float:
    """MiB of the first GPU that are in use. Raises OSError without nvidia-smi."""
    query = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout)


class _DevicePeak:
    """The most MiB of the first GPU that were in use, above those before, while the block runs."""

    mib = 0.0

    def __enter__(self) -> _DevicePeak:
        self._before, self._ended = _used_mib(), threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            self.mib = max(self.mib, _used_mib() - self._before)

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._watcher.join()


def _run(words: list[str], threads: int, *, gpu: bool = False) -> tuple[float, float]:
    """Wall seconds of a command that must succeed, and its peak in MiB: of resident memory, or of the GPU's."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    env |= {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    start = time.perf_counter()
    with _DevicePeak() if gpu else nullcontext() as device:
        process = subprocess.Popen(
            [sys.executable, "-m", "phi3_dist", *words], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        with process.stderr as errors:
            said = errors.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(said.decode(errors="replace")[-2000:])
    return time.perf_counter() - start, usage.ru_maxrss / 1024 if device is None else device.mib


def sweep_files(
    folder: Path,
    base: Path,
    length: int,
    steps: int,
    candidates: int,
    *,
    batch: int = 1,
    held_out: bool = True,
    precision: str = "fp32",
) -> tuple[Path, list[Path]]:
    """The sweep file, and a run file for each candidate. `batch`: packs of a step."""
    _rows(folder / "rows.jsonl", length, 4 * steps * batch)
    run: dict[str, Any] = {
        "model": {"source": str(base), "tokenizer": "tiny-random", "precision": precision},
        "data": {"train": str(folder / "rows.jsonl"), "pack_length": length, "cache": str(folder / "cache")},
        "lora": {"r": 16, "alpha": 32, "dropout": 0.0},
        "train": {"max_steps": steps, "global_batch": batch, "micro_batch": 1},
        "save": {"every": 0, "folder": str(folder / "sweep")},
        "log": {"trackers": []},
    }
    if not held_out:
        run["data"]["validation_share"] = 0.0
    rates = [1e-4 * 1.5**number for number in range(candidates)]
    together = folder / "together.yaml"
    together.write_text(yaml.safe_dump({**run, "sweep": {"axes": {"optim.lr": rates}}}))
    alone = []
    for number, rate in enumerate(rates):
        file = folder / f"alone_{number}.yaml"
        save = {"every": 0, "folder": str(folder / f"alone_{number}")}
        file.write_text(yaml.safe_dump({**run, "save": save, "optim": {"lr": rate}}))
        alone.append(file)
    return together, alone


def _measure(folder: Path, base: Path, length: int, args: argparse.Namespace) -> dict[str, Any]:
    precision = "bf16" if args.gpu else "fp32"
    together, alone = sweep_files(folder, base, length, args.steps, args.candidates, precision=precision)
    _run(["prepare", str(alone[0])], args.threads)
    rounds = []
    for _ in range(args.rounds):
        joint_s, joint_mib = _run(["sweep", str(together), "--overwrite"], args.threads, gpu=args.gpu)
        singles = [_run(["train", str(file), "--overwrite"], args.threads, gpu=args.gpu) for file in alone]
        rounds.append((joint_s, joint_mib, sum(s for s, _ in singles), max(mib for _, mib in singles)))
    joint_s, joint_mib, alone_s, alone_mib = (statistics.median(values) for values in zip(*rounds, strict=True))
    ratios = [one[0] / one[2] for one in rounds]
    return {
        "pack_length": length,
        "candidates": args.candidates,
        "steps": args.steps,
        "together_s": round(joint_s, 1),
        "one_by_one_s": round(alone_s, 1),
        "share_of_time": round(statistics.median(ratios), 3),
        "share_of_time_rounds": [round(ratio, 3) for ratio in ratios],
        "together_mib": round(joint_mib),
        "one_run_mib": round(alone_mib),
        "share_of_memory": round(joint_mib / alone_mib, 3),
    }


def _measure_halving(folder: Path, base: Path, length: int, args: argparse.Namespace) -> dict[str, Any]:
    """A sweep of eight held-out losses beside one that halves at the first, second and fourth of them."""
    steps, every = 64, 8
    precision = "bf16" if args.gpu else "fp32"
    whole, alone = sweep_files(folder, base, length, steps, args.candidates, precision=precision)
    values = yaml.safe_load(whole.read_text())
    values["train"]["eval_every"] = every
    whole.write_text(yaml.safe_dump(values))
    halved = folder / "halved.yaml"
    values["save"]["folder"] = str(folder / "halved")
    halved.write_text(yaml.safe_dump({**values, "sweep": {**values["sweep"], "early": {"rule": "halving"}}}))
    _run(["prepare", str(alone[0])], args.threads)
    rounds = [
        [_run(["sweep", str(file), "--overwrite"], args.threads, gpu=args.gpu)[0] for file in (whole, halved)]
        for _ in range(args.rounds)
    ]
    return {
        "pack_length": length,
        "candidates": args.candidates,
        "steps": steps,
        "to_the_end_s": round(statistics.median(one for one, _ in rounds), 1),
        "with_halving_s": round(statistics.median(other for _, other in rounds), 1),
        "share_of_time_rounds": [round(other / one, 3) for one, other in rounds],
    }


def main(arguments: list[str] | None = None) -> None:
    """Print one line of JSON for each pack length."""
    print_in_any_encoding()
    parser = argparse.ArgumentParser(prog="python -m phi3_dist.bench.sweep", description=__doc__)
    parser.add_argument("--candidates", type=int, default=8, help="candidates (default 8)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024], help="tokens of a pack")
    parser.add_argument("--steps", type=int, default=20, help="steps of each candidate (default 20)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--halving", action="store_true", help="measure what ending weak candidates early saves")
    parser.add_argument("--gpu", action="store_true", help="on the first GPU, in bf16")
    parser.add_argument("--layers", type=int, help="decoder layers of the base (default 6; with --gpu 8)")
    parser.add_argument("--hidden", type=int, help="width of the base (default 576; with --gpu 2048)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of a process")
    args = parser.parse_args(arguments)
    if args.gpu and which("nvidia-smi") is None:
        parser.error("--gpu reads the GPU's memory from nvidia-smi, which is not on the path")
    with tempfile.TemporaryDirectory(prefix="sweep_") as name:
        base = Path(name) / "base"
        layers, hidden = (8, 2048) if args.gpu else (6, 576)
        write_base(base, layers=args.layers or layers, hidden=args.hidden or hidden, shard="1GB")
        for length in args.lengths:
            folder = Path(name) / str(length)
            folder.mkdir()
            measured = _measure_halving if args.halving else _measure
            say(json.dumps(measured(folder, base, length, args)))


if __name__ == "__main__":
    main()
