"""The numbers of a run as the page draws them: columns over steps, what happened when, and where the time went."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_dist.errors import ModelError
from phi3_dist.family.variants import Shape
from phi3_dist.machine.card_measurements import measured_on
from phi3_dist.report.plain_values import count, finite
from phi3_dist.report.run_files import Row, of_kind
from phi3_dist.report.words import shown

__all__ = ["CHARTS", "Span", "columns", "marks", "matrix_rate", "step_parts", "thinned", "time_spans", "total_s"]

ROWS_AT_MOST = 2400
"""Rows that one part of a page holds; beyond, the first, the smallest and the largest loss of each stretch."""
_DIGITS = 6
_STOPPED = re.compile(rb"stopped by (SIG[A-Z]+) after step (\d{1,12})")
_EVENTS = {"skipped": "skipped, not finite", "spike": "the loss jumped"}
_LOG_BYTES = 4 * 2**20
_GAP_S = 1e-6

Columns = dict[str, list[float | int | None]]

CHARTS: tuple[dict[str, Any], ...] = (
    {
        "id": "loss",
        "title": "Loss",
        "unit": "nats per supervised token",
        "smooth": True,
        "large": True,
        "lines": [
            {"part": "train", "key": "loss", "label": "training", "colour": 0},
            {"part": "held_out", "key": "heldout_loss", "label": "held out", "colour": 1, "points": True},
        ],
    },
    {
        "id": "lr",
        "title": "Learning rate",
        "unit": "learning rate",
        "from_zero": True,
        "lines": [{"part": "train", "key": "lr", "label": "learning rate", "colour": 0}],
    },
    {
        "id": "grad_norm",
        "title": "Gradient norm, before clipping",
        "unit": "L2 norm",
        "smooth": True,
        "from_zero": True,
        "lines": [
            {"part": "train", "key": "grad_norm", "label": "gradient norm", "colour": 0},
            {"part": "train", "key": "clip_at", "label": "clipped at", "colour": 3, "limit": True},
        ],
    },
    {
        "id": "speed",
        "title": "Throughput",
        "unit": "tokens/s",
        "smooth": True,
        "from_zero": True,
        "lines": [
            {"part": "train", "key": "supervised_tokens_per_s", "label": "supervised tokens", "colour": 0},
            {"part": "train", "key": "tokens_per_s", "label": "all tokens", "colour": 2},
        ],
    },
    {
        "id": "share",
        "title": "Share of the limit",
        "unit": "% of the measured matrix rate",
        "smooth": True,
        "from_zero": True,
        "lines": [{"part": "train", "key": "share", "label": "of the matrix rate", "colour": 0}],
    },
    {
        "id": "parts",
        "title": "Parts of a step",
        "unit": "seconds",
        "smooth": True,
        "from_zero": True,
        "lines": [
            {"part": "train", "key": "forward_s", "label": "forward", "colour": 0},
            {"part": "train", "key": "backward_s", "label": "backward", "colour": 1},
            {"part": "train", "key": "update_s", "label": "update", "colour": 2},
            {"part": "train", "key": "step_s", "label": "whole step", "colour": 3},
        ],
    },
    {
        "id": "memory",
        "title": "Memory",
        "unit": "GiB",
        "from_zero": True,
        "lines": [
            {"part": "train", "key": "peak_gib", "label": "peak so far", "colour": 0},
            {"part": "train", "key": "planned_gib", "label": "planned", "colour": 1, "limit": True},
            {"part": "train", "key": "have_gib", "label": "there is", "colour": 3, "limit": True},
        ],
    },
)
"""What is drawn: of which part's column, with what label. A chart without a number in any run is left out."""


@dataclass(frozen=True)
class Span:
    """A stretch of time: what it was, in seconds, and a word on how that is known."""

    name: str
    seconds: float
    note: str = ""


def _rounded(value: object) -> float | None:
    found = finite(value)
    return None if found is None or abs(found) > 1e30 else float(f"{found:.{_DIGITS}g}")


