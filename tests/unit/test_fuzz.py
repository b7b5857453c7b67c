"""Input under fire: whatever the bytes, an error of the tree with one clear message, or a result; nothing else.

`make test` tries a few hundred inputs, the same each time; `make fuzz` thousands of new ones, with the profile that
tests/conftest.py registers. Each kind of input is made from valid ones: values replaced, keys moved, bytes flipped,
cut and inserted.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from phi3_dist.adapters.files import read_adapter, write_adapter
from phi3_dist.config.load import load_run, resolved_yaml
from phi3_dist.config.schema import DataConfig
from phi3_dist.data.batches import prepare
from phi3_dist.errors import Phi3DistError
from phi3_dist.modeling.tokenizer import load_tokenizer, tiny_tokenizer
from phi3_dist.report.curves import read_metrics
from phi3_dist.report.logs import find_log
from phi3_dist.report.page import write_page
from phi3_dist.report.runs import list_runs, runs_table
from phi3_dist.training.checkpoint import Checkpoint, find_checkpoint, read_state, write_checkpoint
from phi3_dist.training.resume import check_identity, cut_metrics

FUZZ = settings.get_current_profile_name() == "fuzz"
"""Whether this is `make fuzz`; else the few of `make test`, always the same."""
DEADLINE_MS = 5000


def fire(examples: int) -> settings:
    return settings(
        max_examples=settings.default.max_examples if FUZZ else examples,
        derandomize=not FUZZ,
        database=None,
        deadline=DEADLINE_MS,  # a hang is a failure too
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


timeout = pytest.mark.timeout(3600 if FUZZ else 240)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.sampled_from([0, 1, -1, 2**31, 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["", "~", "1e-4", "all-linear", "{name}", "../..", "/dev/null", "tiny-random", "\ud800", "\0", "é"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
BITES = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert", "swap"]), st.floats(0, 1), st.binary(min_size=1, max_size=6)),
    min_size=1,
    max_size=4,
)


def bitten(raw: bytes, bites: list[tuple[str, float, bytes]]) -> bytes:
    for how, where, what in bites:
        place = int(where * max(len(raw) - 1, 0))
        if how == "cut":
            raw = raw[:place]
        elif how == "insert":
            raw = raw[:place] + what + raw[place:]
        elif how == "flip" and raw:
            raw = raw[:place] + bytes([raw[place] ^ (what[0] or 1)]) + raw[place + 1 :]
        else:
            raw = raw[:place] + what + raw[place + len(what) :]
    return raw


def paths_of(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside `value`."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way for key, inner in inside for way in [(*above, key), *paths_of(inner, (*above, key))]]


def changed(value: Any, changes: list[tuple[float, Any]]) -> Any:
    """`value` with some of what is in it replaced; `DROP` takes it away."""
    value = copy.deepcopy(value)
    for where, new in changes:
        ways = paths_of(value)
        if not ways:
            return new
        *above, last = ways[int(where * (len(ways) - 1))]
        inside = value
        for key in above:
            inside = inside[key]
        if new == DROP:
            del inside[last]
        else:
            inside[last] = new
    return value


DROP = "drop this"
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.one_of(VALUES, st.just(DROP))), min_size=1, max_size=3)


def survives(action: Callable[[], object]) -> None:
    """`action` gives a result, or an error of the tree whose message is short, printable and says something."""
    error: Phi3DistError | None = None
    try:
        action()
    except Phi3DistError as raised:
        error = raised
    if error is not None:
        assert error.problems
        assert 2 <= error.exit_code <= 9
        for problem in error.problems:
            assert problem.what.strip()
            assert len(str(problem)) < 4000, "a message for a person"
            assert "Traceback" not in str(problem)


# --- run files --------------------------------------------------------------------------------------------------------

RUN: dict[str, Any] = yaml.safe_load((Path(__file__).parents[2] / "configs" / "run" / "debug.yaml").read_text())


@timeout
@given(
    base=st.booleans(), changes=CHANGES, bites=st.one_of(st.just([]), BITES), overrides=st.lists(st.text(max_size=20))
)
@fire(120)
def test_run_files(
    base: bool, changes: list[tuple[float, Any]], bites: list[Any], overrides: list[str], tmp_path: Path
) -> None:
    values = changed(RUN, changes) if base else {**RUN, "extra": changes[0][1]}
    try:
        raw = yaml.safe_dump(values).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError):  # no YAML can hold it
        raw = repr(values).encode("utf-8", "surrogatepass")
    file = tmp_path / "run.yaml"
    file.write_bytes(bitten(raw, bites) if bites else raw)

    def load() -> None:
        cfg = load_run(file, overrides)
        (tmp_path / "again.yaml").write_text(resolved_yaml(cfg), encoding="utf-8")
        assert load_run(tmp_path / "again.yaml") == cfg, "what was resolved reads back as itself"

    survives(load)


# --- rows ------------------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 1}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be kind."},
    {"instruction": "Add", "input": "1 and 2", "output": "3"},
    {"prompt": "Say it", "completion": "it"},
]
TOKENIZER = tiny_tokenizer()


@timeout
@given(
    row=st.integers(0, len(ROWS) - 1),
    changes=st.one_of(st.just([]), CHANGES),
    bites=st.one_of(st.just([]), BITES),
    policy=st.sampled_from(["stop", "skip"]),
)
@fire(120)
def test_rows(row: int, changes: list[tuple[float, Any]], bites: list[Any], policy: Any, tmp_path: Path) -> None:
    value = changed(ROWS[row], changes)
    raw = (json.dumps(ROWS[row]) + "\n" + json.dumps(value) + "\n").encode("utf-8", "surrogatepass")
    file = tmp_path / "rows.jsonl"
    file.write_bytes(bitten(raw, bites) if bites else raw)
    cfg = DataConfig(train=str(file), validation_share=0.0, pack_length=512, on_bad_row=policy, on_long_row="drop")
    survives(lambda: prepare(cfg, TOKENIZER, None))


# --- tokenizer folders -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(folder)
    return folder


def damaged_copy(source: Path, target: Path, file: float, change: Any) -> Path:
    """A copy of a folder in which one file is bitten, or holds changed JSON."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    files = sorted(p for p in target.rglob("*") if p.is_file())
    victim = files[int(file * (len(files) - 1))]
    kind, value = change
    if kind == "json" and victim.suffix == ".json":
        victim.write_text(json.dumps(changed(json.loads(victim.read_text()), value)), encoding="utf-8")
    elif kind == "gone":
        victim.unlink()
    elif kind == "bites":
        victim.write_bytes(bitten(victim.read_bytes(), value))
    return target


