"""Whole runs of the tiny model, side by side on one card: every strategy, resumed and compared, and two ranks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi3_dist.bench.card.checks import say
from phi3_dist.config.shipped_files import shipped_file

__all__ = ["Run", "Runner", "run_all", "runs_of"]

STRATEGIES = ("ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp2", "fsdp2_offload")
TWO_RANKS = ("ddp", "zero2", "zero3", "fsdp2", "fsdp2_offload")
STEPS, SAVED = 8, 4
COMMON = (f"train.max_steps={STEPS}", f"save.every={SAVED}", "log.trackers=[]", "optim.lr=0.001", "train.micro_batch=1")
EXACT = ("model.precision=fp32", "lora.dropout=0.0")
BF16 = ("model.precision=bf16",)


@dataclass
class Run:
    """One run: its Accelerate config or None, ranks, overrides, and the run whose losses it should give."""

    name: str
    config: str | None
    overrides: tuple[str, ...]
    ranks: int = 1
    like: str = ""
    resumed: bool = False
    process: Any = field(default=None, repr=False)
    began_s: float = 0.0


def runs_of(base: Path, *, cpu: bool) -> list[Run]:
    """Every run that this device can make."""
    found = [
        Run("single fp32", None, EXACT),
        Run("single bf16", None, BF16),
        Run("single bf16 checkpointing", None, (*BF16, "model.activation_checkpointing=true"), like="single bf16"),
        Run("single bf16 compiled", None, (*BF16, "model.compile=true"), like="single bf16"),
        Run("two ranks fsdp2 fp32", "cpu_2" if cpu else "fsdp2", EXACT, 2, "single fp32"),
        Run("adamw_8bit", None, (*BF16, "optim.name=adamw_8bit", f"model.source={base}")),
        Run("nf4 single", None, (*BF16, "model.quantization=nf4", f"model.source={base}")),
    ]
    if cpu:
        return found
    found += [Run(f"{config} fp32", config, EXACT, 1, "single fp32") for config in STRATEGIES]
    found += [Run(f"{config} bf16", config, BF16, 1, "single bf16") for config in ("zero1", "zero2", "zero3", "fsdp2")]
    for config in ("zero2", "zero3", "zero3_offload", "fsdp2"):
        quantized = (*BF16, "model.quantization=nf4", f"model.source={base}")
        found.append(Run(f"nf4 {config}", config, quantized, 1, "nf4 single"))
    found.append(Run("int8 single", None, (*BF16, "model.quantization=int8", f"model.source={base}")))
    for name in ("paged_adamw_32bit", "paged_adamw_8bit"):  # a rank whose A and B are large enough to be paged
        found.append(Run(name, None, (*BF16, f"optim.name={name}", f"model.source={base}", "lora.r=256")))
    found.append(Run("fp8 single", None, (*BF16, "model.fp8=true", f"model.source={base}")))
    found += [Run(f"two ranks {c} fp32", c, EXACT, 2, "single fp32") for c in TWO_RANKS if c != "fsdp2"]
    return found


@dataclass
class Runner:
    """Starts runs, `parallel` at a time, and says a line for each."""

    repo: Path
    out: Path
    cpu: bool
    limit_s: float
    parallel: int
    until_s: float

    def folder(self, run: Run) -> Path:
        return self.out / "runs" / run.name.replace(" ", "_")

    def log(self, run: Run) -> Path:
        return self.out / f"{run.name.replace(' ', '_')}{'_again' if run.resumed else ''}.log"

    def command(self, run: Run) -> list[str]:
        module = "phi3_dist.bench.card.one_card" if run.ranks > 1 and not self.cpu else "phi3_dist"
        start = [sys.executable]
        if run.config:
            start += ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
            start += [str(shipped_file(f"configs/accelerate/{run.config}.yaml")), "--num_processes", str(run.ranks)]
            start += ["--main_process_port", "0"]
        again = "--resume" if run.resumed else "--overwrite"
        rows = shipped_file("configs/run/debug_chats.jsonl")
        words = ["-m", module, "train", str(shipped_file("configs/run/debug.yaml")), f"data.train={rows}"]
        words += [*COMMON, *run.overrides]
        return [*start, *words, f"save.folder={self.folder(run)}", again]

    def start(self, run: Run) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        if self.cpu:
            env["CUDA_VISIBLE_DEVICES"] = ""
        with self.log(run).open("w") as log:
            run.process = subprocess.Popen(
                self.command(run), cwd=self.repo, env=env, stdout=log, stderr=log, start_new_session=True
            )
        run.began_s = time.monotonic()

    def losses(self, run: Run) -> list[float]:
        try:
            lines = (self.folder(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        return [row["loss"] for row in map(json.loads, lines) if row["kind"] == "train"]

    def finish(self, run: Run) -> None:
        left_s = max(1.0, self.limit_s - (time.monotonic() - run.began_s))
        try:
            code: int | str = run.process.wait(timeout=left_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGKILL)
            code = "killed at its limit"
        text = self.log(run).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        row: dict[str, Any] = {"ok": code == 0, "losses": [round(x, 5) for x in self.losses(run)[-3:]]}
        if code != 0:
            row |= {"code": code, "tail": text[-14:]}
        row["s"] = round(time.monotonic() - run.began_s, 1)
        row["said"] = [line for line in text if line.startswith(("attention:", "note:", "compile:"))][:4]
        say(self.out, group="runs", check=run.name + (" resumed" if run.resumed else ""), **row)

    def all(self, runs: Iterable[Run]) -> list[Run]:
        """Run them, each started when another has ended; those for which no time is left are said."""
        waiting = list(runs)
        going: list[Run] = []
        done: list[Run] = []
        while waiting or going:
            while waiting and len(going) < self.parallel:
                run = waiting.pop(0)
                if time.monotonic() > self.until_s:
                    say(self.out, group="runs", check=run.name, ok=None, skipped="no time left")
                    continue
                self.start(run)
                going.append(run)
            ended = [r for r in going if r.process.poll() is not None or time.monotonic() - r.began_s > self.limit_s]
            for run in ended:
                self.finish(run)
                going.remove(run)
                done.append(run)
            time.sleep(0.05)
        return done

    def interrupt(self, run: Run) -> bool:
        """Take away what came after the first checkpoint, as if the run had been killed. False where there is none."""
        folder = self.folder(run)
        if not (folder / "checkpoints" / f"step_{SAVED:06d}").is_dir():
            return False
        shutil.rmtree(folder / "checkpoints" / f"step_{STEPS:06d}", ignore_errors=True)
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        (folder / "exit.json").unlink(missing_ok=True)
        return True


def _differ(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def run_all(runner: Runner, runs: list[Run]) -> None:
    """Each run, what it should equal, and each again from its checkpoint of step 4 with the same losses."""
    runner.all(runs)
    before = {run.name: runner.losses(run) for run in runs}
    for run in runs:
        ours, theirs = before[run.name], before.get(run.like, [])
        if run.like and ours and len(ours) == len(theirs):
            differ, limit = _differ(ours, theirs), 1e-3 if "fp32" in run.name else 2e-2
            say(runner.out, group="runs", check=f"{run.name} against {run.like}", ok=differ < limit, largest=differ)
    again = [Run(r.name, r.config, r.overrides, r.ranks, resumed=True) for r in runs if runner.interrupt(r)]
    for run in runner.all(again):
        ours, theirs = runner.losses(run), before[run.name]
        same = len(ours) == len(theirs) == STEPS
        facts: dict[str, Any] = {"largest": _differ(ours, theirs)} if same else {"rows": [len(ours), len(theirs)]}
        ok = same and facts["largest"] < 1e-4
        say(runner.out, group="runs", check=f"{run.name}: resumed", ok=ok, bit_for_bit=ours == theirs, **facts)
