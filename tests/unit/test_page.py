"""The page of a run: self-contained, complete, and safe with whatever a row, a name or a model holds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer.main

from docs.generated import verbs_of
from phi3_dist.cli import app
from phi3_dist.errors import RunFolderError
from phi3_dist.report import page, page_charts
from phi3_dist.report.page import UPLOT_VERSION, write_comparison, write_page
from phi3_dist.report.tables import defaults

VOID = {"meta", "img", "link", "br", "input", "rect"}
HUGE = {f"base config.{key}": 10**300 for key in ("num_hidden_layers", "hidden_size", "intermediate_size")}
HUGE |= {"base config.num_attention_heads": 1, "base config.vocab_size": 1}
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&"
HARDWARE = {"device": "NVIDIA H200", "device_memory_gib": 139.8, "host_memory_gib": 256.0, "cores": 48}
SHAPE = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "vocab_size": 320}

CARD = (
    "# it\n\n## How to load it\n\n```python\nload()\n```\n\n## How to serve it\n\n```bash\nserve <it>\n```\n\n## Data\n"
)


class Reader(HTMLParser):
    """Tables by the heading above them, facts by label, references to elsewhere, scripts, and tags left open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.heading = ""
        self.tables: dict[str, list[list[str]]] = {}
        self.facts: dict[str, str] = {}
        self.references: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.handlers: list[str] = []
        self.marked: list[str] = []
        self.text = self.data = self._label = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in {"src", "href", "srcset"}]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append(dict(attrs))
        if tag == "h2":
            self.heading = ""
        if tag == "dt":
            self._label = ""
        if tag == "mark":
            self.marked.append("")
        if tag == "tr":
            self.tables.setdefault(self.heading, []).append([])
        if tag in {"td", "th"}:
            self.tables[self.heading][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.data += data if self.scripts[-1].get("id") == "data" else ""
            return
        self.text += data
        if "h2" in self.open:
            self.heading += data
        if {"td", "th"} & set(self.open):
            self.tables[self.heading][-1][-1] += data
        if "mark" in self.open:
            self.marked[-1] += data
        if "dt" in self.open:
            self._label += data
        if "dd" in self.open:
            self.facts[self._label] = " ".join(f"{self.facts.get(self._label, '')} {data}".split())


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def drawn(path: Path) -> dict[str, Any]:
    """What the page's script gets to draw."""
    return dict(json.loads(read(path).data))


def write_run(folder: Path, *, lr: float = 1e-4, **files: Any) -> Path:
    """A run that has ended, as its files tell it."""
    train = {"kind": "train", "loss": 0.51239, "lr": lr, "grad_norm": 0.4, "tokens_per_s": 4000.0, "peak_gib": 11.5}
    train |= {"step_s": 1.0, "forward_s": 0.3, "backward_s": 0.5, "update_s": 0.1, "supervised_tokens_per_s": 1234.5}
    rows: list[dict[str, Any]] = [
        {"kind": "eval", "step": 0, "heldout_loss": 1.5, "heldout_perplexity": 4.4817, "eval_s": 2.0},
        train | {"step": 10, "elapsed_s": 3000.0},
        {"kind": "start", "step": 1, "imports_s": 11.0, "model_s": 4.0, "first_step_s": 1.0, "total_s": 16.0},
        train | {"step": 20, "elapsed_s": 3725.0},
        {"kind": "eval", "step": 20, "heldout_loss": 0.5, "heldout_perplexity": 1.6487, "eval_s": 3.0},
    ]
    plan = {
        "steps": 20, "device": "cuda", "world_size": 2, "nodes": 1, "strategy": "ddp", "precision": "bf16",
        "choices": [{"name": "precision", "value": "bf16", "why": "tensor cores"}], "hardware": HARDWARE,
        "memory": [{"name": "base weights", "gib": 7.1, "formula": "3.8 B × 2 B", "place": "device"}],
        "parameters": {"total": 1_000_000, "trainable": 10_000},
        "lengths": {"train": {"rows": 900, "packs": 40, "tokens": 80_000, "supervised_tokens": 20_000,
                              "pack_length": 2048,
                              "row_tokens": {"up_to": [100, 200], "count": [600, 300]}}},
        "identity": {f"base config.{key}": value for key, value in SHAPE.items()},
    }  # fmt: skip
    config = f"name: roman\nmodel:\n  source: <local & folder>\nlora:\n  r: 16\noptim:\n  lr: {lr}\n  eps: 1.0e-08\n"
    evaluation = {
        "before": {"exact_match": 0.0},
        "after": {"exact_match": 0.9375},
        "rows": 48,
        "samples": [
            {"prompt": [{"role": "user", "content": "9?"}], "wanted": "IX", "before": EVIL, "after": "IX"},
            {"prompt": "10?", "wanted": "X", "after": "XX"},
        ],
    }
    content: dict[str, Any] = {
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "config.yaml": config,
        "plan.json": plan,
        "environment.json": {"versions": {"torch": "2.13.0"}, "command": ["phi3-dist", "train", "a.yaml", "lora.r=16"]},
        "evaluation.json": evaluation,
        "exit.json": {"code": 0, "state": "finished", "time": 1.0},
    }
    content |= {name.replace("_", "."): value for name, value in files.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in content.items():
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(bytes(12345))
    (folder / "adapter" / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def test_the_first_screen_says_what_was_trained_on_what_and_how_well(run_folder: Path) -> None:
    path = write_page(run_folder)
    assert path == run_folder / "report.html"
    facts = read(path).facts
    assert facts["held-out loss"] == "0.5 from 1.5 at step 0"
    assert facts["exact match"] == "94% 0% before"
    assert facts["base"] == "<local & folder>"
    assert facts["rows"] == "900 in 40 packs of 2,048 tokens"
    assert facts["tokens"] == "80 k 25% of them supervised"
    assert facts["trained"] == "10 k 1.00% of the model"
    assert facts["device"] == "NVIDIA H200 140 GiB each"
    assert facts["processes"] == "2 processes"
    assert facts["planned"] == "7.1 GiB of each rank's device"
    assert facts["measured, most"] == "11.5 GiB torch's tensors"
    assert facts["training"] == "1 h 02 min"
    assert facts["tokens/s, median"] == "4,000 1,234 supervised"
    assert facts["share of the limit"] == "0% of the matrix rate measured on such a card, at least"  # a tiny base


def test_every_file_of_the_run_has_its_part(run_folder: Path) -> None:
    reader = read(write_page(run_folder))
    assert reader.tables["Choices and their reasons"][1] == ["precision", "bf16", "tensor cores"]
    assert reader.tables["Evaluation"] == [["", "before", "after"], ["exact_match", "0", "0.9375"], ["rows", "48", ""]]
    assert [row[:2] for row in reader.tables["Time"]] == [
        ["what", "time"],
        ["start: imports", "11 s"],
        ["start: model", "4 s"],
        ["training steps", "1 h 02 min"],
        ["held-out loss", "5 s"],
        ["part", "time"],
        ["forward", "300 ms"],
        ["backward", "500 ms"],
        ["update", "100 ms"],
        ["the rest", "100 ms"],
    ]
    assert reader.tables["Memory, as planned for each rank"][1][:2] == ["base weights", "7.1 GiB"]
    assert [row[:2] for row in reader.tables["Lengths, in tokens"][1:]] == [["1–100", "600"], ["101–200", "300"]]
    assert ["adapter_model.safetensors", "12,345 bytes"] in reader.tables["Adapter"]
    assert reader.tables["Environment"][0] == ["versions.torch", "2.13.0"]
    for text in ("load()", "serve <it>", "✓ right", "✗ not as wanted", EVIL, "phi3-dist publish"):
        assert text in reader.text


def test_the_charts_get_the_rows_as_they_are(run_folder: Path) -> None:
    data = drawn(write_page(run_folder))
    (run,) = data["runs"]
    assert run["train"]["step"] == [10, 20]
    assert run["train"]["loss"] == [0.51239, 0.51239]
    assert run["held_out"] == {"step": [0, 20], "heldout_loss": [1.5, 0.5]}
    assert run["train"]["planned_gib"] == [7.1, 7.1]
    # the shipped figures of this card: 754.8 TFLOP/s each; 2 layers of 64·(64+2·32) + 64·64 + 3·64·128 weights
    flops = 4 * 2 * (64 * 128 + 64 * 64 + 3 * 64 * 128) + 6 * 10_000
    assert run["train"]["share"][0] == pytest.approx(100 * 4000.0 * flops / (2 * 754.8e12), rel=1e-4)
    plan = json.loads((run_folder / "plan.json").read_text())
    plan["hardware"]["device"] = "a card that nobody has measured"
    (run_folder / "plan.json").write_text(json.dumps(plan))
    path = write_page(run_folder)
    assert "share" not in drawn(path)["runs"][0]["train"]
    assert read(path).facts["share of the limit"].startswith("unknown make card")
    assert [chart["id"] for chart in data["charts"]] == [
        "loss", "lr", "grad_norm", "speed", "share", "parts", "memory",
    ]  # fmt: skip


def test_what_the_user_set_is_marked_in_the_run_file(run_folder: Path) -> None:
    reader = read(write_page(run_folder))
    assert reader.marked == ["name: roman", "  source: <local & folder>", "  r: 16", "  lr: 0.0001"]
    assert "# set on the command line" in reader.text  # lora.r=16, which is the default too
    assert f"the default is {defaults()['optim.lr']:g}" in reader.text
    assert "  eps: 1.0e-08" in reader.text


def test_a_page_loads_nothing_and_runs_no_script_but_its_own(run_folder: Path) -> None:
    reader = read(write_page(run_folder))
    assert reader.references == ["#main"]
    assert reader.handlers == []
    assert [script.get("type") for script in reader.scripts] == ["application/json", None, None, None]
    assert all(script.keys() <= {"type", "id"} for script in reader.scripts)
    text = (run_folder / "report.html").read_text(encoding="utf-8")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert "default-src &#39;none&#39;" in policy
    assert "connect-src &#39;none&#39;" in policy
    assert policy.count("sha256-") == 3
    assert "<script>alert" not in text
    assert "onerror=alert(2)>" not in text
    assert "<" not in reader.data
    assert ">" not in reader.data


def test_text_from_anywhere_is_text(tmp_path: Path) -> None:
    """Names, rows of marks, keys of an evaluation, the plan, the command: all of it may hold markup."""
    metrics = [{"kind": "train", "step": 1, "loss": 2.0}, {"kind": "spike", "step": 1, "rows": EVIL}]
    run = write_run(
        tmp_path / "<b>run",
        metrics_jsonl="".join(json.dumps(row) + "\n" for row in metrics),
        config_yaml=f"name: {json.dumps(EVIL)}\n",
        plan_json={"choices": [{"name": EVIL, "value": EVIL, "why": EVIL}], "strategy": EVIL, "device": EVIL},
        environment_json={"command": [EVIL, "train", f"{EVIL}=1"], EVIL: EVIL},
        evaluation_json={EVIL: {EVIL: EVIL}, "samples": [{"prompt": EVIL, EVIL: EVIL}], f"list {EVIL}": [{EVIL: EVIL}]},
    )
    path = write_page(run)
    reader = read(path)
    assert len(reader.scripts) == 4
    assert reader.handlers == []
    assert reader.references == ["#main"]
    assert drawn(path)["runs"][0]["marks"][0]["text"].endswith(EVIL)
    write_comparison([run, run], tmp_path / "both.html")
    assert read(tmp_path / "both.html").handlers == []


def test_the_foot_tells_the_size_and_what_the_library_takes(run_folder: Path) -> None:
    path = write_page(run_folder)
    kept = (page.ASSETS / "uPlot.iife.min.js").read_bytes()
    assert f"v{UPLOT_VERSION})".encode() in kept[:200]
    assert "MIT" in (page.ASSETS / "uPlot.LICENSE").read_text()
    foot = read(path).text
    assert f"This page is {path.stat().st_size / 1000:,.0f} kB, {len(kept) / 1000:.0f} kB of it" in foot
    assert len(kept) < 60_000
    assert path.stat().st_size < 150_000


def test_parts_that_a_run_has_not_written_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    reader = read(write_page(tmp_path))
    assert reader.tables == {}
    assert reader.facts == {"training loss": "2 step 1"}
    assert [chart["id"] for chart in json.loads(reader.data)["charts"]] == ["loss"]


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_broken_file_is_named(run_folder: Path, content: str) -> None:
    (run_folder / "plan.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"plan\.json: is not (a )?JSON"):
        write_page(run_folder)


@pytest.mark.parametrize("name", ["environment", "evaluation", "plan"])
def test_a_file_that_nests_for_ever_is_named(run_folder: Path, name: str) -> None:
    deep = '{"a": ' * 400 + "1" + "}" * 400
    (run_folder / f"{name}.json").write_text(f'{{"samples": [{{"prompt": {deep}}}]}}')
    with pytest.raises(RunFolderError, match=rf"{name}\.json: nests more than 30 levels"):
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
        file.write(
            '{"kind": "train", "step": 21, "loss": NaN, "lr": 1e400}\n{"kind": "start", "step": 5, "x_s": "1"}\n'
        )
    samples = [None, 1, "text", {"prompt": "half \ud800 of it"}, ["a", {"role": "user", "content": None}]]
    (run_folder / "evaluation.json").write_text(json.dumps({"samples": samples, "before": None, "rows": None}))
    odd = {"choices": [None, "x", {"name": "precision"}], "lengths": [], "hardware": 5, "memory": [None, {"gib": "x"}]}
    (run_folder / "plan.json").write_text(json.dumps(odd | {"parameters": [], "identity": dict(HUGE)}))
    (run_folder / "config.yaml").write_text("name: 'a[/]b \u2615 $x^2$'\n", encoding="utf-8")
    reader = read(write_page(run_folder))
    assert "a[/]b \u2615 $x^2$" in reader.text
    assert "half \\ud800 of it" in reader.text
    assert ["precision", "", ""] in reader.tables["Choices and their reasons"]
    assert json.loads(reader.data)["runs"][0]["train"]["loss"][-1] is None
    for name, content in (("evaluation.json", '{"samples": 5}'), ("plan.json", '{"choices": {"a": 1}, "lengths": {}}')):
        (run_folder / name).write_text(content)
    assert read(write_page(run_folder)).tables["Samples"] == [[""], ["5"]]


def test_a_config_that_bombs_is_read_in_bounded_time(run_folder: Path) -> None:
    """Nine levels of aliases stand for a billion values."""
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (run_folder / "config.yaml").write_text("\n".join(levels))
    with pytest.raises(RunFolderError, match="aliases"):
        write_page(run_folder)


def test_a_run_that_trains_is_marked_as_one(run_folder: Path) -> None:
    assert "does not refresh" not in read(write_page(run_folder)).text
    beat = {"pid": 1, "host": "elsewhere", "time": 4e9, "step": 20}
    (run_folder / "heartbeat.json").write_text(json.dumps(beat))
    (run_folder / "plan.json").write_text('{"steps": 80}')
    path = write_page(run_folder)
    assert "<title>running: roman</title>" in path.read_text(encoding="utf-8")
    text = read(path).text
    assert "step 20 of 80, about 1 min 00 s left (as of " in text
    assert f"phi3-dist board {run_folder}" in text
    assert "phi3-dist publish" not in text


def test_interruptions_and_resumes_are_marks(run_folder: Path) -> None:
    rows = [{"kind": "train", "step": n, "loss": 1.0, "elapsed_s": float(n if n < 8 else n - 7)} for n in range(1, 15)]
    starts = [{"kind": "start", "step": step, "imports_s": 2.0} for step in (1, 8)]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (*rows[:7], *starts, *rows[7:])))
    (run_folder / "exit.json").write_text('{"state": "failed", "code": 9, "time": 2}')
    (run_folder / "logs" / "terminal").mkdir(parents=True)
    said = "step 7/20\nstopped by SIGTERM after step 7; continue with --resume\n"
    (run_folder / "logs" / "terminal" / "rank_000.log").write_text(said)
    path = write_page(run_folder)
    marks = drawn(path)["runs"][0]["marks"]
    assert [(mark["step"], mark["kind"]) for mark in marks] == [(7, "stopped"), (7, "resumed"), (14, "failed")]
    reader = read(path)
    assert "stopped by SIGTERM after step 7" in reader.text
    assert reader.facts["training"] == "14 s"  # 7 s of the first start and 7 s of the second
    assert "phi3-dist train a.yaml lora.r=16 --resume" in reader.text


def test_a_long_run_is_thinned_and_keeps_its_extremes(run_folder: Path) -> None:
    rows = [{"kind": "train", "step": n, "loss": 2.0 + (n % 7) / 10} for n in range(1, 20_001)]
    rows[9_999]["loss"], rows[15_000]["loss"] = 99.0, 0.001
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run,) = drawn(write_page(run_folder))["runs"]
    assert 800 < len(run["train"]["step"]) <= page_charts.ROWS_AT_MOST + 3
    assert run["train"]["step"][0] == 1
    assert dict(zip(run["train"]["step"], run["train"]["loss"], strict=True))[10_000] == 99.0
    assert min(run["train"]["loss"]) == 0.001
    assert "of 20,000 rows" in run["note"]


def test_runs_are_laid_over_one_another_with_what_differs_as_the_legend(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run{n}", lr=lr) for n, lr in enumerate((1e-4, 5e-4))]
    output = tmp_path / "comparison.html"
    write_comparison(runs, output)
    reader = read(output)
    assert reader.tables["What differs"] == [["", "lr 0.0001", "lr 0.0005"], ["optim.lr", "0.0001", "0.0005"]]
    assert ["held-out loss", "0.5", "0.5"] in reader.tables["Results"]
    assert [run["label"] for run in json.loads(reader.data)["runs"]] == ["lr 0.0001", "lr 0.0005"]
    write_comparison([runs[0], runs[0]], output)  # nothing differs: the folder's name tells, and a number
    assert len({run["label"] for run in drawn(output)["runs"]}) == 2
    output.write_text("my notes")
    with pytest.raises(RunFolderError, match="nothing is replaced"):
        write_comparison(runs, output)
    assert output.read_text() == "my notes"


def test_a_page_needs_neither_torch_nor_matplotlib(run_folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from phi3_dist.report.page import write_page; "
        f"write_page(Path({str(run_folder)!r})); print(sorted({{'torch', 'matplotlib'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_evaluation_beside_the_base_shows_its_interval_and_who_said_what(run_folder: Path) -> None:
    """The form that `phi3-dist eval --base` writes."""
    numbers = {"heldout_loss": 0.5, "exact_match": 0.9, "chrf": 0.8812}
    sample = {"prompt": "<|user|>9?", "wanted": "IX", "adapter": "IX", "base": "nine", "exact_match": 1.0}
    evaluation = {
        "adapter": numbers,
        "base": {**numbers, "exact_match": 0.25},
        "difference": {"exact_match": 0.65},
        "from (95 %)": {"exact_match": 0.5},
        "to (95 %)": {"exact_match": 0.75},
        "answers": 100,
        "samples": [sample | {"place": "rows.jsonl:7"}],
    }
    (run_folder / "evaluation.json").write_text(json.dumps(evaluation))
    reader = read(write_page(run_folder))
    assert reader.facts["exact match"] == "90% 25% base, difference +0.5 to +0.75 (95 %)"
    assert reader.facts["chrf"] == "0.8812 0.8812 base"
    assert reader.text.count("✓ right") == 2  # on the first screen and among the answers
    assert reader.text.count("✗ not as wanted") == 2
    assert "place rows.jsonl:7" in reader.text
    assert reader.tables["Evaluation"][0][:3] == ["", "adapter", "base"]


def test_every_verb_that_a_page_names_is_one(run_folder: Path) -> None:
    named = set(re.findall(r"phi3-dist (\w+)", read(write_page(run_folder)).text))
    (run_folder / "heartbeat.json").write_text(json.dumps({"pid": 1, "host": "elsewhere", "time": 4e9}))
    named |= set(re.findall(r"phi3-dist (\w+)", read(write_page(run_folder)).text))
    assert named >= {"board", "logs", "publish", "report"}
    assert {f"phi3-dist {verb}" for verb in named} <= {
        name for name, _ in verbs_of(typer.main.get_command(app), "phi3-dist")
    }
