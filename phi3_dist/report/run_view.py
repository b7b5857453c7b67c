"""A run as its page shows it, read once from the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_dist.config.load import flatten
from phi3_dist.errors import RunFolderError
from phi3_dist.report import first_screen, page_charts
from phi3_dist.report.plain_values import finite, printable
from phi3_dist.report.run_files import Row, read_config, read_json, read_metrics, run_name
from phi3_dist.report.runs import RunRow, read_run
from phi3_dist.report.words import shown

__all__ = ["RunView", "differences", "drawn", "labels", "read_view"]

_NOT_COMPARED = ("name", "save.", "log.", "data.cache")
_LABEL_AT_MOST = 60


@dataclass(frozen=True)
class RunView:
    """What the files of a run say. `rows` are those of metrics.jsonl, none before the first step."""

    folder: Path
    name: str
    row: RunRow
    rows: tuple[Row, ...]
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def command(self) -> Sequence[Any]:
        command = self.environment.get("command")
        return command if isinstance(command, list) else ()

    def settings(self) -> dict[str, str]:
        """What the run is, by dotted path: the run file and what the plan made of it."""
        found = {key: shown(value) for key, value in flatten(self.config).items() if not key.startswith(_NOT_COMPARED)}
        for key in ("strategy", "world_size", "precision", "attention", "kernels"):
            if key in self.plan:
                found[f"plan.{key}"] = shown(self.plan[key])
        device = self.plan.get("hardware")
        if isinstance(device, dict) and "device" in device:
            found["plan.device"] = shown(device["device"])
        return found

    def result(self) -> dict[str, str]:
        """The few numbers by which runs are compared."""
        groups = first_screen.first_screen(self.rows, self.config, self.plan, self.evaluation)
        found = {"state": self.row.state, "steps": shown(self.row.step)}
        for group in groups:
            if group.title in {"Result", "Time"}:
                found |= {fact.label: fact.value for fact in group.facts}
            if group.title == "Memory":
                found |= {f"memory, {fact.label}": fact.value for fact in group.facts if fact.label != "there is"}
        return found


def read_view(folder: Path, *, may_be_empty: bool = False) -> RunView:
    """Read a run folder. Raises RunFolderError for files that are damaged, and, unless it may be empty, for no rows."""
    try:
        rows = tuple(read_metrics(folder))
    except RunFolderError:
        metrics = folder / "metrics.jsonl"
        if not may_be_empty or (metrics.is_file() and metrics.stat().st_size > 0):
            raise
        rows = ()
    config = read_config(folder)[1].values
    return RunView(
        folder=folder,
        name=run_name(folder),
        row=read_run(folder),
        rows=rows,
        config=config if isinstance(config, dict) else {},
        plan=read_json(folder / "plan.json"),
        evaluation=read_json(folder / "evaluation.json"),
        environment=read_json(folder / "environment.json"),
    )


def drawn(views: Sequence[RunView], names: Sequence[str]) -> dict[str, Any]:
    """What the page's script draws: `charts`, and `runs` with their columns and marks. Plain values for JSON."""
    runs = []
    for view, name in zip(views, names, strict=True):
        planned, have = first_screen.memory_gib(view.plan)
        clip = finite(flatten(view.config).get("optim.max_grad_norm"))
        constants = {"planned_gib": planned, "clip_at": clip or None}
        constants["have_gib"] = have if view.plan.get("device") == "cuda" else None
        parameters = view.plan.get("parameters")
        trainable = finite(parameters.get("trainable")) if isinstance(parameters, dict) else None
        rate = page_charts.matrix_rate(view.plan, trainable or 0.0)
        parts: dict[str, Any] = dict(page_charts.columns(view.rows, constants, rate))
        logged = sum(row.get("kind") == "train" for row in view.rows)
        shown_rows = len(parts["train"]["step"])
        note = f"{shown_rows:,} of {logged:,} rows, with the extremes of each stretch" if shown_rows < logged else ""
        found = page_charts.marks(view.rows, view.folder, view.row.state)
        runs.append({"label": name, "state": view.row.state, **parts, "marks": found, "note": note})
    return {"charts": [chart for chart in page_charts.CHARTS if _has(chart, runs)], "runs": runs}


def _has(chart: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a run has a number to draw beside what is the same at every step."""
    lines = [line for line in chart["lines"] if not line.get("limit")]
    return any(line["key"] in run[line["part"]] for line in lines for run in runs)


def differences(views: Sequence[RunView]) -> list[tuple[str, list[str]]]:
    """Each setting that is not the same in all runs: its path and its value in each, empty where one has none."""
    settings = [view.settings() for view in views]
    keys = dict.fromkeys(key for one in settings for key in one)
    table = [(key, [one.get(key, "") for one in settings]) for key in keys]
    return [(key, values) for key, values in table if len(set(values)) > 1]


def labels(views: Sequence[RunView], differ: Sequence[tuple[str, list[str]]]) -> list[str]:
    """A short name for each run: what differs, where that tells all of them apart, else the folder's name too."""
    last = [key.rpartition(".")[2] for key, _ in differ]
    keys = [short if last.count(short) == 1 else key for short, (key, _) in zip(last, differ, strict=True)]
    found = []
    for i in range(len(views)):
        parts = [f"{key} {values[i] or '–'}" for key, (_, values) in zip(keys, differ, strict=True)]
        text = " · ".join(" ".join(part.split()) for part in parts)
        found.append(text if len(text) <= _LABEL_AT_MOST else "")
    if all(found) and len(set(found)) == len(found):
        return [printable(text) for text in found]
    names = [printable(view.folder.resolve().name) for view in views]
    names = names if len(set(names)) == len(names) else [printable(view.folder) for view in views]
    named = [f"{name}: {text}" if text else name for name, text in zip(names, found, strict=True)]
    return named if len(set(named)) == len(named) else [f"{n}: {name}" for n, name in enumerate(named, start=1)]
