"""The picture of a run: what is drawn, and the metrics files it has to live with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from phi3_dist.errors import RunFolderError
from phi3_dist.report.curves_png import draw_curves
from phi3_dist.report.run_files import read_metrics, run_name


def train_row(step: int, **more: Any) -> dict[str, Any]:
    row = {"kind": "train", "step": step, "epoch": step / 10, "loss": 2.0 / step, "lr": 2e-4 / step, "grad_norm": 0.5}
    speed = {"step_s": 0.5, "supervised_tokens": 50, "tokens": 200, "elapsed_s": step / 2}
    return row | speed | {"supervised_tokens_per_s": 100.0, "tokens_per_s": 400.0} | more


def eval_row(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "heldout_loss": loss, "heldout_perplexity": 2.0, "supervised_tokens": 9}


def write(folder: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that `draw_curves` saves, to look into."""
    seen: list[Figure] = []
    save = Figure.savefig

    def watch(self: Figure, *args: Any, **options: Any) -> None:
        seen.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", watch)
    return seen


def panel(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    return {str(line.get_label()): [(float(x), float(y)) for x, y in line.get_xydata()] for line in axes.lines}


def test_every_measure_is_drawn_at_its_steps(tmp_path: Path, figure: list[Figure]) -> None:
    (tmp_path / "config.yaml").write_text("name: a $run$ with 100%\n")
    rows = [train_row(1), train_row(2), eval_row(2, 0.9), train_row(4), eval_row(4, 0.5)]
    picture = draw_curves(write(tmp_path, rows))

    assert picture == tmp_path / "curves.png"
    assert not list(tmp_path.glob("*.partial"))
    pixels = imread(picture)[..., :3]
    assert pixels.shape[0] > 600
    assert pixels.std() > 0.02  # something is on it

    (drawn,) = figure
    assert drawn.get_suptitle() == "a $run$ with 100%"
    assert lines(panel(drawn, "loss")) == {"training": [(1, 2), (2, 1), (4, 0.5)], "held out": [(2, 0.9), (4, 0.5)]}
    assert list(lines(panel(drawn, "learning rate")).values()) == [[(1, 2e-4), (2, 1e-4), (4, 5e-5)]]
    assert list(lines(panel(drawn, "gradient norm")).values()) == [[(1, 0.5), (2, 0.5), (4, 0.5)]]
    speeds = lines(panel(drawn, "throughput"))
    assert speeds["supervised tokens"] == [(1, 100), (2, 100), (4, 100)]
    assert speeds["all tokens"] == [(1, 400), (2, 400), (4, 400)]
    assert all(axes.get_xlabel() == "step" and axes.get_ylabel() for axes in drawn.axes)
    assert len({axes.get_xlim() for axes in drawn.axes}) == 1


def test_learning_rates_are_labelled_as_people_write_them(tmp_path: Path, figure: list[Figure]) -> None:
    draw_curves(write(tmp_path, [train_row(1), train_row(2)]))
    label = panel(figure[0], "learning rate").yaxis.get_major_formatter()
    assert [label(value) for value in (0, 2e-4, 1.5e-4, 5e-6, 0.001)] == ["0", "2e-4", "1.5e-4", "5e-6", "1e-3"]


def test_a_long_run_also_gets_a_centred_mean(tmp_path: Path, figure: list[Figure]) -> None:
    draw_curves(write(tmp_path, [train_row(step, loss=float(step)) for step in range(1, 101)]))
    drawn = lines(panel(figure[0], "loss"))
    assert len(drawn["training, as logged"]) == 100
    assert drawn["training, mean over 5 rows"][50] == (51, 51)  # a straight line's centred mean is the line
    assert drawn["training, mean over 5 rows"][0] == (1, 2)  # mean of 1, 2, 3


def test_one_row_and_a_missing_kind(tmp_path: Path, figure: list[Figure]) -> None:
    draw_curves(write(tmp_path, [train_row(1)]))
    draw_curves(write(tmp_path, [eval_row(5, 0.7)]))
    only_train, only_eval = figure
    assert list(lines(panel(only_train, "loss"))) == ["training"]
    assert list(lines(panel(only_eval, "loss"))) == ["held out"]
    assert [text.get_text() for text in panel(only_eval, "gradient norm").texts] == ["not measured"]


def test_numbers_that_are_none_or_not_finite_leave_a_gap(tmp_path: Path, figure: list[Figure]) -> None:
    rows = [train_row(1), train_row(2, loss=float("nan"), grad_norm=None), train_row(3, grad_norm=float("inf"))]
    draw_curves(write(tmp_path, rows))
    assert [step for step, _ in lines(panel(figure[0], "loss"))["training"]] == [1, 3]
    assert [len(points) for points in lines(panel(figure[0], "gradient norm")).values()] == [1]


def test_a_step_made_again_after_resume_counts_once(tmp_path: Path, figure: list[Figure]) -> None:
    draw_curves(write(tmp_path, [train_row(1), train_row(2, loss=9.0), train_row(2, loss=1.5), train_row(3)]))
    assert lines(panel(figure[0], "loss"))["training"][:2] == [(1, 2.0), (2, 1.5)]


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    rows = [train_row(1), train_row(2)]
    assert read_metrics(write(tmp_path, rows, tail='{"kind": "train", "step": 3, "lo')) == rows
    assert draw_curves(tmp_path).is_file()


def test_bad_lines_before_the_last_are_all_named(tmp_path: Path) -> None:
    path = write(tmp_path, [train_row(1)], tail='{"kind"\n[1]\n{"kind": "eval", "step": 1}\n') / "metrics.jsonl"
    with pytest.raises(RunFolderError) as caught:
        read_metrics(tmp_path)
    assert [problem.where for problem in caught.value.problems] == [f"{path}:2", f"{path}:3"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (None, "no such folder"),
        ({}, "no metrics.jsonl in it"),
        ({"metrics.jsonl": ""}, "no row in it yet"),
        ({"metrics.jsonl": '{"kind": "tr'}, "no row in it yet"),
        ({"metrics.jsonl": '{"kind": "eval", "step": 1}\n', "config.yaml": "name: a: b"}, "not YAML"),
    ],
)
def test_a_folder_that_cannot_be_drawn(tmp_path: Path, files: dict[str, str] | None, says: str) -> None:
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(RunFolderError, match=says):
        draw_curves(folder)
    assert not (folder / "curves.png").exists()


def test_the_name_is_the_folders_where_the_config_has_none(tmp_path: Path) -> None:
    folder = tmp_path / "my-run"
    folder.mkdir()
    assert run_name(folder) == "my-run"
    (folder / "config.yaml").write_text("name: ''\n")
    assert run_name(folder) == "my-run"
