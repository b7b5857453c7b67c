"""What a person sees of a sweep: its page, the list of runs, the table while it trains."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from phi3_dist.cli.app import app
from phi3_dist.errors import RunFolderError
from phi3_dist.report.importance import importance_of
from phi3_dist.report.parallel_coordinates import parallel_of
from phi3_dist.report.runs import list_runs, runs_table
from phi3_dist.report.sweeps import write_sweep_page
from phi3_dist.sweep.table import Board


def sweep_folder(folder: Path, count: int = 8) -> Path:
    """A sweep over rate and rank whose loss follows the rate; the worst two ended early."""
    candidates = []
    for i in range(count):
        rate, rank = (1e-2, 3e-3, 1e-3, 3e-4)[i % 4], (8, 16)[i // 4 % 2]
        loss = 1 + abs(math.log10(rate) + 2.5) + 0.001 * rank
        name, early = f"lr_{rate:g}_r_{rank}", i % 4 == 3
        run = folder / name
        run.mkdir(parents=True)
        values = {"name": name, "optim": {"lr": rate}, "lora": {"r": rank}, "model": {"source": "tiny-random"}}
        (run / "config.yaml").write_text(yaml.safe_dump(values))
        steps = 4 if early else 8
        rows: list[dict[str, Any]] = [{"kind": "eval", "step": 0, "heldout_loss": 3.0}]
        for step in range(1, steps + 1):
            rows.append({"kind": "train", "step": step, "loss": loss + 1 / step, "lr": rate})
            if step % 4 == 0:
                rows.append({"kind": "eval", "step": step, "heldout_loss": loss + 1 / step})
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        state = "ended early" if early else "finished"
        (run / "exit.json").write_text(json.dumps({"state": state, "code": 0, "time": 1.7e9}))
        candidates.append(
            {"name": name, "folder": name, "settings": {"optim.lr": rate, "lora.r": rank}, "state": state,
             "why": "worst at step 4" if early else "", "step": steps, "steps": 8, "loss": loss + 1 / steps,
             "heldout_loss": loss + 1 / steps}
        )  # fmt: skip
    candidates.sort(key=lambda one: (one["state"] != "finished", one["heldout_loss"]))
    said = {"name": "rates", "differing": ["optim.lr", "lora.r"], "candidates": candidates, "early": []}
    (folder / "sweep.json").write_text(json.dumps(said))
    return folder


def test_the_page_ranks_draws_and_weighs(tmp_path: Path) -> None:
    folder = sweep_folder(tmp_path / "rates")
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert (done.exit_code, done.output) == (0, f"page: {folder}/sweep.html\n")
    page = (folder / "sweep.html").read_text()
    assert page.index("lr_0.003_r_8") < page.index("lr_0.01_r_16")  # the ranking comes first
    assert page.count('<polyline points="') == 8
    assert page.count('stroke-dasharray="6 4"') == 2
    assert "held-out loss after step 4, the last that all 8 candidates have" in page
    assert page.index('<th scope="row">optim.lr</th><td class="number">') < page.index(
        '<th scope="row">lora.r</th><td class="number">'
    )
    again = CliRunner().invoke(app, ["report", str(folder)])
    assert again.exit_code == 0
    said = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({**said, "differing": 5}))
    write_sweep_page(folder)  # by what the runs say
    (folder / "sweep.html").write_text("<p>mine</p>")
    with pytest.raises(RunFolderError, match="nothing is replaced"):
        write_sweep_page(folder)
    (folder / "sweep.json").write_text("{}")
    with pytest.raises(RunFolderError, match="names no candidate that has trained"):
        write_sweep_page(folder, tmp_path / "other.html")
    (folder / "sweep.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"sweep\.json: is not JSON"):
        write_sweep_page(folder, tmp_path / "other.html")


def test_what_the_numbers_carry_is_told_and_what_they_do_not_is_not() -> None:
    losses = [1.0, 1.1, 2.0, 2.1, 1.05, 1.15, 2.05, 2.15]
    values = {
        "rate": [1, 1, 2, 2, 1, 1, 2, 2],
        "noise": [1, 2, 1, 2, 2, 1, 2, 1],
        "like_rate": ["a", "a", "b", "b", "a", "a", "b", "b"],
        "order": [1, 2, 5, 6, 1.5, 3, 5.5, 7],
        "names": ["a", "b", "c", "d", "e", "f", "g", "h"],
    }
    found = {one.key: one for one in importance_of(values, losses)}
    assert found["rate"].share == pytest.approx(0.98, abs=0.02)
    assert (found["rate"].chance or 1) < 0.05
    assert found["rate"].best == ("1", pytest.approx(1.075), 4)
    assert found["rate"].note == "always changes together with like_rate"
    assert (found["noise"].share, found["noise"].note) == (0.0, "")
    assert (found["noise"].chance or 0) > 0.3
    assert found["order"].share == pytest.approx(1.0, abs=0.05)
    assert "lower is better" in found["order"].note
    assert (found["names"].share, found["names"].note) == (None, "no value occurs twice, and they have no order")
    assert next(iter(importance_of(values, losses))).key in {"rate", "like_rate", "order"}
    assert importance_of({"rate": [1, 2]}, [1.0, 2.0])[0].share is None


def test_a_wide_axis_is_logarithmic_and_the_best_line_is_drawn_last() -> None:
    found = parallel_of(["a", "b", "c"], [("rate", [1, 10, 100]), ("loss", [2.0, 1.0, math.inf])], [True, True, False])
    heights = [y for y, _ in found.axes[0].ticks]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2])
    assert [(line.name, line.rank, line.whole) for line in found.lines] == [
        ("c", 1.0, False), ("a", 0.5, True), ("b", 0.0, True)
    ]  # fmt: skip
    assert found.lines[-1].tooltip == "b: rate 10; loss 1"


def test_runs_groups_the_candidates_of_a_sweep_by_their_ranking(tmp_path: Path) -> None:
    sweep_folder(tmp_path / "rates", 4)
    console = Console(file=io.StringIO(), width=200)
    console.print(runs_table(list_runs(tmp_path), base=tmp_path))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    said = "rates: sweep of 4 candidates, 3 finished, 1 ended early; first is lr_0.003_r_8, held-out loss 1.1559"
    assert lines[1].strip() == said
    assert [line.split()[:2] for line in lines[2:]] == [
        ["1", "lr_0.003_r_8"], ["2", "lr_0.01_r_8"], ["3", "lr_0.001_r_8"], ["4", "lr_0.0003_r_8"]
    ]  # fmt: skip
    assert "ended early" in lines[5]


def candidate(name: str, loss: float) -> Any:
    return SimpleNamespace(name=name, state="running", done=3, total=9, losses=lambda: (loss, loss + 0.1))


@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_is_rewritten_on_a_terminal_and_lines_come_elsewhere(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi3_dist.sweep.table.SHOW_S", 0.0)
    monkeypatch.setattr("phi3_dist.sweep.table.REWRITE_S", 0.0)
    board = Board(SimpleNamespace(), [candidate(f"one_{i}", 1.0 + i) for i in range(30)], active=True)  # type: ignore[arg-type]
    out = io.StringIO()
    board.console = Console(file=out, force_terminal=terminal, width=100, height=20, soft_wrap=True, _environ={})
    with board:
        board.step()
        board.say("one_3: something")
        board.step()
    said = out.getvalue()
    assert ("\x1b[" in said) is terminal
    assert ("and 15 more" in said) is terminal
    assert said.count("sweep: 90 of at most 270 steps") == (0 if terminal else 2)
    assert "one_3: something" in said
    assert "1.1000" in said
