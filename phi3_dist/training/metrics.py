"""What a person sees of a run: a progress line, metrics.jsonl, and any of Accelerate's trackers."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from phi3_dist.errors import plain, redacted
from phi3_dist.machine.terminal import unfailing

__all__ = ["Metrics", "Tracker"]


class Tracker(Protocol):
    """The part of an Accelerator that hands numbers to trackers."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None: ...


class Metrics:
    """Rows of metrics.jsonl, one line each, and a progress bar where stdout is a terminal, plain lines elsewhere.

    On ranks other than 0 every method does nothing. The bar is drawn by the training loop itself and by no thread,
    so that a `breakpoint()` in a single-process run has the terminal to itself.
    """

    def __init__(self, path: Path, total: int, tracker: Tracker, *, active: bool) -> None:
        self.active, self.total, self.tracker = active, total, tracker
        self.started = time.perf_counter()
        self.console = Console(file=cast(IO[str], unfailing(sys.stdout)), highlight=False, soft_wrap=True)
        self._path, self._told = path, False
        self._file = path.open("a", encoding="utf-8") if active else None
        self._progress: Progress | None = None
        if active and self.console.is_terminal:
            # a bar only where there is room for one beside the numbers
            bar = [BarColumn(bar_width=20)] if self.console.width >= 100 else []
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                *bar,
                TextColumn("{task.description}  left", table_column=Column(no_wrap=True)),
                TimeRemainingColumn(compact=True),
                console=self.console,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Metrics:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._tell(error)

    def say(self, text: str) -> None:
        """One line to the person, on rank 0."""
        if not self.active:
            return
        (self._progress.console if self._progress is not None else self.console).print(
            plain(redacted(text)), markup=False
        )

    def _tell(self, error: OSError) -> None:
        if not self._told:
            self.say(f"{self._path.name}: rows can't be written now: {error.strerror or error}; training goes on")
        self._told = True

    def _write(self, row: dict[str, Any]) -> None:
        """A disk that is full or gone is told once and ends no training. Rows wait in the file's buffer for room."""
        assert self._file is not None
        kind = row["kind"]
        values = {f"{kind}/{k}": v for k, v in row.items() if k not in {"kind", "step"} and isinstance(v, (int, float))}
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            self.tracker.log(values, step=row["step"])
        except OSError as error:
            self._tell(error)

    def train(self, row: dict[str, Any]) -> None:
        """A row of kind `train`: see the keys in loop.py. `elapsed_s` is added."""
        if not self.active:
            return
        row = {"kind": "train", **row, "elapsed_s": round(time.perf_counter() - self.started, 3)}
        self._write(row)
        loss, speed = f"loss {row['loss']:.4f}  lr {row['lr']:.2e}", f"{row['supervised_tokens_per_s']:,.0f}"
        if self._progress is not None:
            text = f"{loss}  {speed} supervised tok/s"
            self._progress.update(self._task, completed=row["step"], description=text, refresh=True)
            return
        text = f"{loss}  |g| {row['grad_norm']:.3f}  {speed} supervised tok/s"
        done, elapsed = row["step"], row["elapsed_s"]
        left = elapsed / done * (self.total - done)
        self.say(f"step {done}/{self.total}  {text}  left {left:.0f} s")

    def note(self, kind: str, row: dict[str, Any]) -> None:
        """A row of another kind: `skipped` and `spike` (training/health.py), `saves` (training/saving.py)."""
        if self.active:
            self._write({"kind": kind, **row})

    def save(self, row: dict[str, Any]) -> None:
        """A row of kind `save`: how long training stood still, and for how many bytes."""
        if self.active:
            self._write({"kind": "save", **row})

    def evaluation(self, row: dict[str, Any]) -> None:
        """A row of kind `eval`."""
        if not self.active:
            return
        self._write({"kind": "eval", **row})
        self.say(
            f"held-out loss {row['heldout_loss']:.4f} (perplexity {row['heldout_perplexity']:.2f}) "
            f"after step {row['step']}, {row['supervised_tokens']:,} supervised tokens, {row['eval_s']:.1f} s"
        )
