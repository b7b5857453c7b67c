"""Run folders at a glance, and the logs of their ranks: what `phi3-dist runs` and `phi3-dist logs` show.

A run says who runs it in heartbeat.json and how it ended in exit.json. One without an exit record is alive as long as
its process is (on this host) or its heartbeat is fresh (on another).
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from phi3_dist.errors import Problem, RunFolderError

__all__ = ["RunRow", "find_log", "follow_log", "list_runs", "read_run", "runs_table", "watch_runs"]

STALE_S = 900
"""Age from which a heartbeat from another host counts as dead; a step with an evaluation may take minutes."""
TAIL_BYTES = 65536
_STYLES = {"running": "cyan", "finished": "green", "failed": "red", "lost": "red"}
_STYLES |= dict.fromkeys(("interrupted", "preempted"), "yellow")


@dataclass(frozen=True)
class RunRow:
    """One run folder."""

    folder: Path
    state: str
    """running, finished, interrupted (Ctrl-C), preempted, failed, lost (no process and no exit record), or starting (no
    heartbeat yet)."""
    step: int
    steps: int | None
    loss: float | None
    tokens_per_s: float | None
    checkpoint: str
    """Name of the newest checkpoint, or an empty text."""
    job_id: str
    nodes: str
    """Node list of the Slurm job, or the host of rank 0."""
    age_s: float | None
    """Seconds since the last sign of life."""


def list_runs(path: Path) -> list[RunRow]:
    """The run folders at or below `path`, in order of name. Raises RunFolderError where `path` is no folder."""
    if not path.is_dir():
        raise RunFolderError(Problem(str(path), "is not a folder", "the folder that holds the runs, such as runs"))
    rows = []
    for folder, inner, files in os.walk(path):
        if "config.yaml" in files and ("plan.json" in files or "heartbeat.json" in files):
            rows.append(read_run(Path(folder)))
            inner.clear()
    return sorted(rows, key=lambda row: str(row.folder))


def read_run(folder: Path, *, now: float | None = None) -> RunRow:
    """What a run folder says about its run at the time `now` (seconds since 1970, by default the clock's)."""
    now = time.time() if now is None else now
    heartbeat, ended = _read_json(folder / "heartbeat.json"), _read_json(folder / "exit.json")
    last = _last_row(folder / "metrics.jsonl")
    beat_time, end_time = heartbeat.get("time"), ended.get("time")
    sign = max((t for t in (beat_time, end_time) if t is not None), default=None)
    checkpoints = sorted(p.name for p in folder.glob("checkpoints/step_*") if not p.name.endswith(".tmp"))
    return RunRow(
        folder=folder,
        state=_state(heartbeat, ended, now),
        step=int(last.get("step", heartbeat.get("step", 0))),
        steps=_read_json(folder / "plan.json").get("steps"),
        loss=last.get("loss"),
        tokens_per_s=last.get("tokens_per_s"),
        checkpoint=checkpoints[-1] if checkpoints else "",
        job_id=str(heartbeat.get("job_id") or ""),
        nodes=str(heartbeat.get("nodes") or heartbeat.get("host") or ""),
        age_s=None if sign is None else now - sign,
    )


def _state(heartbeat: dict[str, Any], ended: dict[str, Any], now: float) -> str:
    # a resumed run beats again after the exit record of its first start
    if ended and ended.get("time", 0.0) >= heartbeat.get("time", 0.0):
        return str(ended.get("state", "failed"))
    if not heartbeat:
        return "starting"
    if heartbeat.get("host") == socket.gethostname():
        return "running" if Path(f"/proc/{heartbeat.get('pid')}").exists() else "lost"
    return "running" if now - heartbeat.get("time", 0.0) < STALE_S else "lost"


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, or an empty one where there is none. Raises RunFolderError for a file that isn't JSON."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RunFolderError(Problem(str(path), f"is not JSON: {error}", "remove it, or the run folder")) from error
    return value if isinstance(value, dict) else {}


def _last_row(path: Path) -> dict[str, Any]:
    """The newest training row of metrics.jsonl. Its last line may be half written while the run goes on."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("kind") == "train":
            return row
    return {}


def runs_table(rows: Sequence[RunRow], *, base: Path | None = None) -> Table:
    """A table of runs; names are given from `base` on."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "state"):
        table.add_column(name, overflow="fold")
    for name in ("step", "loss", "tokens/s"):
        table.add_column(name, justify="right")
    for name in ("last checkpoint", "job", "nodes", "seen"):
        table.add_column(name, overflow="fold")
    for row in rows:
        inside = base is not None and row.folder != base and row.folder.is_relative_to(base)
        table.add_row(
            str(row.folder.relative_to(base) if inside and base is not None else row.folder),
            Text(row.state, style=_STYLES.get(row.state, "")),
            f"{row.step}/{row.steps}" if row.steps else str(row.step),
            "" if row.loss is None else f"{row.loss:.4f}",
            "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
            row.checkpoint,
            row.job_id,
            row.nodes,
            "" if row.age_s is None else _ago(row.age_s),
        )
    return table


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0, seconds):.0f} s ago"


def watch_runs(path: Path, console: Console, *, every_s: float = 2.0) -> None:
    """Show the table anew every `every_s` seconds, until Ctrl-C."""
    with Live(runs_table(list_runs(path), base=path), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(every_s)
            live.update(runs_table(list_runs(path), base=path), refresh=True)


def find_log(folder: Path, rank: int = 0) -> Path:
    """The log of one rank of a run's newest Slurm job: the job's output for rank 0, else the rank's own file.

    Jobs of `phi3-dist slurm` log beside the run folder in `slurm/`, those of launch/slurm/train.sbatch where they
    were submitted. Raises RunFolderError where there is none, naming the ranks that have one.
    """
    if not folder.is_dir():
        raise RunFolderError(Problem(str(folder), "is not a run folder", "see phi3-dist runs"))
    job_id = _read_json(folder / "heartbeat.json").get("job_id")
    if not job_id:
        what = "was not run by Slurm, so its output went to the terminal"
        raise RunFolderError(Problem(str(folder), what, f"its numbers are in {folder / 'metrics.jsonl'}"))
    places = (folder.parent / "slurm", Path.cwd())
    pattern = f"*-{job_id}.out" if rank == 0 else f"*-{job_id}.ranks/rank_{rank:03d}.*.log"
    for place in places:
        if found := sorted(place.glob(pattern)):
            return found[-1]
    logs = [log for place in places for log in place.glob(f"*-{job_id}.ranks/rank_*.log")]
    ranks = ", ".join(sorted({str(int(log.name.split(".")[0].removeprefix("rank_"))) for log in logs}, key=int))
    what = f"no log of rank {rank} of job {job_id} in {places[0]} or {places[1]}"
    raise RunFolderError(Problem(str(folder), what, f"ranks with a log: 0, {ranks}" if ranks else ""))


def follow_log(path: Path, *, follow: bool = False, every_s: float = 0.5) -> Iterator[str]:
    """Pieces of the log as it stands; with `follow` also what is appended, for ever."""
    with path.open(encoding="utf-8", errors="replace") as file:
        while True:
            if piece := file.read(TAIL_BYTES):
                yield piece
            elif follow:
                time.sleep(every_s)
            else:
                return