FILE_CHANGE = st.one_of(
    st.tuples(st.just("json"), CHANGES), st.tuples(st.just("bites"), BITES), st.tuples(st.just("gone"), st.none())
)


@timeout
@given(file=st.floats(0, 1), change=FILE_CHANGE)
@fire(60)
def test_tokenizer_folders(file: float, change: Any, tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = damaged_copy(tokenizer_folder, tmp_path / "tokenizer", file, change)
    survives(lambda: load_tokenizer(str(folder)))


# --- adapter files --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    names = ("lora_A", "lora_B")
    tensors = {f"base_model.model.model.layers.0.mlp.down_proj.{n}.weight": torch.ones(2, 4) for n in names}
    write_adapter(folder, tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}, card="# A card\n")
    return folder


@timeout
@given(file=st.floats(0, 1), change=FILE_CHANGE, checksums=st.booleans())
@fire(120)
def test_adapter_files(file: float, change: Any, checksums: bool, adapter_folder: Path, tmp_path: Path) -> None:
    folder = damaged_copy(adapter_folder, tmp_path / "adapter", file, change)
    if not checksums:  # as PEFT writes it: nothing guards the weights but their own form
        (folder / "checksums.json").unlink(missing_ok=True)
    survives(lambda: read_adapter(folder))


# --- checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        write_checkpoint(root, step, {"weight/a": torch.full((2, 3), float(step))}, {"identity": {"lora.r": 8}})
    (root / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.5}\n{"kind": "train", "step": 2}\n')
    return root


@timeout
@given(file=st.floats(0, 1), change=FILE_CHANGE)
@fire(120)
def test_checkpoints(file: float, change: Any, checkpoint_folder: Path, tmp_path: Path) -> None:
    root = damaged_copy(checkpoint_folder, tmp_path / "checkpoints", file, change)

    def resume() -> None:
        found, passed = find_checkpoint(root)
        assert isinstance(found, Checkpoint), "one file is damaged, and there are two checkpoints"
        assert all(len(line.splitlines()) == 1 for line in passed)
        check_identity(found.trainer["identity"], {"lora.r": 8}, ())
        assert read_state(found)["weight/a"][0, 0] == found.step, "what was read is what was written"
        cut_metrics(root / "metrics.jsonl", found.step)

    survives(resume)


