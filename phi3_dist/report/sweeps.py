"""A sweep as a page: the ranking, its candidates' settings beside their losses, which key matters, and all curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from phi3_dist.config.load import flatten
from phi3_dist.errors import Problem, RunFolderError
from phi3_dist.report.importance import Importance, importance_of
from phi3_dist.report.page import is_page, parts_of_comparison, rendered, write_text
from phi3_dist.report.parallel_coordinates import parallel_of
from phi3_dist.report.plain_values import finite, printable, read_object
from phi3_dist.report.run_view import RunView, drawn, read_view
from phi3_dist.report.sweep_file import SWEEP_FILE, read_sweep, sweep_line

__all__ = ["PAGE", "common_losses", "write_sweep_page"]

PAGE = "sweep.html"


def write_sweep_page(folder: Path, output: Path | None = None) -> Path:
    """Write the page of a sweep, by default `sweep.html` in its folder. Its path.

    Raises RunFolderError where sweep.json is damaged or no candidate has trained, for a damaged candidate, and where
    `output` is something else than such a page.
    """
    output = output or folder / PAGE
    if not is_page(output):
        what = "is there already, and is not a page of this toolkit: nothing is replaced"
        raise RunFolderError(Problem(str(output), what, "name another file with --output"))
    sweep, candidates = read_sweep(folder)
    there = [one for one in candidates if (folder / one["folder"] / "metrics.jsonl").is_file()]
    damage = read_object(folder / SWEEP_FILE)[1]
    if damage:
        fix = f"put it back; phi3-dist runs {folder} shows the candidates, phi3-dist report RUN each of them"
        raise RunFolderError(Problem(str(folder / SWEEP_FILE), damage, fix))
    if not there:
        what = "names no candidate that has trained"
        raise RunFolderError(Problem(str(folder / SWEEP_FILE), what, "phi3-dist sweep FILE --resume continues with it"))
    views = [read_view(folder / one["folder"]) for one in there]
    line = sweep_line(folder)
    return write_text(output, _page(sweep, there, views, line.summary if line else ""))


def _page(
    sweep: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]], views: Sequence[RunView], headline: str
) -> str:
    differing = sweep.get("differing")
    keys = [str(key) for key in differing] if isinstance(differing, list) else []
    settings = [flatten(view.config) for view in views]
    columns = {key: [one.get(key) for one in settings] for key in keys}
    columns = {key: values for key, values in columns.items() if len({repr(v) for v in values}) > 1}
    names = [printable(one.get("name") or view.name) for one, view in zip(candidates, views, strict=True)]
    last = [_last_loss(one) for one in candidates]
    step, losses = common_losses(views)
    found = importance_of(columns, losses) if losses else []
    whole = [one.get("state") == "finished" for one in candidates]
    _, above = parts_of_comparison(views)
    return rendered(
        "sweep.html",
        {**drawn(views, names), "live": None},
        title=f"Sweep {printable(sweep.get('name') or '')}",
        live=None,
        headline=headline,
        parallel=parallel_of(names, [*columns.items(), ("held-out loss", last)], whole) if columns else None,
        importance=[_row(one) for one in found],
        measured=f"the held-out loss after step {step:,}, the last that all {len(views)} candidates have",
        ranking=_ranking(names, candidates, columns, last),
        above=Markup(above),
        names=names,
        folders=[str(view.folder) for view in views],
    )


def _last_loss(one: Mapping[str, Any]) -> float:
    held_out, trained = finite(one.get("heldout_loss")), finite(one.get("loss"))
    return held_out if held_out is not None else trained if trained is not None else math.inf


def common_losses(views: Sequence[RunView]) -> tuple[int, list[float]]:
    """The last step at which every candidate has a held-out loss, and those losses; (0, []) where there is none.

    A candidate that ended early would look worse for its fewer steps alone.
    """
    tables: list[dict[int, float]] = []
    for view in views:
        table = {}
        for row in view.rows:
            loss, step = finite(row.get("heldout_loss")), row.get("step")
            if row.get("kind") == "eval" and loss is not None and isinstance(step, int) and step > 0:
                table[step] = loss
        tables.append(table)
    steps = set.intersection(*map(set, tables)) if tables else set()
    if not steps:
        return 0, []
    return max(steps), [table[max(steps)] for table in tables]


def _row(one: Importance) -> dict[str, Any]:
    value, mean, count = one.best
    share = "not measured" if one.share is None else f"{one.share:.0%}"
    chance = "" if one.chance is None else f"{max(1, round(1000 * one.chance)):,} in 1,000"
    return {
        "key": one.key,
        "share": one.share or 0.0,
        "said": share,
        "chance": chance,
        "best": f"{value} ({mean:.4f}" + (f", mean of {count})" if count > 1 else ")"),
        "note": one.note or ("no more than chance" if (one.chance or 0) > 0.1 else ""),
    }


def _ranking(
    names: Sequence[str],
    candidates: Sequence[Mapping[str, Any]],
    columns: Mapping[str, Sequence[object]],
    last: Sequence[float],
) -> dict[str, list[Any]]:
    rows = []
    for i, (name, one) in enumerate(zip(names, candidates, strict=True)):
        loss = f"{last[i]:.4f}" if math.isfinite(last[i]) else "–"
        values = [printable(columns[key][i]) for key in columns]
        step = f"{one.get('step')} of {one.get('steps')}"
        rows.append(
            [str(i + 1), name, *values, printable(one.get("state") or ""), step, loss, printable(one.get("why") or "")]
        )
    return {"heads": ["", "candidate", *columns, "state", "step", "held-out loss", ""], "rows": rows}
