"""What a person sees of a run: a progress line, metrics.jsonl, and any of Accelerate's trackers."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from phi3_dist.errors import Problem, RunFolderError, plain, redacted
from phi3_dist.machine.terminal import unfailing

__all__ = ["Metrics", "Tracker"]


_SHOW_S, _SAY_S = 0.5, 15.0
"""Seconds between two signs of how far an evaluation is: in a bar, and in a log."""


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _in_json(row: dict[str, Any]) -> dict[str, Any]:
    """The row with null in the place of numbers that are none: JSON has no word for them."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


class Tracker(Protocol):
    """The part of an Accelerator that hands numbers to trackers."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None: ...


class Metrics:
    """Rows of metrics.jsonl, one line each, and a progress bar where stdout is a terminal, plain lines elsewhere.

    On ranks other than 0 every method does nothing. The bar is drawn by the training loop itself and by no thread,
    so that a `breakpoint()` in a single-process run has the terminal to itself.
    """

    def __init__(
        self, path: Path, total: int, tracker: Tracker, *, active: bool, keep: Callable[[str], None] | None = None
    ) -> None:
        """`keep` gets the line of a step where the terminal shows a bar in its place."""
        self.active, self.total, self.tracker, self._keep = active, total, tracker, keep
        self.started = self._evaluation_told = time.perf_counter()
        self.console = Console(file=cast(IO[str], unfailing(sys.stdout)), highlight=False, soft_wrap=True)
        self._path, self._loss_was_said = path, False
        try:
            self._file = path.open("a", encoding="utf-8") if active else None
        except OSError as error:
            raise RunFolderError(Problem(str(path), f"cannot be written: {error.strerror}", "make room")) from error
        self._progress: Progress | None = None
        if active and self.console.is_terminal:
            # a bar only where there is room for one beside the numbers
            bar = [BarColumn(bar_width=20)] if self.console.width >= 100 else []
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                *bar,
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
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
                self._say_lost_rows(error)

    def say(self, text: str) -> None:
        """One line to the person, on rank 0."""
        if not self.active:
            return
        (self._progress.console if self._progress is not None else self.console).print(
            plain(redacted(text)), markup=False
        )

    def _say_lost_rows(self, error: OSError) -> None:
        if not self._loss_was_said:
            self.say(f"{self._path.name}: rows can't be written now: {error.strerror or error}; training continues")
        self._loss_was_said = True

    def _write(self, row: dict[str, Any]) -> None:
        """A disk that is full or gone is told once and ends no training. Rows wait in the file's buffer for room."""
        assert self._file is not None
        kind = row["kind"]
        values = {f"{kind}/{k}": v for k, v in row.items() if k not in {"kind", "step"} and isinstance(v, (int, float))}
        try:
            self._file.write(json.dumps(_in_json(row), allow_nan=False) + "\n")
            self._file.flush()
            self.tracker.log(values, step=row["step"])
        except OSError as error:
            self._say_lost_rows(error)

    def train(self, row: dict[str, Any], left_s: float) -> None:
        """A row of kind `train`: see the keys in readout.py. `elapsed_s` is added. `left_s`: seconds to the end."""
        if not self.active:
            return
        row = {"kind": "train", **row, "elapsed_s": round(time.perf_counter() - self.started, 3)}
        self._write(row)
        self._show_step(row, left_s)

    def _show_step(self, row: dict[str, Any], left_s: float) -> None:
        loss, speed = f"loss {row['loss']:.4f}  lr {row['lr']:.2e}", f"{row['supervised_tokens_per_s']:,.0f}"
        text = f"{loss}  |g| {row['grad_norm']:.3f}  {speed} supervised tok/s"
        line = f"step {row['step']}/{self.total}  {text}  left {left_s:.0f} s"
        if self._progress is not None:
            text = f"{loss}  {speed} supervised tok/s  left {_clock(left_s)}"
            self._progress.update(self._task, completed=row["step"], description=text, refresh=True)
            if self._keep:
                self._keep(line)
            return
        self.say(line)

    def evaluating(self, share: float, left_s: float) -> None:
        """How far a measurement of the held-out loss is: in the bar, or in a line now and then."""
        now = time.perf_counter()
        if not self.active or share >= 1 or now - self._evaluation_told < (_SHOW_S if self._progress else _SAY_S):
            return
        self._evaluation_told = now
        text = f"held-out loss: {share:.0%} measured"
        if self._progress is not None:
            self._progress.update(self._task, description=f"{text}  left {_clock(left_s)}", refresh=True)
        else:
            self.say(f"{text}  left {left_s:.0f} s (data.max_validation_rows sets a limit)")

    def note(self, kind: str, row: dict[str, Any]) -> None:
        """A row of another kind: `skipped` and `spike` (monitor/bad_steps.py), `saves` (checkpoints/saver.py)."""
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
        self._show_evaluation(row)

    def _show_evaluation(self, row: dict[str, Any]) -> None:
        when = f"after step {row['step']}" if row["step"] else "before the first step"
        self.say(
            f"held-out loss {row['heldout_loss']:.4f} (perplexity {row['heldout_perplexity']:.2f}) "
            f"{when}, {row['supervised_tokens']:,} supervised tokens, {row['eval_s']:.1f} s"
        )
        if "answers" in row:
            scores = ", ".join(f"{k.removeprefix('answers_')} {row[k]:.2f}" for k in row if k.startswith("answers_e"))
            self.say(f"answers to {row['answers']} held-out rows: {scores}, {row['answers_s']:.1f} s")
