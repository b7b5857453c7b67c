"""What a person sees of a sweep: one table, sweep.json, and the winner's adapter under best/."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from phi3_dist.adapters.durable_files import failed_copy
from phi3_dist.adapters.reading import CONFIG, read_adapter
from phi3_dist.errors import Problem, RunFolderError
from phi3_dist.planning.plan import RunPlan
from phi3_dist.sweep.candidate import CandidateRun
from phi3_dist.sweep.early import Decision
from phi3_dist.sweep.file import Sweep

__all__ = ["BEST", "SWEEP_FILE", "Board", "decisions_of", "ranking"]

SWEEP_FILE, BEST = "sweep.json", "best"
SHOW_S, REWRITE_S = 15.0, 0.5
"""Seconds between two lines of a sweep whose output is not a terminal, and between two tables where it is one."""


def ranking(runs: Sequence[CandidateRun]) -> list[CandidateRun]:
    """The candidates by their last held-out loss, those that got furthest first, failed ones last."""

    def key(run: CandidateRun) -> tuple[bool, bool, float]:
        trained, held_out = run.losses()
        loss = trained if math.isnan(held_out) else held_out  # without held-out rows the last step's
        return run.state == "failed", run.state != "finished", loss if math.isfinite(loss) else math.inf

    return sorted(runs, key=key)


def decisions_of(folder: Path) -> list[Decision]:
    """What was decided at the rungs of a sweep before. Raises RunFolderError where sweep.json is damaged."""
    path = folder / SWEEP_FILE
    try:
        said = json.loads(path.read_text("utf-8"))
        return [Decision.from_dict(one) for one in said["early"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"is damaged: {type(error).__name__}"
        raise RunFolderError(Problem(str(path), what, "put it back, or start over with --overwrite")) from error


class Board:
    """Tells on rank 0 how far all candidates are, and keeps sweep.json."""

    def __init__(self, sweep: Sweep, runs: Sequence[CandidateRun], *, active: bool) -> None:
        self.sweep, self.runs, self.active = sweep, runs, active
        self.decisions: list[Decision] = []
        self.console = Console(highlight=False, soft_wrap=True)
        self._told = 0.0
        self._live: Live | None = None

    def say(self, text: str) -> None:
        if self.active:
            self.console.print(text, markup=False)

    def announce(self, plan: RunPlan, count: int, at_once: int, a_pass: int, why: str) -> None:
        """How many candidates train, how many of them at once, and the plan's choices with their reasons."""
        rounds = -(-count // at_once) if at_once else 0
        together = "together" if rounds == 1 else f"in {rounds} rounds of at most {at_once}"
        self.say(f"sweep: {count} candidates train {together}, {min(a_pass, at_once or 1)} in a forward pass ({why})")
        for choice in plan.choices:
            self.say(f"{choice.name}: {choice.value} ({choice.why})")

    def __enter__(self) -> Board:
        """On a terminal the table is written anew in its place until the block ends; lines come above it."""
        if self.active and self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True, redirect_stderr=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def step(self) -> None:
        """Now and then the table on a terminal; elsewhere a line, the steps made and the lowest held-out losses."""
        now = time.perf_counter()
        if not self.active or now - self._told < (REWRITE_S if self._live else SHOW_S):
            return
        self._told = now
        if self._live:
            self._live.update(self.table(at_most=self.console.height - 4), refresh=True)
        else:
            self.say(self.line())

    def line(self) -> str:
        running = [run for run in self.runs if run.state == "running"]
        done = sum(run.done for run in self.runs)
        total = sum(run.total for run in self.runs)
        best = ", ".join(f"{run.name} {run.losses()[1]:.4f}" for run in ranking(self.runs)[:3])
        return f"sweep: {done:,} of at most {total:,} steps, {len(running)} running; lowest held-out loss: {best}"

    def table(self, at_most: int | None = None) -> Table:
        """The candidates in the order of the ranking, of which at most so many."""
        table = Table(box=None, pad_edge=False)
        for column in ("", "candidate", "state", "step", "loss", "held-out loss"):
            table.add_column(column, justify="right" if column in ("", "step", "loss", "held-out loss") else "left")
        ranked = ranking(self.runs)
        shown = ranked if at_most is None or len(ranked) <= at_most else ranked[: max(1, at_most - 1)]
        for place, run in enumerate(shown, 1):
            numbers = ["-" if math.isnan(x) else f"{x:.4f}" for x in run.losses()]
            table.add_row(str(place), run.name, run.state, f"{run.done}/{run.total}", *numbers)
        if len(shown) < len(ranked):
            table.add_row("", f"and {len(ranked) - len(shown)} more", "", "", "", "")
        return table

    def show(self) -> None:
        if self.active:
            self.console.print(self.table())

    def write(self, folder: Path) -> None:
        """sweep.json: every candidate, in the order of the ranking, and what was decided at the rungs."""
        if not self.active:
            return
        facts = {
            "name": self.sweep.cfg.name,
            "differing": list(self.sweep.differing),
            "candidates": [self._facts(run) for run in ranking(self.runs)],
            "early": [decision.to_dict() for decision in self.decisions],
        }
        temporary = folder / f".{SWEEP_FILE}.tmp"
        try:
            temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            temporary.replace(folder / SWEEP_FILE)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            what = f"cannot be written: {error.strerror}"
            raise RunFolderError(Problem(str(folder / SWEEP_FILE), what, "make room")) from error

    @staticmethod
    def _facts(run: CandidateRun) -> dict[str, Any]:
        numbers = dict(zip(("loss", "heldout_loss"), run.losses(), strict=True))
        return {
            "name": run.name,
            "folder": run.folder.path.name,
            "settings": dict(run.candidate.settings),
            "state": run.state,
            "why": run.why,
            "step": run.done,
            "steps": run.total,
            **{key: value if math.isfinite(value) else None for key, value in numbers.items()},
        }

    def keep_best(self, folder: Path) -> CandidateRun | None:
        """Copy the adapter of the first finished candidate to best/, verified; that candidate, or None."""
        finished = [run for run in ranking(self.runs) if run.state == "finished"]
        if not finished:
            return None
        if self.active:
            making, best = folder / ".best.tmp", folder / BEST
            if best.exists() and not (best / CONFIG).is_file():
                what = "holds no adapter, and the winner's would go there"
                raise RunFolderError(
                    Problem(str(best), what, "move it elsewhere; the adapters are in their run folders")
                )
            try:
                shutil.rmtree(making, ignore_errors=True)
                shutil.copytree(finished[0].folder.path / "adapter", making)
                read_adapter(making)
                shutil.rmtree(best, ignore_errors=True)
                making.replace(best)
            except OSError as error:
                shutil.rmtree(making, ignore_errors=True)
                what = f"the winner's adapter can't be copied there: {failed_copy(error)}"
                fix = f"make room; --resume copies it again, and it is in {finished[0].folder.path / 'adapter'} too"
                raise RunFolderError(Problem(str(best), what, fix)) from error
        return finished[0]
