"""A run's metrics as one picture: `metrics.jsonl` in, `curves.png` out. No torch, no display."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from phi3_dist.report.plain_values import finite
from phi3_dist.report.run_files import Row, of_kind, read_metrics, run_name, written

__all__ = ["draw_curves"]

BLUE, ORANGE, GREY, INK = "#2463a8", "#d9601a", "#8a919c", "#22262b"
FEW_POINTS = 40  # up to here each point gets a marker
SMOOTH_FROM = 60  # from here on the loss also gets a running mean
SIZE_IN = (11.0, 7.0)
DPI = 120
LARGEST = 1e30  # beyond it no axis can be drawn


def draw_curves(run_folder: Path) -> Path:
    """Draw the loss and held-out loss, learning rate, gradient norm and tokens per second over the steps of a run.

    Returns the path of `curves.png` in the run folder; a picture that was there is replaced as a whole.
    Raises RunFolderError as `read_metrics` does.
    """
    rows = read_metrics(run_folder)
    train, held_out = of_kind(rows, "train"), of_kind(rows, "eval")

    spacing = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=SIZE_IN, dpi=DPI, layout=spacing, facecolor="white")
    title = run_name(run_folder)
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold", color=INK, parse_math=False)
    grid = figure.add_gridspec(2, 3, height_ratios=(1.35, 1))
    _draw_loss(figure.add_subplot(grid[0, :]), train, held_out)
    rate = figure.add_subplot(grid[1, 0])
    _draw_panel(rate, "learning rate", "lr", train, {"lr": ""})
    rate.yaxis.set_major_formatter(FuncFormatter(_short_power))
    _draw_panel(figure.add_subplot(grid[1, 1]), "gradient norm, before clipping", "L2 norm", train, {"grad_norm": ""})
    speeds = {"tokens_per_s": "all tokens", "supervised_tokens_per_s": "supervised tokens"}
    speed = figure.add_subplot(grid[1, 2])
    _draw_panel(speed, "throughput", "tokens/s", train, speeds)
    speed.yaxis.set_major_formatter(EngFormatter())

    _share_steps(figure.axes, [row["step"] for row in (*train, *held_out)])

    picture = run_folder / "curves.png"
    with written(picture) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a name in letters that the font lacks
        figure.savefig(partial, format="png")
    return picture


def _series(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one measure, without rows that lack it or hold no number that can be drawn."""
    points = [(row["step"], finite(row.get(key))) for row in rows]
    drawn = [(step, value) for step, value in points if value is not None and abs(value) < LARGEST]
    return [step for step, _ in drawn], [value for _, value in drawn]


def _draw_loss(axes: Axes, train: Sequence[Row], held_out: Sequence[Row]) -> None:
    _dress(axes, "loss", "nats per supervised token")
    steps, losses = _series(train, "loss")
    if len(steps) >= SMOOTH_FROM:
        window = max(5, len(steps) // 25) | 1  # odd, so that it has a middle
        axes.plot(steps, losses, color=BLUE, linewidth=0.8, alpha=0.35, label="training, as logged")
        axes.plot(
            steps, _running_mean(losses, window), color=BLUE, linewidth=2, label=f"training, mean over {window} rows"
        )
    elif steps:
        axes.plot(steps, losses, color=BLUE, linewidth=1.6, marker="o", markersize=3.5, label="training")
    steps, losses = _series(held_out, "heldout_loss")
    if steps:
        axes.plot(steps, losses, color=ORANGE, linewidth=2, marker="o", markersize=5.5, label="held out", zorder=3)
        axes.annotate(
            f"{losses[-1]:.3f}", (steps[-1], losses[-1]), xytext=(9, -3), textcoords="offset points",
            ha="left", color=ORANGE, fontweight="bold",
        )  # fmt: skip
    if axes.lines:
        axes.legend(frameon=False, labelcolor=INK)
    else:
        _say_empty(axes)


def _draw_panel(axes: Axes, title: str, unit: str, rows: Sequence[Row], measures: dict[str, str]) -> None:
    """One small panel: each measure's key and legend label; the value axis starts at 0."""
    _dress(axes, title, unit)
    colours = (BLUE,) if len(measures) == 1 else (GREY, BLUE)
    for (key, label), colour in zip(measures.items(), colours, strict=True):
        steps, values = _series(rows, key)
        marker = "o" if 0 < len(steps) <= FEW_POINTS else ""
        if steps:
            axes.plot(steps, values, color=colour, linewidth=1.4, marker=marker, markersize=2.5, label=label)
    if not axes.lines:
        _say_empty(axes)
        return
    axes.set_ylim(bottom=0)
    if len(measures) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def _dress(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(unit, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))


def _share_steps(panels: Sequence[Axes], steps: Sequence[int]) -> None:
    """One range of steps for all panels, so that what happened together stands one above the other."""
    if not steps:
        return
    first, last = min(steps), max(steps)
    margin = 0.02 * (last - first) or 1.0
    for axes in panels:
        if axes.lines:
            axes.set_xlim(first - margin, last + margin)


def _say_empty(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=GREY)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the `window` values around each place (of fewer at both ends), so that it does not lag behind."""
    around = [values[max(0, i - window // 2) : i + window // 2 + 1] for i in range(len(values))]
    return [math.fsum(part) / len(part) for part in around]


def _short_power(value: float, _position: int | None = None) -> str:
    """A learning rate as people write it: 2e-4, 1.5e-4, 0."""
    if not value:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