# --- run folders: heartbeat, exit record, plan, evaluation, metrics -------------------------------------------------

METRICS: list[dict[str, Any]] = [
    {"kind": "eval", "step": 0, "heldout_loss": 2.5, "heldout_perplexity": 12.2, "supervised_tokens": 9},
    {"kind": "train", "step": 1, "loss": 2.5, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 9.0, "elapsed_s": 1.5}
    | {"supervised_tokens_per_s": 5.0},
    {"kind": "train", "step": 2, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 9.0, "elapsed_s": 3.0},
    {"kind": "eval", "step": 2, "heldout_loss": 2.0, "heldout_perplexity": 7.4, "supervised_tokens": 9},
]
PROCESS = {"pid": 1, "pid_counts_in": "boot pid:[1]", "pid_began_at_tick": 5}
BEAT = {**PROCESS, "host": "node1", "time": 1e9, "step": 2, "job_id": "12_3", "nodes": "node[1-2]"}
RECORDS: dict[str, dict[str, Any]] = {
    "heartbeat.json": BEAT,
    "exit.json": {**PROCESS, "code": 0, "state": "finished", "time": 1e9 + 1},
    "plan.json": {"steps": 2, "choices": [{"name": "strategy", "value": "single", "why": "one process"}]},
    "evaluation.json": {"before": {"loss": 2.5}, "after": {"loss": 2.0}, "samples": [{"prompt": "Hi", "after": "Ho"}]},
    "environment.json": {"versions": {"torch": "2.13.0"}, "command": ["phi3-dist", "train"]},
}
RECORD_CHANGE = st.one_of(st.tuples(st.just("json"), CHANGES), st.tuples(st.just("bites"), BITES))


def run_folder(folder: Path, victim: int, change: Any) -> Path:
    """A run that has ended, with one record, or one row of its metrics, changed or bitten."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "checkpoints" / "step_000002").mkdir(parents=True)
    (folder / "config.yaml").write_text("name: story\n")
    kind, value = change
    names = list(RECORDS)
    for number, (name, record) in enumerate(RECORDS.items()):
        wanted = changed(record, value) if kind == "json" and number == victim else record
        raw = json.dumps(wanted).encode("utf-8", "surrogatepass")
        (folder / name).write_bytes(bitten(raw, value) if kind == "bites" and number == victim else raw)
    rows, hit = METRICS, victim - len(names)
    if kind == "json" and hit >= 0:
        rows = [changed(row, value) if number == hit else row for number, row in enumerate(METRICS)]
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")
    (folder / "metrics.jsonl").write_bytes(bitten(raw, value) if kind == "bites" and hit >= 0 else raw)
    return folder


VICTIM = st.integers(0, len(RECORDS) + len(METRICS) - 1)


@timeout
@given(victim=VICTIM, change=RECORD_CHANGE, width=st.integers(40, 200))
@fire(150)
def test_runs_in_a_list(victim: int, change: Any, width: int, tmp_path: Path) -> None:
    """Whatever one run left, both are listed, in lines that fit and that move no cursor."""
    run_folder(tmp_path / "runs" / "damaged", victim, change)
    run_folder(tmp_path / "runs" / "whole", 0, ("bites", []))
    out = io.StringIO()
    listed = list_runs(tmp_path / "runs")
    assert {row.folder.name for row in listed} == {"damaged", "whole"}
    Console(file=out, width=width).print(runs_table(listed, base=tmp_path / "runs", width=width))
    text = out.getvalue()
    assert "whole" in text
    assert all(c.isprintable() or c == "\n" for c in text)
    assert max(map(cell_len, text.splitlines())) <= width
    survives(lambda: find_log(tmp_path / "runs" / "damaged"))
    survives(lambda: read_metrics(tmp_path / "runs" / "damaged"))


@timeout
@given(victim=VICTIM, change=RECORD_CHANGE)
@settings(fire(6), max_examples=200 if FUZZ else 6, deadline=None)  # a picture takes half a second, or seconds
def test_reports(victim: int, change: Any, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", victim, change)

    def draw() -> None:
        assert write_page(folder).stat().st_size > 10_000

    survives(draw)
    assert not list(folder.glob("*.partial"))
