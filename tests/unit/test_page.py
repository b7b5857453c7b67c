"""The page of a run: self-contained, complete, and safe with whatever the model wrote."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from phi3_dist.errors import RunFolderError
from phi3_dist.report.page import write_page

VOID = {"meta", "img", "link", "br"}


class Reader(HTMLParser):
    """Tables by the heading above them, definition pairs, references to elsewhere, and tags left open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.heading = ""
        self.tables: dict[str, list[list[str]]] = {}
        self.results: list[str] = []
        self.references: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in {"src", "href", "srcset"}]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.heading = ""
        if tag == "tr":
            self.tables.setdefault(self.heading, []).append([])
        if tag in {"td", "th"}:
            self.tables[self.heading][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        inside = self.open[-1] if self.open else ""
        if inside == "h2":
            self.heading += data
        if inside in {"td", "th"}:
            self.tables[self.heading][-1][-1] += data
        if inside in {"dt", "dd"}:
            self.results.append(data)


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    train = {"kind": "train", "loss": 0.51239, "lr": 1e-4, "grad_norm": 0.4, "elapsed_s": 3725.0}
    rows: list[dict[str, Any]] = [
        {"kind": "eval", "step": 10, "heldout_loss": 1.5, "heldout_perplexity": 4.4817},
        train | {"step": 20, "supervised_tokens_per_s": 1234.5, "tokens_per_s": 4000.0},
        {"kind": "eval", "step": 20, "heldout_loss": 0.5, "heldout_perplexity": 1.6487},
    ]
    files = {
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "config.yaml": "name: roman\nmodel:\n  source: <local & folder>\n",
        "plan.json": json.dumps({"choices": [{"name": "precision", "value": "fp32", "why": "no fast bf16 here"}]}),
        "environment.json": json.dumps({"versions": {"torch": "2.13.0"}, "command": ["phi3-dist", "train"]}),
        "evaluation.json": json.dumps(
            {
                "before": {"exact_match": 0.0},
                "after": {"exact_match": 0.9375},
                "rows": 48,
                "samples": [{"prompt": [{"role": "user", "content": "9?"}], "after": "<script>alert(1)</script>"}],
            }
        ),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(bytes(12345))
    return tmp_path


def test_the_page_holds_every_part_of_the_run(run_folder: Path) -> None:
    page = write_page(run_folder)
    assert page == run_folder / "report.html"
    reader = read(page)
    results = dict(zip(reader.results[::2], reader.results[1::2], strict=True))
    assert results == {
        "steps": "20",
        "training loss, last row": "0.5124",
        "held-out loss": "0.5 (1.5 after step 10)",
        "held-out perplexity": "1.649 (4.482 after step 10)",
        "time": "1 h 02 min",
        "supervised tokens/s, median": "1,234",
    }
    assert reader.tables["Choices and their reasons"][1] == ["precision", "fp32", "no fast bf16 here"]
    assert reader.tables["Evaluation"] == [["", "before", "after"], ["exact_match", "0", "0.9375"], ["rows", "48", ""]]
    assert reader.tables["Samples"] == [["prompt", "after"], ["user: 9?", "<script>alert(1)</script>"]]
    assert reader.tables["Adapter"] == [["adapter_model.safetensors", "12,345 bytes"]]
    assert reader.tables["Environment"] == [["versions.torch", "2.13.0"], ["command", "phi3-dist train"]]
    assert "source: <local & folder>" in reader.text


def test_nothing_is_loaded_from_elsewhere(run_folder: Path) -> None:
    page = write_page(run_folder)
    text = page.read_text(encoding="utf-8")
    (picture,) = read(page).references
    kind, _, data = picture.partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == (run_folder / "curves.png").read_bytes()
    assert not re.search(r"https?://|@import|url\(|<script|<link", text)


def test_parts_that_a_run_has_not_written_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    reader = read(write_page(tmp_path))
    assert reader.tables == {}
    assert reader.results == ["steps", "1", "training loss, last row", "2"]


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_broken_file_is_named(run_folder: Path, content: str) -> None:
    (run_folder / "plan.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"plan\.json: is not (a )?JSON"):
        write_page(run_folder)


def test_a_folder_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no metrics\.jsonl"):
        write_page(tmp_path)


def test_odd_values_are_shown_or_left_out(run_folder: Path) -> None:
    """Null times, steps that are none, samples and choices that are no mappings, half of a pair of code units."""
    with (run_folder / "metrics.jsonl").open("a") as file:
        for step in (None, "21", [], True, -1, 10**400, 1.5):
            row = {"kind": "train", "step": step, "loss": None, "elapsed_s": None, "supervised_tokens_per_s": "fast"}
            file.write(json.dumps(row) + "\n" + json.dumps({**row, "kind": "eval", "heldout_loss": 10**400}) + "\n")
    samples = [None, 1, "text", {"prompt": "half \ud800 of it"}, ["a", {"role": "user", "content": None}]]
    (run_folder / "evaluation.json").write_text(json.dumps({"samples": samples, "before": None, "rows": None}))
    (run_folder / "plan.json").write_text(json.dumps({"choices": [None, "x", {"name": "precision"}]}))
    (run_folder / "config.yaml").write_text("name: 'a[/]b \u2615 $x^2$'\n", encoding="utf-8")
    page = read(write_page(run_folder))
    assert "a[/]b \u2615 $x^2$" in page.text
    assert ["", "half \\ud800 of it"] in page.tables["Samples"]
    assert ["precision", "", ""] in page.tables["Choices and their reasons"]
    for name, content in (("evaluation.json", '{"samples": 5}'), ("plan.json", '{"choices": {"a": 1}}')):
        (run_folder / name).write_text(content)
    assert read(write_page(run_folder)).tables["Samples"][1:] == [["5"]]