def thinned(rows: Sequence[Row], key: str) -> list[Row]:
    """At most `ROWS_AT_MOST` rows: of each stretch the first, and those with the smallest and largest `key`."""
    if len(rows) <= ROWS_AT_MOST:
        return list(rows)
    stretch = -(-3 * len(rows) // ROWS_AT_MOST)
    kept: list[Row] = []
    for begin in range(0, len(rows), stretch):
        part = rows[begin : begin + stretch]
        numbered = [(value, i) for i, row in enumerate(part) if (value := finite(row.get(key))) is not None]
        kept += [part[i] for i in sorted({0, *(pick(numbered)[1] for pick in (min, max) if numbered)})]
    return kept


def columns(
    rows: Sequence[Row], constants: Mapping[str, float | None], rate: tuple[float, float]
) -> dict[str, Columns]:
    """The parts `train` and `held_out`, each a list of steps and one of each measure; None where a row lacks it.

    `constants` are the same at every step. `rate`: FLOPs of a token and FLOP/s that the devices can do together, 0
    where unknown.
    """
    found: dict[str, Columns] = {}
    for part, kind, key in (("train", "train", "loss"), ("held_out", "eval", "heldout_loss")):
        of = thinned(of_kind(rows, kind), key)
        names = [line["key"] for chart in CHARTS for line in chart["lines"] if line["part"] == part]
        table: Columns = {"step": [row["step"] for row in of]}
        table |= {name: [_rounded(row.get(name)) for row in of] for name in names}
        if part == "train":
            table |= {name: [value] * len(of) for name, value in constants.items() if value is not None}
            if rate[0] and rate[1]:
                speeds = [finite(row.get("tokens_per_s")) for row in of]
                table["share"] = [None if s is None else _rounded(100 * s * rate[0] / rate[1]) for s in speeds]
        found[part] = {name: values for name, values in table.items() if name == "step" or any_number(values)}
    return found


def any_number(values: Sequence[float | int | None]) -> bool:
    return any(value is not None for value in values)


def matrix_rate(plan: Mapping[str, Any], lora_parameters: float) -> tuple[float, float]:
    """FLOPs that a token of training needs at least, and FLOP/s of all devices as measured; 0 for what isn't known.

    A frozen weight of a linear layer takes 2 FLOPs a token forward and 2 for its input's gradient, a LoRA weight 6.
    The head and attention depend on the rows and are left out: the share is a lower bound.
    """
    identity, hardware = plan.get("identity"), plan.get("hardware")
    if not isinstance(identity, dict):
        return 0.0, 0.0
    keys = {
        key.removeprefix("base config."): value for key, value in identity.items() if key.startswith("base config.")
    }
    try:
        shape = Shape.of(keys)
        weights = float(shape.layers * sum(i * o for i, o in shape.linear_sizes.values()))
    except (ModelError, TypeError, ZeroDivisionError, OverflowError):
        return 0.0, 0.0
    device = hardware.get("device") if isinstance(hardware, dict) and plan.get("device") == "cuda" else None
    rate = finite(measured_on(str(device)).get("matrix_rate_tflops")) if device else None
    world = count(plan.get("world_size")) or 1
    return 4.0 * weights + 6.0 * lora_parameters, (rate or 0.0) * 1e12 * world


def marks(rows: Sequence[Row], run_folder: Path, state: str) -> list[dict[str, Any]]:
    """What happened at which step: stops and resumes, skipped steps, jumps of the loss, and the end of a run that did
    not finish."""
    found: list[tuple[int, str, str]] = []
    for row in rows:
        step, kind = count(row.get("step")), row.get("kind")
        if step is None:
            continue
        if kind == "start" and step > 1:
            found.append((step - 1, "resumed", f"resumed after step {step - 1}"))
        elif isinstance(kind, str) and kind in _EVENTS:
            found.append((step, kind, f"step {step}: {_EVENTS[kind]}, in rows {shown(row.get('rows'))[:200]}"))
    found += [(step, "stopped", f"stopped by {name} after step {step}") for name, step in _stops(run_folder)]
    steps = [step for row in rows if (step := count(row.get("step"))) is not None]
    if steps and state in {"failed", "lost"}:
        found.append((max(steps), state, f"{state} after step {max(steps)}"))
    found = sorted(dict.fromkeys(found), key=lambda mark: (mark[0], mark[1] == "resumed"))  # a stop, then its resume
    return [{"step": step, "kind": kind, "text": text[:300]} for step, kind, text in found][:400]


def _stops(run_folder: Path) -> list[tuple[str, int]]:
    """Signals that stopped the run and the step after which, as rank 0 has told."""
    try:
        with (run_folder / "logs" / "terminal" / "rank_000.log").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _LOG_BYTES))
            text = file.read(_LOG_BYTES)
    except OSError:
        return []
    return [(name.decode(), int(step)) for name, step in _STOPPED.findall(text)]


def total_s(rows: Sequence[Row]) -> float:
    """Seconds from the first evaluation to the last row, summed over the starts of a run."""
    whole = before = 0.0
    for row in rows:
        elapsed = finite(row.get("elapsed_s")) if row.get("kind") == "train" else None
        if elapsed is not None:
            whole, before = whole + (before if elapsed < before - _GAP_S else 0.0), elapsed
    return whole + before


def time_spans(rows: Sequence[Row]) -> list[Span]:
    """Where the time of a run went, over all its starts."""
    starts = [row for row in rows if row.get("kind") == "start"]
    spans: dict[str, float] = {}
    for row in starts:
        for key, value in row.items():
            seconds = finite(value)
            if key.endswith("_s") and key not in {"total_s", "held_out_s", "first_step_s"} and seconds is not None:
                spans[key.removesuffix("_s")] = spans.get(key.removesuffix("_s"), 0.0) + seconds
    found = [Span(f"start: {name.replace('_', ' ')}", seconds) for name, seconds in spans.items()]
    evaluations, saves = (
        sum(value for row in rows if row.get("kind") == kind and (value := finite(row.get(key))) is not None)
        for kind, key in (("eval", "eval_s"), ("save", "save_s"))
    )
    whole = total_s(rows)
    if whole:
        found.append(Span("training steps", max(0.0, whole - evaluations - saves), "what is left of the whole"))
    found += [Span("held-out loss", evaluations), Span("checkpoints", saves)]
    return [span for span in found if span.seconds > 0]


def step_parts(rows: Sequence[Row]) -> list[Span]:
    """The median of each part of a logged step, and what is left of the median step."""
    train = of_kind(rows, "train")[1:] or of_kind(rows, "train")  # the first one allocates and compiles
    medians = {}
    for key in ("forward_s", "backward_s", "update_s", "step_s"):
        values = sorted(value for row in train if (value := finite(row.get(key))) is not None)
        medians[key] = values[len(values) // 2] if values else None
    parts = [Span(key.removesuffix("_s"), value) for key, value in medians.items() if value is not None]
    whole = medians["step_s"]
    if whole is None or len(parts) < 4:
        return []
    rest = whole - sum(part.seconds for part in parts[:3])
    return [*parts[:3], Span("the rest", max(0.0, rest), "data, numbers read, waiting for other ranks")]
