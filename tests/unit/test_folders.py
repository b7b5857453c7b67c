"""Folders of several splits: one is read, what is left out is said, and nothing is mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from phi3_dist.config.schema import DataConfig
from phi3_dist.data.blocks import read_chats
from phi3_dist.data.prepare import prepare
from phi3_dist.data.read.sources import HubSet, split_notices
from phi3_dist.data.show import show
from phi3_dist.errors import DataError
from phi3_dist.modeling.tokenizer import tiny_tokenizer


def fill(folder: Path, *names: str) -> Path:
    """A file of one row for each name; the row says which file it is of."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"prompt": name, "completion": "a"}) + "\n", encoding="utf-8")
    return folder


def config(train: Any, **more: Any) -> DataConfig:
    return DataConfig.model_validate({"train": train, "validation_share": 0, **more})


def read_of(folder: Path, **more: Any) -> list[str]:
    return [chat.messages[0].content for chat in read_chats(config(str(folder), **more)).train]


SHARD = "train_sft-00000-of-00001.jsonl"
SPLITS: list[tuple[list[str], str, list[str]]] = [
    (["train.jsonl", "test.jsonl", "dev.jsonl"], "train", ["train.jsonl"]),
    (["train.jsonl", "test.jsonl", "dev.jsonl"], "dev", ["dev.jsonl"]),
    (["train.jsonl", "test.jsonl", "valid.jsonl"], "validation", ["valid.jsonl"]),
    (["a_train_1.jsonl", "a_train_2.jsonl", "a.eval.jsonl"], "train", ["a_train_1.jsonl", "a_train_2.jsonl"]),
    (["a.jsonl", "b.jsonl", "test-b.jsonl"], "train", ["a.jsonl", "b.jsonl"]),
    (["train.jsonl", "more.jsonl"], "train", ["more.jsonl", "train.jsonl"]),
    (["train.jsonl", "test.jsonl", "more.jsonl"], "train", ["train.jsonl"]),
    (["a.jsonl", "latest.jsonl", "contest.jsonl"], "train", ["a.jsonl", "contest.jsonl", "latest.jsonl"]),
    (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], "train", ["train/a.jsonl", "train/b.jsonl"]),
    (["data/train.jsonl", "data/test.jsonl", "README.md"], "train", ["data/train.jsonl"]),
    ([SHARD, "test_sft-00000-of-00001.jsonl"], "train_sft", [SHARD]),
    (["en/train.jsonl", "en/test.jsonl", "de/train.jsonl"], "train", ["en/train.jsonl"]),
]  # fmt: skip


@pytest.mark.parametrize(("names", "split", "read"), SPLITS, ids=[f"{s}: {n[0]}" for n, s, _ in SPLITS])
def test_one_split_is_read(tmp_path: Path, names: list[str], split: str, read: list[str]) -> None:
    more = {"subset": "en"} if names[0].startswith("en/") else {}
    assert read_of(fill(tmp_path, *names), split=split, **more) == read


def test_what_is_left_out_is_said_and_offered(tmp_path: Path) -> None:
    folder = fill(tmp_path / "rows", "train.jsonl", "test.jsonl", "valid-1.jsonl", "valid-2.jsonl")
    cfg = config(str(folder), pack_length=128)
    notice = (
        f"{folder}: split train is read (data.split), left out: test (1 file), validation (2 files); "
        f"data.validation: {folder} with data.validation_split: validation would hold out validation"
    )
    assert split_notices(cfg) == [notice]
    for _ in range(2):  # from the cache, too
        assert prepare(cfg, tiny_tokenizer(), tmp_path / "cache").notices[0] == notice
    assert any(f"note: {notice}" in str(part) for part in show(cfg, tiny_tokenizer(), 1).renderables)
    held = config(str(folder), validation=str(folder))
    assert split_notices(held)[0].endswith("validation (2 files)")
    chats = read_chats(held)
    assert [c.messages[0].content for c in chats.held_out] == ["test.jsonl"]
    assert not split_notices(config(str(fill(tmp_path / "plain", "a.jsonl", "b.jsonl"))))


@pytest.mark.parametrize("names", [["train_sft-00000-of-00002.jsonl", "test_sft-00000-of-00001.jsonl"], ["test.jsonl"]])
def test_a_split_that_is_not_there(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(DataError, match=r"no split 'train'; it has (train_sft|test)") as caught:
        read_of(fill(tmp_path, *names))
    assert "set data.split" in str(caught.value)
    with pytest.raises(DataError, match=r"no split 'dev'(.|\n)*set data\.validation_split"):
        read_chats(config(str(fill(tmp_path / "b", "a.jsonl")), validation=str(tmp_path), validation_split="dev"))


README = """---
license: mit
configs:
- config_name: {first}
  data_files:
  - split: train
    path: en/part-*
  - split: test
    path: [en/rest.jsonl, ../outside.jsonl]
- config_name: de
  data_files: de/*.jsonl
---
# A set
"""
CLONE = ("en/part-1.jsonl", "en/part-2.jsonl", "en/rest.jsonl", "de/a.jsonl", "train.jsonl", "../outside.jsonl")


def test_a_clones_readme_says_what_is_what(tmp_path: Path) -> None:
    folder = tmp_path / "clone"
    folder.mkdir()
    fill(folder, *CLONE)
    (folder / "README.md").write_text(README.format(first="default"))
    assert read_of(folder) == ["en/part-1.jsonl", "en/part-2.jsonl"]
    assert read_of(folder, split="test") == ["en/rest.jsonl"]
    assert read_of(folder, subset="de") == ["de/a.jsonl"]
    one = [{"path": str(folder), "subset": "de"}, {"path": str(folder), "split": "test"}]
    assert [c.messages[0].content for c in read_chats(config(one)).train] == ["de/a.jsonl", "en/rest.jsonl"]
    (folder / "README.md").write_text(README.format(first="en"))
    with pytest.raises(DataError, match=r"several configurations: en, de(.|\n)*data\.subset"):
        read_of(folder)


@pytest.mark.parametrize("front", ["configs: [1, {data_files: 3}]", "a: &a [x]\nconfigs: [*a, *a]", "{", "configs: {}"])
def test_a_readme_that_says_nothing_leaves_it_to_the_names(tmp_path: Path, front: str) -> None:
    fill(tmp_path, "train.jsonl", "test.jsonl")
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    assert read_of(tmp_path) == ["train.jsonl"]


def test_a_hub_set_of_several_configurations(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    folder = fill(tmp_path / "set", "en.jsonl", "de.jsonl")
    front = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("en", "de"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{front}---\n")
    assert HubSet(str(folder), "train", None, "de").load()["prompt"][:] == ["de.jsonl"]
    for subset in (None, "fr"):
        with pytest.raises(DataError, match=r"has several configurations: 'en', 'de'(.|\n)*data\.subset"):
            HubSet(str(folder), "train", None, subset).load()
    datasets.enable_progress_bars()


def test_the_splits_of_a_saved_set_are_said(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    one = datasets.Dataset.from_list([{"prompt": "q", "completion": "a"}])
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "both")
    datasets.enable_progress_bars()
    (notice,) = split_notices(config(str(tmp_path / "both")))
    assert "left out: test (1 table)" in notice


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "~nobody_of_this_name/rows"])
def test_names_that_no_system_can_look_at(name: str) -> None:
    with pytest.raises(DataError):
        read_chats(config(name))
