"""The notebooks in examples/ run as they are, and say what they said when they were made."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks.launcher import REPO

NOTEBOOKS = sorted((REPO / "examples").glob("*.ipynb"))


def cells(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_is_whole_and_was_run(path: Path) -> None:
    """Python's own syntax in every cell, each executed in order without an error, and no path of a machine."""
    assert [cell["execution_count"] for cell in cells(path)] == list(range(1, len(cells(path)) + 1))
    for cell in cells(path):
        ast.parse("".join(cell["source"]))
        assert not any(output["output_type"] == "error" for output in cell["outputs"])
    assert all(cell["outputs"] for cell in cells(path)[1:])
    assert str(REPO) not in path.read_text("utf-8")


def said_by_rows_to_answers(names: dict[str, Any], out: str) -> None:
    assert names["result"].state == "finished"
    assert names["judged"].numbers["exact_match"] == 1
    assert out.endswith("latte: 3.20\nscone: 2.40\n")


def said_by_inference(names: dict[str, Any], out: str) -> None:
    assert "Paris" in out
    assert names["together"] == names["alone"]
    assert len(names["talk"].turns) == 4


def said_by_qlora_to_served(names: dict[str, Any], out: str) -> None:
    assert names["result"].state == "finished"
    assert names["judged"].differences["exact_match"].low > 0.3
    assert names["apart"] == names["whole"]
    assert "--max-lora-rank 16" in out


SAID = {
    "inference": said_by_inference,
    "qlora_to_served": said_by_qlora_to_served,
    "rows_to_answers": said_by_rows_to_answers,
}


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells(path), start=1):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    SAID[path.stem](names, capsys.readouterr().out)
