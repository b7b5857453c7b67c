"""Run folders at a glance: what `phi3-dist runs` shows.

A run says who runs it in heartbeat.json and how it ended in exit.json. One without an exit record is alive as long as
its process is (where that can be seen from here) or its heartbeat is fresh (elsewhere).
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from phi3_dist.errors import Problem, RunFolderError
from phi3_dist.machine.processes import lives
from phi3_dist.report.plain_values import count, finite, number, parse, printable, read_object
from phi3_dist.report.sweep_file import sweep_line

__all__ = ["RunRow", "list_runs", "read_run", "run_cells", "runs_table", "watch_runs"]

STALE_S = 900
"""Age from which a heartbeat from elsewhere counts as dead."""
TAIL_BYTES = 65536
_STYLES = {"running": "cyan", "finished": "green", "failed": "red", "lost": "red"}
_STYLES |= dict.fromkeys(("interrupted", "preempted", "ended early"), "yellow")
_OF_A_RUN = {"plan.json", "heartbeat.json", "exit.json"}
_NAME_AT_LEAST = 24
_FIRST_TO_GO = ("nodes", "tokens/s", "job", "saved", "seen", "loss")
"""Columns that are left out, in this order, where the terminal is too narrow for all."""


@dataclass(frozen=True)
class RunRow:
    """One run folder."""

    folder: Path
    state: str
    """running, finished, interrupted (Ctrl-C), preempted, failed, lost (no process and no exit record), starting (no
    heartbeat yet), or unknown (its files are damaged)."""
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
    """Seconds since the last sign of life; negative where that comes from a clock ahead of this one."""
    damaged: tuple[str, ...] = ()
    """Files that can't be read, each with the reason."""


def list_runs(path: Path) -> list[RunRow]:
    """The run folders at or below `path`, the newest first. Raises RunFolderError where `path` is not a folder."""
    if not path.is_dir():
        raise RunFolderError(
            Problem(str(path), "is not a folder", "give the folder that holds run folders; phi3-dist train makes runs/")
        )
    now, found = time.time(), []
    for folder, inner, files in os.walk(path):
        if "config.yaml" in files and not _OF_A_RUN.isdisjoint(files):
            row = read_run(Path(folder), now=now)
            found.append((_written(row, now), row))
            inner.clear()
    return [row for _, row in sorted(found, key=lambda pair: (-pair[0], str(pair[1].folder)))]


def _written(row: RunRow, now: float) -> float:
    """When the run last gave a sign of life, else when its first file was written."""
    if row.age_s is not None:
        return now - row.age_s
    try:
        return (row.folder / "config.yaml").stat().st_mtime
    except OSError:
        return 0.0


def read_run(folder: Path, *, now: float | None = None) -> RunRow:
    """What a run folder says about its run at the time `now` (seconds since 1970, by default the clock's)."""
    now = time.time() if now is None else now
    files = {name: read_object(folder / name) for name in ("heartbeat.json", "exit.json", "plan.json")}
    (heartbeat, torn), (ended, torn_end), (plan, _) = files.values()
    last = _last_row(folder / "metrics.jsonl")
    times = [finite(heartbeat.get("time")), finite(ended.get("time"))]
    sign = max((t for t in times if t is not None), default=None)
    step = count(last.get("step"))
    return RunRow(
        folder=folder,
        state=_state(heartbeat, ended, now, damaged=bool(torn or torn_end)),
        step=(count(heartbeat.get("step")) or 0) if step is None else step,
        steps=count(plan.get("steps")),
        loss=number(last.get("loss")),
        tokens_per_s=finite(last.get("tokens_per_s")),
        checkpoint=_newest_checkpoint(folder / "checkpoints"),
        job_id=printable(heartbeat.get("job_id") or ""),
        nodes=printable(heartbeat.get("nodes") or heartbeat.get("host") or ""),
        age_s=None if sign is None else now - sign,
        damaged=tuple(f"{name} {why}" for name, (_, why) in files.items() if why),
    )


def _newest_checkpoint(root: Path) -> str:
    try:
        names = [path.name for path in root.iterdir()]
    except OSError:
        return ""
    steps = [name for name in names if re.fullmatch(r"step_\d{1,12}", name)]
    return max(steps, key=lambda name: int(name.removeprefix("step_")), default="")


def _state(heartbeat: dict[str, Any], ended: dict[str, Any], now: float, *, damaged: bool) -> str:
    alive = lives(heartbeat)
    if ended and not _goes_on_after(ended, heartbeat, alive):
        return printable(ended.get("state", "failed"))
    if not heartbeat:
        return "unknown" if damaged else "starting"
    if alive is None and not heartbeat.get("pid_counts_in") and heartbeat.get("host") == socket.gethostname():
        alive = Path(f"/proc/{heartbeat.get('pid')}").exists()
    if alive is None:  # on another machine
        alive = now - (finite(heartbeat.get("time")) or 0.0) < STALE_S
    return "running" if alive else "lost"


