"""Input under fire: whatever the bytes, an error of the tree with one clear message, or a result; nothing else.

`make test` tries a few hundred inputs, the same each time; `make fuzz` thousands of new ones, with the profile that
tests/conftest.py registers. Each kind of input is made from valid ones: values replaced, keys moved, bytes flipped,
cut and inserted.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from transformers import Phi3ForCausalLM

from phi3_dist.adapters.files import write_adapter
from phi3_dist.adapters.reading import read_adapter
from phi3_dist.config.load import load_run, resolved_yaml
from phi3_dist.config.schema import DataConfig, RunConfig
from phi3_dist.config.starter import first_run_file
from phi3_dist.data.prepare import prepare
from phi3_dist.errors import Phi3DistError
from phi3_dist.machine.doctor import extensions_root
from phi3_dist.machine.launch_request import LaunchRequest, read_command_line
from phi3_dist.machine.probe import launch_facts
from phi3_dist.modeling.base import find_base, meta_model, tiny_config
from phi3_dist.modeling.tokenizer import load_tokenizer, tiny_tokenizer
from phi3_dist.planning.preview import launch_of_config, shape_of_source
from phi3_dist.recipes.importing import import_run
from phi3_dist.recipes.lint import faults
from phi3_dist.report.logs import find_log
from phi3_dist.report.page import write_page
from phi3_dist.report.run_files import read_metrics
from phi3_dist.report.runs import list_runs, runs_table
from phi3_dist.training.checkpoints.compatibility import check_identity
from phi3_dist.training.checkpoints.files import Checkpoint, find_checkpoint, read_state, write_checkpoint
from phi3_dist.training.checkpoints.metrics_rows import cut_metrics

FUZZ = settings.get_current_profile_name() == "fuzz"
"""Whether this is `make fuzz`; else the few of `make test`, always the same."""
LIMIT_S = 5
"""Of processor time for one action: what takes longer hangs for a person. The clock would count what others do."""


def fire(examples: int) -> settings:
    return settings(
        max_examples=settings.default.max_examples if FUZZ else examples,
        derandomize=not FUZZ,
        database=None,
        deadline=None,  # `survives` has a limit
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


def survives(action: Callable[[], object]) -> Phi3DistError | None:
    """`action` gives a result, or an error of the tree whose message is short, printable and says something."""
    error: Phi3DistError | None = None
    began_s = time.process_time()
    try:
        action()
    except Phi3DistError as raised:
        error = raised
    assert time.process_time() - began_s < LIMIT_S
    if error is not None:
        assert error.problems
        assert 2 <= error.exit_code <= 9
        for problem in error.problems:
            assert problem.what.strip()
            assert len(str(problem)) < 4000, "a message for a person"
            assert "Traceback" not in str(problem)
    return error


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


ODD = st.sampled_from([
    *("*a", "*b", "&a x", "!!bool maybe", "!!int ''", "!!float x", "!!timestamp noon", "!!null x", "!!str 5"),
    *("2024-13-45", "59:59:59", "1e999", "'\\0'", '"\\0\\e"', "!!set {a, b}", "!x y", "~", "<<", "!!binary *"),
    *("[", "}", "? a", "|", "-", "https://a/b", "~/x", "~nobody/x", "5%", "0x" + "f" * 310, "9" * 290),
])  # fmt: skip
STRUCTURES = st.recursive(
    ODD,
    lambda inner: st.one_of(
        st.tuples(st.just("list"), st.lists(inner, min_size=1, max_size=9)),
        st.tuples(st.sampled_from(["&a", "&b", "a", "<<", ". "]), st.tuples(inner)),
        st.tuples(st.sampled_from(["times", "deep", "long"]), st.tuples(st.integers(2, 3000), inner)),
    ),
    max_leaves=8,
)
"""YAML by its structure: aliases of lists of aliases, depth, width, tags that promise what is not there."""


def text_of(structure: Any) -> str:
    if isinstance(structure, str):
        return structure
    how, inside = structure
    if how == "list":
        return f"[{', '.join(map(text_of, inside))}]"
    if how.startswith("&"):
        return f"{how} {text_of(inside[0])}"
    if len(inside) == 1:
        return f"{{{how}: {text_of(inside[0])}}}"
    many, inner = inside[0], text_of(inside[1])
    if how == "times":
        return f"[{', '.join([inner] * min(many, 1500 // len(inner)))}]"
    return f"{'[' * many}{inner}{']' * many}" if how == "deep" else inner[:20] * many


KEYS = st.sampled_from(["x", "data", "data.train", "model.source", "lora.rank_pattern", "train.seed", "name"])


@timeout
@given(key=KEYS, parts=st.lists(STRUCTURES, min_size=1, max_size=12), override=st.one_of(st.just(""), STRUCTURES))
@fire(20)
def test_run_files_by_structure(key: str, parts: list[Any], override: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    base = yaml.safe_dump(RUN)
    # each part may name the ones before, many times
    grown = "".join(f"g{n}: &{'ab'[n % 2]} {text_of(part)}\n" for n, part in enumerate(parts))
    file.write_text(f"{base}{grown}", encoding="utf-8")
    survives(lambda: load_run(file, [f"{key}={text_of(override or parts[0])}"]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base_model: m\nsequence_len: 512\nlearning_rate: 1e-4\n{grown}", encoding="utf-8")
    survives(lambda: import_run(recipe))
    survives(lambda: faults(recipe))
    survives(lambda: launch_of_config(recipe, None))


# --- the environment --------------------------------------------------------------------------------------------------

NAMES = st.sampled_from([
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "ACCELERATE_USE_CPU"),
    *("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_OFFLOAD_PARAMS"),
    *("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_USE_PARALLELISM_CONFIG"),
    *("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"),
    *("HOME", "XDG_CACHE_HOME", "HF_HOME", "TORCH_EXTENSIONS_DIR", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"),
])  # fmt: skip
MEANT = st.sampled_from(
    ["", "0", "1", "2", "true", "no", "-1", "9" * 5000, "٣", "cpu", "a\0", "\x1b[2J", "~", "x" * 5000]
)
WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@timeout
@given(
    environ=st.dictionaries(NAMES, st.one_of(MEANT, st.text(max_size=5))),
    launched=st.booleans(),
    settings=st.one_of(st.none(), VALUES),
)
@fire(120)
def test_environments(environ: dict[str, str], launched: bool, settings: Any, tmp_path: Path) -> None:
    if settings is not None:
        zero = {"zero_optimization": {"stage": 3, "offload_param": settings}}
        file = tmp_path / "ds.json"
        raw = json.dumps(zero if launched else settings)
        file.write_text(raw, encoding="utf-8", errors="surrogatepass")
        environ |= {"ACCELERATE_USE_DEEPSPEED": "1", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    environ = {**WHOLE, **environ} if launched else environ
    survives(lambda: launch_facts(environ, request=LaunchRequest(2, "a launcher")))
    survives(lambda: read_command_line(["accelerate", "launch", "x.py"], tmp_path, environ))
    assert isinstance(extensions_root(environ), Path)


# --- rows ------------------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 1}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be kind."},
    {"instruction": "Add", "input": "1 and 2", "output": "3"},
    {"prompt": "Say it", "completion": "it"},
    {
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "Ann"},
            {"role": "assistant", "content": "No", "loss": False, "reasoning_content": "hm", "tool_calls": []},
            {"role": "user", "content": "<video>x</video>"},
            {"role": "assistant", "content": "Hello", "train": 1.0, "weight": float("nan")},
        ],
        "tools": "[]",
        "images": [],
        "labels": [1],
    },
    {"conversation": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "score": float("nan")},
]
FORMS: list[Callable[[bytes], bytes]] = [
    bytes,
    gzip.compress,
    lambda raw: raw.decode("utf-8", "replace").encode("utf-16"),
    lambda raw: b"[" + b",".join(raw.splitlines()) + b"]",
    lambda raw: raw.replace(b", ", b",\n "),
    lambda raw: b"\xef\xbb\xbf" + raw.replace(b"\n", b"\n\xef\xbb\xbf"),
    lambda raw: gzip.compress(raw.decode("utf-8", "replace").encode("utf-16-be")),
]
"""What a file of lines may turn into on its way."""
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")
TOKENIZER = tiny_tokenizer()


@timeout
@given(
    row=st.integers(0, len(ROWS) - 1),
    changes=st.one_of(st.just([]), CHANGES),
    bites=st.one_of(st.just([]), BITES),
    policy=st.sampled_from(["stop", "skip"]),
    form=st.sampled_from(FORMS),
    name=st.sampled_from(["rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz"]),
)
@fire(160)
def test_rows(
    row: int,
    changes: list[tuple[float, Any]],
    bites: list[Any],
    policy: Any,
    *,
    form: Callable[[bytes], bytes],
    name: str,
    tmp_path: Path,
) -> None:
    value = changed(ROWS[row], changes)
    raw = (json.dumps(ROWS[row]) + "\n" + json.dumps(value) + "\n").encode("utf-8", "surrogatepass")
    file = tmp_path / name
    raw = form(raw)
    file.write_bytes(bitten(raw, bites) if bites else raw)
    cfg = DataConfig(train=str(file), validation_share=0.0, pack_length=512, on_bad_row=policy, on_long_row="drop")

    def read() -> None:
        said = "\n".join(prepare(cfg, TOKENIZER, None).notices)
        assert not UNPRINTABLE.search(said)
        assert len(said) < 8000

    error = survives(read)
    assert error is None or not UNPRINTABLE.search(str(error)), "a terminal would obey it"


# --- a base's config.json -----------------------------------------------------------------------------------------

BASE: dict[str, Any] = json.loads(tiny_config().to_json_string())
ROPE = {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
NEAR = st.sampled_from([0, 1, -1, 2, 3, 8, 64, 65, 320, 10**7, 2**40, 10**400, 1.5, "64", None, True, [], {}, ROPE])
BASE_KEYS = st.sampled_from(
    [*BASE, "head_dim", "rope_scaling", "quantization_config", "original_max_position_embeddings"]
)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    Phi3ForCausalLM(tiny_config()).save_pretrained(folder)
    return folder


@timeout
@given(
    values=st.dictionaries(BASE_KEYS, st.one_of(NEAR, VALUES), max_size=4),
    rope=st.dictionaries(st.sampled_from([*ROPE, "rope_type", "factor", "rope_theta"]), st.one_of(NEAR, VALUES)),
    bites=st.one_of(st.just([]), BITES),
)
@fire(80)
def test_configs_of_bases(
    values: dict[str, Any], rope: dict[str, Any], bites: list[Any], base_folder: Path, tmp_path: Path
) -> None:
    scaling = {"rope_parameters": {**ROPE, **rope}} if rope else {}
    raw = json.dumps({**BASE, **scaling, **values}).encode("utf-8", "surrogatepass")
    for file in base_folder.iterdir():
        if not (tmp_path / file.name).exists():
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_bytes(bitten(raw, bites) if bites else raw)
    cfg = RunConfig.model_validate({"model": {"source": str(tmp_path)}, "data": {"train": "x"}})
    survives(lambda: meta_model(find_base(str(tmp_path)), torch.float32))
    survives(lambda: first_run_file(str(tmp_path)))
    survives(lambda: shape_of_source(cfg))


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
@example(victim=1, change=("json", [(0.875, [None, 1.0000000000000002e16])]), width=40)
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
