"""A run, or several beside one another, as one self-contained page: `report.html` and `comparison.html`.

Nothing is loaded from elsewhere: charts are drawn by uPlot, whose file, licence and version lie in `assets/`. What a
run holds is text to the page: Jinja escapes it, the data for the script is JSON without `<`, and a content security
policy lets no script run but the page's own, by their hashes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from phi3_dist.errors import Problem, RunFolderError
from phi3_dist.report import first_screen, page_charts, tables
from phi3_dist.report.run_files import written
from phi3_dist.report.run_view import RunView, differences, drawn, labels, read_view
from phi3_dist.report.words import duration
from phi3_dist.version import __version__

__all__ = [
    "parts_of_comparison",
    "UPLOT_VERSION",
    "board_page",
    "comparison_page",
    "is_page",
    "parts_of_run",
    "rendered",
    "run_page",
    "write_comparison",
    "write_page",
    "write_text",
]

ASSETS = Path(__file__).parent / "assets"
UPLOT_VERSION = "1.6.32"
MARK = "<!-- phi3_dist's page -->"
"""By it a page is known again before it is replaced."""
_SIZE = "\u2063size\u2063"


def write_page(run_folder: Path) -> Path:
    """Write `report.html` into the run folder: all that its files tell, with charts to hover over and zoom into.

    Parts whose file a run has not written are left out. Returns the page's path. Raises RunFolderError without
    metrics, and for a file that is not what a run writes.
    """
    return write_text(run_folder / "report.html", run_page(read_view(run_folder)))


def write_comparison(run_folders: Sequence[Path], output: Path) -> Path:
    """Write a page that lays runs over one another, with what differs as the legend. Returns its path.

    Raises RunFolderError for a damaged run, and where `output` is something else than such a page.
    """
    if not is_page(output):
        what = "is there already, and is not a page of this toolkit: nothing is replaced"
        raise RunFolderError(Problem(str(output), what, "name another file with --output"))
    return write_text(output, comparison_page([read_view(folder) for folder in run_folders]))


def is_page(path: Path) -> bool:
    """Whether a page may be written there: nothing is, or a page of this toolkit. Raises RunFolderError."""
    fix = "name another file with --output"
    try:
        return not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace")[:400]
    except OSError as error:
        raise RunFolderError(Problem(str(path), f"cannot be read: {error.strerror or error}", fix)) from error


def write_text(path: Path, text: str) -> Path:
    """Write a page whole, or leave what was there. Raises RunFolderError."""
    with written(path) as partial:
        # what JSON may hold and UTF-8 may not, such as half of a pair of code units
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def run_page(view: RunView, live: Mapping[str, Any] | None = None) -> str:
    """The page of one run. `live` says where to ask for news (`url`) and how often (`every_ms`)."""
    data = {**drawn([view], [view.name]), "live": live}
    parts = parts_of_run(view, live=live is not None)
    return rendered("run.html", data, title=view.name, view=view, live=live, **parts)


def parts_of_run(view: RunView, *, live: bool = True) -> dict[str, Markup]:
    """The page's text above and below the charts, as HTML: what a page that refreshes (`live`) exchanges."""
    above = _TEMPLATES.get_template("above.html").render(
        view=view,
        as_of="" if live or view.row.state != "running" else time.strftime("%H:%M"),
        headline=first_screen.headline(view.row, view.rows),
        groups=first_screen.first_screen(view.rows, view.config, view.plan, view.evaluation),
        ways=first_screen.ways_on(view.folder, view.row.state, view.command),
        answers=tables.answers(view.evaluation)[:2],
    )
    spans, parts = page_charts.time_spans(view.rows), page_charts.step_parts(view.rows)
    evaluation = {key: value for key, value in view.evaluation.items() if not isinstance(value, list)}
    below = _TEMPLATES.get_template("below.html").render(
        spans=_bars(spans),
        parts=_bars(parts),
        marks=page_charts.marks(view.rows, view.folder, view.row.state),
        memory=tables.memory_terms(view.plan),
        planned=first_screen.memory_gib(view.plan)[0],
        lengths=tables.bars_of_lengths(view.plan),
        scores=tables.scores(evaluation),
        answers=tables.answers(view.evaluation),
        lists=tables.other_lists(view.evaluation),
        choices=tables.choices(view.plan),
        recipe=first_screen.recipe(view.folder),
        adapter=tables.adapter_files(view.folder / "adapter"),
        config=tables.config_lines(view.folder, view.command),
        environment=tables.leaves(view.environment),
    )
    return {"above": Markup(above), "below": Markup(below)}