def _goes_on_after(ended: dict[str, Any], heartbeat: dict[str, Any], alive: bool | None) -> bool:
    """Whether the heartbeat is that of a start after the one that ended. No clock tells where processes can be told."""
    keys = ("pid", "pid_counts_in", "pid_began_at_tick")
    if ended.get("pid_counts_in") and heartbeat.get("pid_counts_in"):
        if all(ended.get(key) == heartbeat.get(key) for key in keys):
            return False
        if alive is not None:
            return alive
    return (finite(heartbeat.get("time")) or 0.0) > (finite(ended.get("time")) or 0.0)


def _last_row(path: Path) -> dict[str, Any]:
    """The newest training row of metrics.jsonl. Its last line may be half written while the run goes on."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = parse(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("kind") == "train":
            return row
    return {}


def runs_table(rows: Sequence[RunRow], *, base: Path | None = None, width: int | None = None) -> Group:
    """A table of runs in `width` columns (None: as many as it needs); names are given from `base` on.

    A sweep's candidates stand below a line about it, in the order of its ranking.
    """
    cells = list(_cells(rows, base))
    heads = ["run", "state", "step", "loss", "tokens/s", "saved", "job", "nodes", "seen"]
    heads = [head for head in heads if head in {"run", "state", "step", "seen"} or any(cell[head] for cell in cells)]
    if width is not None:
        for head in _FIRST_TO_GO:
            if _width(cells, heads) <= width:
                break
            heads = [kept for kept in heads if kept != head]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for head in heads:
        table.add_column(
            head,
            overflow="fold",
            no_wrap=head != "run",
            justify="right" if head in {"step", "loss", "tokens/s", "saved"} else "left",
        )
    for cell in cells:
        styled = [Text(cell[head], style=_STYLES.get(cell[head], "") if head == "state" else "") for head in heads]
        table.add_row(*styled)
    notes = [Text(f"{_name(row, base)}: {why}", style="yellow") for row in rows for why in map(printable, row.damaged)]
    return Group(table, *notes)


def _cells(rows: Sequence[RunRow], base: Path | None) -> Iterator[dict[str, str]]:
    """What the table shows, row by row."""
    sweeps = {folder: sweep_line(folder) for folder in dict.fromkeys(row.folder.parent for row in rows)}
    headed: set[Path] = set()
    for row in rows:
        folder, line = row.folder.parent, sweeps[row.folder.parent]
        if line is None or row.folder.name not in line.places:
            yield run_cells(row, base)
        elif folder not in headed:
            headed.add(folder)
            mine = [one for one in rows if one.folder.parent == folder and one.folder.name in line.places]
            yield {**dict.fromkeys(run_cells(row, base), ""), "run": f"{_path(folder, base)}: sweep of {line.summary}"}
            for one in sorted(mine, key=lambda one: line.places[one.folder.name]):
                place = line.places[one.folder.name]
                yield {**run_cells(one, base), "run": f"  {place:>2} {printable(one.folder.name)}"}


def _width(cells: Sequence[dict[str, str]], heads: Sequence[str]) -> int:
    """Columns that a table needs, with a run's name folded once it is long."""
    widths = {head: max([len(head), *(Text(cell[head]).cell_len for cell in cells)]) for head in heads}
    widths["run"] = min(widths["run"], _NAME_AT_LEAST)
    return sum(widths.values()) + 2 * (len(heads) - 1)


def _name(row: RunRow, base: Path | None) -> str:
    return _path(row.folder, base)


def _path(folder: Path, base: Path | None) -> str:
    inside = base is not None and folder != base and folder.is_relative_to(base)
    return printable(folder.relative_to(base) if inside and base is not None else folder)


def run_cells(row: RunRow, base: Path | None) -> dict[str, str]:
    """What a table shows of a run, by column."""
    return {
        "run": _name(row, base),
        "state": _cut(row.state, 11),
        "step": _cut(f"{row.step}/{row.steps}" if row.steps else str(row.step), 15),
        "loss": "" if row.loss is None else f"{row.loss:.4g}" if abs(row.loss) >= 1e4 else f"{row.loss:.4f}",
        "tokens/s": "" if row.tokens_per_s is None else _short(row.tokens_per_s),
        "saved": str(int(row.checkpoint.removeprefix("step_"))) if row.checkpoint else "",
        "job": row.job_id,
        "nodes": row.nodes,
        "seen": "" if row.age_s is None else _ago(row.age_s),
    }


def _cut(text: str, most: int) -> str:
    """What stands in a damaged record in place of a word or a number may be long: the runs' names keep their room."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"


def _ago(seconds: float) -> str:
    if seconds < -1:
        return "in the future"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago" if seconds < 1e6 * size else "long ago"
    return f"{max(0, seconds):.0f} s ago"


def watch_runs(path: Path, console: Console, *, every_s: float = 2.0) -> None:
    """Show the table anew every `every_s` seconds, until Ctrl-C."""

    def table() -> Group:
        return runs_table(list_runs(path), base=path, width=console.width)

    with Live(table(), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(every_s)
            live.update(table(), refresh=True)
