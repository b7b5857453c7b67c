"""Texts that reach a path, a script or a terminal: refused at their place, and a home's `~` is written out."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3_dist.config.load import load_run, resolved_yaml
from phi3_dist.config.unsafe_texts import path_fault
from phi3_dist.errors import ConfigError

RUN = "model:\n  source: tiny-random\ndata:\n  train: rows.jsonl\n"
PATHS = ["model.source", "model.tokenizer", "model.adapter", "data.train", "data.validation", "save.folder"]


def run_file(folder: Path, name: str = "run.yaml") -> Path:
    file = folder / name
    file.write_text(RUN, encoding="utf-8")
    return file


def fault(folder: Path, override: str, name: str = "run.yaml") -> tuple[str, str, str]:
    with pytest.raises(ConfigError) as caught:
        load_run(run_file(folder, name), [override] if override else [])
    (problem,) = caught.value.problems
    return problem.where.split(" ")[0], problem.what, problem.fix


@pytest.mark.parametrize("key", [*PATHS, "name", "log.project", "model.revision", "data.split"])
@pytest.mark.parametrize("character", ["\\0", "\\n", "\\e", "\\x7f"])
def test_a_control_character_is_refused_in_every_text(tmp_path: Path, key: str, character: str) -> None:
    override = f'{key}="a{character}b"'
    if key == "model.revision":
        (tmp_path / "run.yaml").write_text(RUN.replace("tiny-random", "me/it"))
        with pytest.raises(ConfigError, match="has the control character"):
            load_run(tmp_path / "run.yaml", [override])
        return
    where, what, _ = fault(tmp_path, override)
    assert where == key
    assert what.startswith("has the control character '\\x") or "'\\n'" in what


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ('data.train=["a", "b\\0"]', "data.train[1]"),
        ('data.train=[{path: "b\\0"}]', "data.train[0].path"),
        ('lora.rank_pattern={"a\\e": 2}', "lora.rank_pattern"),
        ('lora.targets=["a\\r"]', "lora.targets[0]"),
        ('data.columns.text="a\\0"', "data.columns.text"),
    ],
)
def test_also_inside_lists_and_keys(tmp_path: Path, override: str, where: str) -> None:
    assert fault(tmp_path, override)[0] == where


def test_bytes_that_are_no_text_name_the_language_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"its value is not YAML"):  # an override in LANG=C
        load_run(run_file(tmp_path), ["name=\udcc3"])
    assert "LC_ALL" in fault(tmp_path, "", "a\udcc3.yaml")[2]


def test_a_column_may_have_a_line_end_in_its_name(tmp_path: Path) -> None:
    assert load_run(run_file(tmp_path), ['data.columns.text="a\\nb"']).data.columns.text == "a\nb"


def test_a_run_file_whose_name_no_terminal_may_get_is_refused(tmp_path: Path) -> None:
    assert fault(tmp_path, "", "a\x1bb.yaml")[0] == "name"


@pytest.mark.parametrize("key", PATHS)
def test_a_name_that_no_file_system_takes_is_refused(tmp_path: Path, key: str) -> None:
    where, what, fix = fault(tmp_path, f"{key}={'x' * 300}")
    assert (where, fix) == (key, "shorten it")
    assert "a part of 300 bytes" in what
    assert "bytes, and a path has at most" in fault(tmp_path, f"{key}={'/xxxxx' * 900}")[1]


def test_a_run_folder_leaves_room_for_what_is_written_beside_it(tmp_path: Path) -> None:
    assert "at most 200" in fault(tmp_path, f"save.folder=runs/{'é' * 101}")[1]
    assert fault(tmp_path, f"name={'x' * 201}")[0] == "name"
    load_run(run_file(tmp_path), [f"save.folder=runs/{'é' * 100}"])


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("https://huggingface.co/microsoft/Phi-4", "write the hub id microsoft/Phi-4"),
        ("https://huggingface.co/datasets/me/rows/tree/main", "write the hub id me/rows"),
        ("https://me:secret@host/a/b/c.jsonl", "download it, and name the file or folder"),
        ("s3://bucket/rows.jsonl", "download it, and name the file or folder"),
    ],
)
def test_an_address_is_named_as_one_and_as_it_was_written(text: str, fix: str) -> None:
    what, told = path_fault(text)
    assert told == fix
    assert text.replace("me:secret@", "") in what


@pytest.mark.parametrize("key", PATHS)
def test_a_home_folder_is_written_out_in_every_path(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nowhere/me")
    resolved = resolved_yaml(load_run(run_file(tmp_path), [f"{key}=~/some where"]))
    assert "/nowhere/me/some where" in resolved
    assert "~" not in resolved
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))  # as in many containers
    where, what, fix = fault(tmp_path, f"{key}=~/some where")
    assert (where, fix) == (key, "write the path out, or set HOME")
    assert "begins with ~, and that home folder is not known here" in what


def test_a_tilde_elsewhere_is_a_letter(tmp_path: Path) -> None:
    cfg = load_run(run_file(tmp_path), ["data.train=['~/a', {path: ~/b, weight: 2}, c~d]", "log.project=~me"])
    assert cfg.data.model_dump()["train"][2] == "c~d"
    assert cfg.data.model_dump()["train"][1]["path"] == str(Path("~/b").expanduser())
    assert cfg.log.project == "~me"
