"""A run as one self-contained page: `report.html`, with the picture inside and nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from phi3_dist.config.load import flatten
from phi3_dist.errors import Problem, RunFolderError
from phi3_dist.report.curves import Row, draw_curves, read_metrics, run_name, written
from phi3_dist.report.reading import count, finite, read_object

__all__ = ["write_page"]


def write_page(run_folder: Path) -> Path:
    """Write `report.html`: results, curves, samples, the plan's choices with their reasons, config and versions.

    Draws `curves.png` anew. Parts whose file a run has not written are left out: evaluation.json (a mapping; numbers
    become a table, mappings of numbers stand side by side, its `samples` one row each), plan.json, config.yaml,
    environment.json, adapter/. Returns the page's path.
    Raises RunFolderError without metrics, as `draw_curves` does, or for a file that is not JSON.
    """
    picture = draw_curves(run_folder)
    evaluation = _json(run_folder / "evaluation.json")
    config = run_folder / "config.yaml"
    text = _ENVIRONMENT.from_string(_PAGE).render(
        name=run_name(run_folder),
        picture=base64.b64encode(picture.read_bytes()).decode("ascii"),
        results=_results(read_metrics(run_folder)),
        scores=_side_by_side(evaluation),
        samples=_columns(_mappings(evaluation.get("samples"))),
        choices=_columns(_mappings(_json(run_folder / "plan.json").get("choices")), ("name", "value", "why"))[1],
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        environment=_leaves(_json(run_folder / "environment.json")),
        adapter=_files(run_folder / "adapter"),
    )
    page = run_folder / "report.html"
    with written(page) as partial:
        # what JSON may hold and UTF-8 may not, such as half of a pair of code units
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    return page


def _json(path: Path) -> dict[str, Any]:
    content, wrong = read_object(path)
    if wrong:
        raise RunFolderError(Problem(str(path), wrong, "restore the file that the run wrote"))
    return content


def _mappings(value: object) -> list[Mapping[str, Any]]:
    """The rows of a table; what is no mapping becomes one of one cell."""
    rows = value if isinstance(value, list) else [] if value is None else [value]
    return [row if isinstance(row, dict) else {"": row} for row in rows]


def _results(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The few numbers that a reader looks for first."""
    sound = [row for row in rows if count(row.get("step")) is not None]
    train = [row for row in sound if row.get("kind") == "train"]
    held_out = [row for row in sound if row.get("kind") == "eval"]
    found: list[tuple[str, str]] = []
    if train:
        last = train[-1]
        found.append(("steps", _show(last.get("step"))))
        found.append(("training loss, last row", _show(last.get("loss"))))
    if held_out:
        first, last = held_out[0], held_out[-1]
        for label, key in (("held-out loss", "heldout_loss"), ("held-out perplexity", "heldout_perplexity")):
            value = _show(last.get(key))
            if len(held_out) > 1:
                when = f"after step {first['step']}" if first["step"] else "before the first step"
                value += f" ({_show(first.get(key))} {when})"
            found.append((label, value))
    if train and (elapsed_s := finite(train[-1].get("elapsed_s"))) is not None:
        found.append(("time", _duration(elapsed_s)))
    if speeds := sorted(filter(None, (finite(row.get("supervised_tokens_per_s")) for row in train))):
        found.append(("supervised tokens/s, median", _show(speeds[len(speeds) // 2])))
    return found


def _side_by_side(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a table: mappings such as `before` and `after` become columns, single numbers rows of one."""
    groups = {key: value for key, value in evaluation.items() if isinstance(value, dict)}
    single = {key: value for key, value in evaluation.items() if isinstance(value, int | float | str)}
    measures = dict.fromkeys(measure for group in groups.values() for measure in group)
    rows = [[measure, *(_show(group.get(measure, "")) for group in groups.values())] for measure in measures]
    rows += [[key, _show(value), *[""] * (len(groups) - 1)] for key, value in single.items()]
    return ["", *(groups or [""])], rows


def _columns(samples: Sequence[Mapping[str, Any]], heads: Sequence[str] = ()) -> tuple[Sequence[str], list[list[str]]]:
    """A column for each of `heads`, by default for each key."""
    heads = heads or list(dict.fromkeys(key for sample in samples for key in sample))
    return heads, [[_show(sample.get(key, "")) for key in heads] for sample in samples]


def _leaves(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    leaves = flatten(tree).items()
    return [(path, " ".join(map(str, value)) if isinstance(value, list) else _show(value)) for path, value in leaves]


def _files(folder: Path) -> list[tuple[str, str]]:
    if not folder.is_dir():
        return []
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), f"{path.stat().st_size:,} bytes") for path in files]


def _show(value: object) -> str:
    """A value for people: four significant digits of a fraction, thousands apart, lists of chat turns as lines."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if math.isfinite(value) and abs(value) >= 1000:
            return f"{value:,.0f}"
        return f"{value:.4g}"
    if isinstance(value, list):
        return "\n".join(_turn(item) for item in value)
    return str(value)


def _turn(item: object) -> str:
    if isinstance(item, dict) and {"role", "content"} <= item.keys():
        return f"{item['role']}: {item['content']}"
    return str(item)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.3g} s"


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}</title>
<style>
  body { margin: 2rem auto; max-width: 68rem; padding: 0 1.2rem; color: #22262b; background: #fff;
         font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
  h1 { font-size: 1.6rem; margin: 0 0 1rem; }
  h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
  img { width: 100%; height: auto; border: 1px solid #e6e8eb; border-radius: 6px; }
  dl { display: flex; flex-wrap: wrap; gap: .8rem 2.4rem; margin: 0 0 1.4rem; }
  dt { color: #6b727c; font-size: .85rem; }
  dd { margin: 0; font-size: 1.1rem; font-variant-numeric: tabular-nums; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; width: 100%; }
  th { text-align: left; color: #6b727c; font-weight: 600; font-size: .85rem; }
  th, td { padding: .35rem 1rem .35rem 0; border-bottom: 1px solid #e6e8eb; vertical-align: top; }
  td { white-space: pre-wrap; overflow-wrap: anywhere; }
  td:first-child { min-width: 9rem; }
  pre { background: #f6f7f8; padding: .9rem 1.1rem; border-radius: 6px; overflow-x: auto; font-size: .85rem; }
</style>
</head>
<body>
{%- macro table(heads, rows) %}
<div class="scroll"><table>
{%- if heads %}
<tr>{% for head in heads %}<th>{{ head }}</th>{% endfor %}</tr>
{%- endif %}
{%- for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</table></div>
{%- endmacro %}
<h1>{{ name }}</h1>
<dl>
{%- for label, value in results %}
<div><dt>{{ label }}</dt><dd>{{ value }}</dd></div>
{%- endfor %}
</dl>
<img alt="Loss, learning rate, gradient norm and throughput over the steps" src="data:image/png;base64,{{ picture }}">
{% if scores[1] %}<h2>Evaluation</h2>{{ table(scores[0], scores[1]) }}{% endif %}
{% if samples[1] %}<h2>Samples</h2>{{ table(samples[0], samples[1]) }}{% endif %}
{% if choices %}<h2>Choices and their reasons</h2>
<div class="scroll"><table>
<tr><th>choice</th><th>value</th><th>why</th></tr>
{%- for choice in choices %}
<tr>{% for cell in choice %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</table></div>{% endif %}
{% if adapter %}<h2>Adapter</h2>{{ table([], adapter) }}{% endif %}
{% if config %}<h2>Resolved run file</h2><pre>{{ config }}</pre>{% endif %}
{% if environment %}<h2>Environment</h2>{{ table([], environment) }}{% endif %}
</body>
</html>
"""

_ENVIRONMENT = Environment(autoescape=True, undefined=StrictUndefined)