def _bars(spans: Sequence[page_charts.Span]) -> list[tables.Bar]:
    longest, whole = max((s.seconds for s in spans), default=0.0) or 1.0, sum(s.seconds for s in spans) or 1.0
    return [
        tables.Bar(
            s.name,
            duration(s.seconds),
            s.seconds / longest,
            f"{s.seconds / whole:.0%}" + (f", {s.note}" if s.note else ""),
        )
        for s in spans
    ]


def comparison_page(views: Sequence[RunView], live: Mapping[str, Any] | None = None) -> str:
    """Several runs over one another."""
    names, above = parts_of_comparison(views)
    return rendered(
        "comparison.html",
        {**drawn(views, names), "live": live},
        title=f"{len(views)} runs",
        live=live,
        above=above,
        names=names,
        folders=[str(view.folder) for view in views],
    )


def parts_of_comparison(views: Sequence[RunView]) -> tuple[list[str], Markup]:
    """A name for each run, and the tables above the charts as HTML."""
    differ = differences(views)
    names = labels(views, differ)
    results = [view.result() for view in views]
    keys = list(dict.fromkeys(key for result in results for key in result))
    rows = [(key, [result.get(key, "") for result in results]) for key in keys]
    template = _TEMPLATES.get_template("compared.html")
    return names, Markup(template.render(names=names, differ=differ, results=rows))


def board_page(rows: Sequence[Mapping[str, Any]], folder: Path, live: Mapping[str, Any]) -> str:
    """The list of runs that `phi3-dist board` shows."""
    table = _TEMPLATES.get_template("runs.html").render(rows=rows)
    data = {"charts": [], "runs": [], "live": live}
    return rendered("board.html", data, title=f"Runs in {folder}", live=live, table=Markup(table))


def runs_part(rows: Sequence[Mapping[str, Any]]) -> str:
    """The board's table, as a page that refreshes exchanges it."""
    return _TEMPLATES.get_template("runs.html").render(rows=rows)


@functools.cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii") + "'"


def data_json(data: Mapping[str, Any]) -> str:
    """JSON that holds no character by which HTML could take it for markup."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def rendered(template: str, data: Mapping[str, Any], **context: Any) -> str:
    """A page of `template`: its styles, scripts and data, all in one file."""
    uplot = _asset("uPlot.iife.min.js")
    scripts = [*([uplot] if template != "board.html" else []), _asset("charts.js"), _asset("page.js")]
    live = bool(context.get("live"))
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; style-src 'unsafe-inline'; "
        f"img-src data:; connect-src {chr(39)}{'self' if live else 'none'}{chr(39)}; "
        f"base-uri 'none'; form-action {chr(39)}{'self' if live else 'none'}{chr(39)}"
    )
    text = _TEMPLATES.get_template(template).render(
        mark=Markup(MARK),
        policy=policy,
        styles=[Markup(_asset(name)) for name in ("uPlot.min.css", "page.css")],
        scripts=[Markup(script) for script in scripts],
        data=Markup(data_json(data)),
        charts=data["charts"],
        uplot=UPLOT_VERSION,
        uplot_kb=round(len(uplot.encode()) / 1000),
        version=__version__,
        now=time.strftime("%Y-%m-%d %H:%M"),
        size=_SIZE,
        **context,
    )
    size = len(text.encode("utf-8", "backslashreplace"))
    return text.replace(_SIZE, f"{size / 1000:,.0f} kB")


_TEMPLATES = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
_TEMPLATES.globals |= {
    "rows_of": lambda table: [[key, *values] for key, values in table],
    "pairs": lambda one, other: list(zip(one, other, strict=True)),
}
