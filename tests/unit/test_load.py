"""The run file: what is read, and every mistake named at once with its place and fix."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from phi3_dist.config.load import diff, json_schema, load_run, resolved_yaml
from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import ConfigError

GOOD = "model:\n  source: tiny-random\ndata:\n  train: rows.jsonl\n"


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def mistakes(folder: Path, text: str, *overrides: str) -> dict[str, tuple[str, str]]:
    """{where: (what, fix)} of the ConfigError that this run file must raise."""
    with pytest.raises(ConfigError) as caught:
        load_run(write(folder, text), overrides)
    return {problem.where: (problem.what, problem.fix) for problem in caught.value.problems}


def test_defaults_name_and_folder(tmp_path: Path) -> None:
    cfg = load_run(write(tmp_path, GOOD, "first_try.yaml"))
    assert (cfg.name, cfg.save.folder) == ("first_try", "runs/first_try")
    named = load_run(write(tmp_path, GOOD), ["name=other", "save.folder=out/{name}/x"])
    assert (named.name, named.save.folder) == ("other", "out/other/x")


def test_every_mistake_at_once_with_line_value_and_fix(tmp_path: Path) -> None:
    text = (
        "model:\n  source: tiny-random\n  precision: fp16\n"
        "data:\n  train: rows.jsonl\n  pack_lenght: 4096\n"
        "lora:\n  r: 8.0\n  target_modules: [q_proj]\n"
        "optim:\n  schedule: cosin\n  eps: true\n"
        "train:\n  epochs: 2\n  max_steps: 10\n"
        "learning_rate: 1e-3\n"
    )
    found = mistakes(tmp_path, text)
    assert found["data.pack_lenght (run.yaml:6)"] == (
        "unknown key (value 4096)",
        "did you mean data.pack_length?",
    )
    assert found["model.precision (run.yaml:3)"][1] == (
        "fp16 needs loss scaling, which this toolkit refuses; use bf16 or fp32"
    )
    assert "8.0" in found["lora.r (run.yaml:8)"][0]
    assert found["lora.target_modules (run.yaml:9)"][1] == "did you mean lora.targets?"
    assert found["optim.schedule (run.yaml:11)"][1] == "did you mean cosine?"
    assert "expected a number" in found["optim.eps (run.yaml:12)"][0]
    assert found["learning_rate (run.yaml:16)"][1] == "did you mean optim.lr?"
    assert "train.epochs (run.yaml:14)" in found  # a pair, checked although other fields are wrong
    assert len(found) == 8


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-4"])
def test_every_spelling_of_a_float(tmp_path: Path, text: str) -> None:
    assert load_run(write(tmp_path, GOOD + f"optim:\n  lr: {text}\n")).optim.lr == 1e-4
    assert load_run(write(tmp_path, GOOD), [f"optim.lr={text}"]).optim.lr == 1e-4


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("train.global_batch='16'", "train.global_batch"),
        ("train.global_batch=16.0", "train.global_batch"),
        ("train.global_batch=true", "train.global_batch"),
        ("train.shuffle=1", "train.shuffle"),
        ("train.shuffle='true'", "train.shuffle"),
        ("optim.lr=true", "optim.lr"),
        ("optim.lr=.nan", "optim.lr"),
        ("optim.lr=.inf", "optim.lr"),
        ("model.source=5", "model.source"),
        ("lora.targets=5", "lora.targets"),
        ("lora.targets=[5]", "lora.targets[0]"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("model=tiny-random", "model"),
    ],
)
def test_types_are_strict(tmp_path: Path, override: str, where: str) -> None:
    found = mistakes(tmp_path, GOOD, override)
    assert [place.split(" ")[0] for place in found] == [where]


def test_a_number_out_of_range_beside_auto_is_named_by_its_key(tmp_path: Path) -> None:
    for key in ("data.pack_length", "train.micro_batch", "model.dequantized_layers"):
        ((where, (what, _)),) = mistakes(tmp_path, GOOD, f"{key}={2**41}").items()
        assert where.startswith(f"{key} ")
        assert "; expected auto or " in what
        assert what.endswith("or less")


def test_overrides_read_yaml_and_apply_in_order(tmp_path: Path) -> None:
    cfg = load_run(
        write(tmp_path, GOOD + "lora:\n"),
        ["lora.targets=[qkv_proj, o_proj]", "lora.r=8", "lora.r=4", "data.validation=null", "model.revision="],
    )
    assert cfg.lora.targets == ("qkv_proj", "o_proj")
    assert cfg.lora.r == 4
    assert cfg.model.revision is None


def test_bad_overrides_are_named_together(tmp_path: Path) -> None:
    found = mistakes(tmp_path, GOOD, "verbose", "lora.rr=3", "model.source.x=1", "optim.lr=[1", "=3", "a..b=1")
    assert found["override 'verbose'"][0] == "is not of the form key.path=value"
    assert found["lora.rr (override 'lora.rr=3')"] == ("unknown key (value 3)", "did you mean lora.r?")
    assert found["override 'model.source.x=1'"][0] == "model.source is 'tiny-random', not a section"
    assert "its value is not YAML" in found["override 'optim.lr=[1'"][0]
    assert {"override '=3'", "override 'a..b=1'"} <= found.keys()


def test_missing_section_and_key(tmp_path: Path) -> None:
    found = mistakes(tmp_path, "model:\n  revision: main\n")
    assert found["data"][0] == "is required, and missing"
    assert found["model.source"][0] == "is required, and missing"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: [1", "is not YAML"),
        ("a: 1\n\tb: 2", "is not YAML"),
        ("- model", "is a list, not a mapping"),
        ("just words", "is text, not a mapping"),
        ("day: 2024-13-45\n", "is not YAML"),
        ("model: &m\n  source: *m\n", "an alias that contains itself"),
        ("? [a, b]\n: 1\n", "a key must be plain text"),
        ("a: 1\n---\nb: 1\n", "is not YAML"),
    ],
)
def test_not_a_run_file(tmp_path: Path, text: str, part: str) -> None:
    assert any(part in what for what, _ in mistakes(tmp_path, text).values())


def _levels_of_aliases(levels: int) -> str:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return GOOD + "\n".join(rows) + "\n"


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("text", "part"),
    [
        (_levels_of_aliases(6), "by aliases"),  # the sixth level takes seconds where nothing bounds it,
        (_levels_of_aliases(12), "by aliases"),  # and the twelfth has 3 * 10**11 values
        (GOOD + "x: " + "[" * 100_000, "nests more than 20 levels"),
        (GOOD + "".join(" " * depth + "a:\n" for depth in range(1000)), "nests more than 20 levels"),
        (GOOD + "".join(f"k{number}: 1\n" for number in range(100_000)), "larger than 512 KiB"),
        (GOOD + "x: [" + "1, " * 100_000 + "1]\n", "holds over 20,000 values"),
        (GOOD + "k" * 300 + ": 1\n", "a key of 300 characters"),
        (GOOD + "x: !!bool maybe\n", "'maybe' is not a bool"),
        (GOOD + "x: !!int ''\n", "'' is not an int"),
        (GOOD + "x: !!float 'a'\n", "'a' is not a float"),
        (GOOD + "x: !!timestamp noon\n", "'noon' is not a timestamp"),
        (GOOD + "x: 2024-13-45\n", "'2024-13-45' is not a timestamp"),
        (GOOD + "train: {seed: 0x" + "f" * 100_000 + "}\n", "a number or date of 100,002 characters"),
        (GOOD + "train: {seed: 0x" + "f" * 250 + "}\n", "expected 9223372036854775808 or less"),
        (GOOD + "x: " + "59:" * 90 + "59.5\n", "unknown key"),
        (GOOD + "x: !!set {a, b}\n", "the tag !!set is not read"),
        (GOOD + "x: !!python/object/apply:os.getcwd []\n", "the tag !!python/object/apply:os.getcwd is not read"),
        (GOOD + "lora: {rank_pattern: {'a{99999999999}': 2}}\n", "is not a regular expression"),
    ],
)
def test_whatever_yaml_can_hide_is_one_message_at_once(tmp_path: Path, text: str, part: str) -> None:
    found = mistakes(tmp_path, text)
    assert any(part in what for what, _ in found.values()), found
    assert all(len(f"{where} {what} {fix}") < 500 for where, (what, fix) in found.items())


@pytest.mark.timeout(30)
def test_thousands_of_mistakes_are_told_by_the_first_and_their_number(tmp_path: Path) -> None:
    found = mistakes(tmp_path, GOOD + "".join(f"k{number}: 1\n" for number in range(9_000)))
    assert len(found) == 51
    assert found["k0 (run.yaml:5)"][0] == "unknown key (value 1)"
    assert found[""][0] == "and about 8,950 more"
    found = mistakes(tmp_path, GOOD + "lora: {r: 1}\n" * 60)
    assert (len(found), found[""][0]) == (51, "and 9 more")


def test_an_override_is_bounded_as_the_file_is(tmp_path: Path) -> None:
    found = mistakes(tmp_path, GOOD, "a." * 3000 + "b=1", f"optim.lr={'[' * 1000}", "optim.lr=!!bool maybe")
    whats = [what for what, _ in found.values()]
    assert whats[0] == "is not of the form key.path=value"
    assert whats[1] == "nests more than 20 levels"
    assert whats[2] == "its value is not YAML: 'maybe' is not a bool"
    assert all(len(where) < 100 for where in found)


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("optim.warmup=5%", "write the share: 0.05"),
        ("data.validation_share='2,5 %'", "write the share: 0.025"),
        ("optim.lr='0,0001'", "write it with a point: 0.0001"),
        ("lora.r='16'", "write 16, without quotes"),
        ("log.trackers=wandb", "write it as a list: [wandb]"),
        ("lora.layers=3", "write it as a list: [3]"),
        ("lora.targets=true", ""),
    ],
)
def test_a_value_that_is_nearly_right_is_told_how_it_is_written(tmp_path: Path, override: str, fix: str) -> None:
    ((_, found),) = mistakes(tmp_path, GOOD, override).values()
    assert found == fix


def test_duplicate_key_names_both_lines(tmp_path: Path) -> None:
    found = mistakes(tmp_path, GOOD + "lora:\n  r: 4\n  alpha: 8\n  r: 16\n")
    assert found["lora.r (run.yaml:8)"][0] == "the key appears twice, first at run.yaml:6"


def test_missing_file_lists_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "debug.yaml")
    with pytest.raises(ConfigError, match="no such file") as caught:
        load_run(tmp_path / "debgu.yaml")
    assert "debug.yaml" in caught.value.problems[0].fix
    with pytest.raises(ConfigError, match="is a folder"):
        load_run(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_run(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["train.epochs=1", "train.max_steps=5"], "train.epochs"),
        (["model.revision=main"], "model.revision"),
        (["model.source=./base", "model.revision=main"], "model.revision"),
        (["data.validation_share=0", "train.eval_every=5"], "train.eval_every"),
        (["save.folder=''"], "save.folder"),
        (["save.folder='runs/{date}'"], "save.folder"),
        (["train.global_batch=10", "train.micro_batch=4"], "train.global_batch"),
        (["lora.targets=[]"], "lora.targets"),
        (["lora.targets=[all-linear]"], "lora.targets"),
        (["optim.warmup=2.5"], "optim.warmup"),
        (["optim.warmup=10", "train.max_steps=10"], "optim.warmup"),
        (["name=a/b"], "name"),
    ],
)
def test_impossible_pairs(tmp_path: Path, overrides: list[str], where: str) -> None:
    assert [place.split(" ")[0] for place in mistakes(tmp_path, GOOD, *overrides)] == [where]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.quantization=nf4", "model.precision=fp32"],
        ["model.quantization=nf4", "lora.dora=true"],
        ["data.validation_share=0"],
        ["data.validation_share=0", "data.validation=held.jsonl", "train.eval_every=5"],
        ["model.source=microsoft/Phi-3-mini-4k-instruct", "model.revision=main"],
    ],
)
def test_possible_pairs(tmp_path: Path, overrides: list[str]) -> None:
    load_run(write(tmp_path, GOOD), overrides)


def test_nearest_global_batch(tmp_path: Path) -> None:
    found = mistakes(tmp_path, GOOD, "train.global_batch=10", "train.micro_batch=4")
    assert [fix for _, fix in found.values()] == ["use 8 or 12"]


@given(
    lr=st.floats(1e-12, 1e3),
    alpha=st.floats(1e-3, 1e6),
    seed=st.integers(0, 2**63),
    # a run that was loaded has the home folder in the place of a first ~
    source=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=60).filter(
        lambda text: bool(text.strip()) and not text.startswith("~")
    ),
)
def test_resolved_yaml_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, lr: float, alpha: float, seed: int, source: str
) -> None:
    raw = {
        "name": "n",
        "model": {"source": source},
        "data": {"train": ["a", "b"]},
        "optim": {"lr": lr},
        "lora": {"alpha": alpha},
        "train": {"seed": seed},
    }
    cfg = RunConfig.model_validate(raw)
    cfg = cfg.model_copy(update={"save": cfg.save.model_copy(update={"folder": "runs/n"})})
    again = load_run(write(tmp_path_factory.mktemp("resolved"), resolved_yaml(cfg)))
    assert again == cfg


def test_diff_sees_one_field(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    one, other = load_run(path), load_run(path, ["lora.r=8"])
    assert one == load_run(path)
    assert diff(one, other) == [("lora.r", 16, 8)]
    assert diff(one, one) == []


def test_schema_describes_each_field() -> None:
    schema = json_schema()
    assert schema["additionalProperties"] is False
    for name, section in schema["$defs"].items():
        for key, value in section["properties"].items():
            assert value.get("description"), f"{name}.{key} has no description"
    assert yaml.safe_load(yaml.safe_dump(schema)) == schema


def test_config_and_planning_import_no_torch() -> None:
    code = (
        "import sys, phi3_dist.config.load, phi3_dist.planning.plan, phi3_dist.planning.launch_configs;"
        "bad = {'torch', 'transformers', 'peft', 'accelerate', 'numpy'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("item", "where", "what"),
    [
        ("{path: a, wieght: 2}", "data.train[0].wieght", "unknown key (value 2)"),
        ("{path: a, weight: -2}", "data.train[0].weight", "is -2; expected above 0"),
        ("{weight: 2}", "data.train[0].path", "is required, and missing"),
        ("3", "data.train[0]", "is 3; expected text or a section with keys under it"),
    ],
)
def test_a_mistake_inside_a_list_of_sources_is_named_once_at_its_place(
    tmp_path: Path, item: str, where: str, what: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{source: tiny-random}}\ndata:\n  train:\n    - {item}\n")
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    (problem,) = caught.value.problems
    assert problem.where.split(" ")[0] == where
    assert problem.what == what


@pytest.mark.parametrize(
    ("lora", "where", "what"),
    [
        ("{rank_pattern: {o_proj: 0}}", "lora.rank_pattern.o_proj", "1 or more"),
        ("{alpha_pattern: {'o_proj(': 2}}", "lora.alpha_pattern", "not a regular expression"),
        ("{layers: []}", "lora.layers", "empty list"),
        ("{layers: [1, 1]}", "lora.layers", "names a layer twice"),
        ("{init: pisa}", "lora.init", "expected default, pissa, pissa_niter_16, loftq or eva"),
        ("{init: pissa, dora: true}", "lora.init", "DoRA's magnitudes start from the plain weight"),
        ("{init: pissa, targets: [o_proj, lm_head]}", "lora.init", "decoder linears only"),
        ("{freeze_a: true, plus_ratio: 16}", "lora.plus_ratio", "lora.freeze_a leaves no A"),
        ("{plus_ratio: 0.5}", "lora.plus_ratio", "1 or more"),
    ],
)
def test_relatives_of_lora_that_cannot_be(tmp_path: Path, lora: str, where: str, what: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{source: tiny-random}}\ndata: {{train: x}}\nlora: {lora}\n")
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    (problem,) = caught.value.problems
    assert problem.where.split(" ")[0] == where
    assert what in problem.what


def first_problem(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    return caught.value.problems[0].what


def test_compiling_passes_that_are_left_out_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {source: tiny-random, compile: true, fused_layers: false}\ndata: {train: x}\n")
    assert "fused layers' passes" in first_problem(path)
    assert load_run(path, ["model.compile=auto"]).model.compile == "auto"


def test_weights_that_are_not_in_nf4_cannot_be_kept_dequantised(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {source: tiny-random, dequantized_layers: 2}\ndata: {train: x}\n")
    assert "no weight is in NF4" in first_problem(path)
    for right in ("model.quantization=nf4", "model.dequantized_layers=0", "model.dequantized_layers=auto"):
        load_run(path, [right])


def test_patterns_are_compared_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {source: tiny-random}\ndata: {train: x}\nlora: {rank_pattern: {o_proj: 4}}\n")
    pattern, plain = load_run(path), load_run(path, ["lora.rank_pattern={}"])
    assert diff(pattern, plain) == [("lora.rank_pattern", {"o_proj": 4}, {})]
