"""Rows are read from every kind of source, and each bad one is named with its place and reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from phi3_dist.config.schema import DataConfig
from phi3_dist.data.blocks import read_chats
from phi3_dist.data.read.row_formats import BadRow, Chat
from phi3_dist.data.read.sources import prompt_share
from phi3_dist.data.read.turns import Message
from phi3_dist.errors import DataError


def row(user: str = "What?", answer: str = "That.", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer, **more}]}


def write(path: Path, *lines: object) -> str:
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return str(path)


def config(train: str | tuple[str, ...], **more: Any) -> DataConfig:
    return DataConfig.model_validate({"train": train, "validation_share": 0, **more})


def turns(*roles: str, content: str = "x", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content, **more} for role in roles]}


BAD = [
    (b"{oops", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"messages": "\xff"}', "not UTF-8"),
    ([1], "not an object but a list"),
    ({"prompt": "x"}, "no messages; its keys are prompt"),
    ({"messages": None}, "no messages"),
    ({"messages": "hi"}, "messages is text, not a list"),
    ({"messages": []}, "messages is empty"),
    ({"messages": ["hi"]}, "messages[0]: not an object but text"),
    (turns("user", "critic"), "messages[1]: unknown role 'critic'; known are system, user, assistant, tool"),
    (turns("user", "tool"), "messages[1] is tool where assistant is due (tool follows an assistant turn"),
    (turns("user", "assistant", "tool", "user"), "messages[3] is user where assistant is due"),
    ({"messages": [{"content": "x"}]}, "unknown role None"),
    (row(answer=" \n"), "messages[1]: empty content (assistant)"),
    (row(user=None), "messages[0]: empty content (user)"),  # type: ignore[arg-type]
    (row(answer=["x"]), "content is a list, not text"),  # type: ignore[arg-type]
    (turns("assistant", "user"), "messages[0] is assistant where user is due"),
    (turns("user", "user", "assistant"), "messages[1] is user where assistant is due"),
    (turns("user", "system", "assistant"), "system may only come first"),
    (turns("system", "user"), "no assistant turn"),
    (turns("system"), "no assistant turn"),
    (row(weight=2), "weight is 2; it can be 0 or 1"),
    (row(weight=0.5), "weight is 0.5"),
    (row(weight=True), "weight is True"),
    (row(weight=0), "supervises nothing"),
    (row(answer="x", tool_calls=[{"id": 1}]), "tool_calls, which is not supported"),
    ({**row(), "tools": [{"name": "f"}]}, "has tools"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_bad_row_is_named(tmp_path: Path, bad: object, reason: str) -> None:
    file = write(tmp_path / "chats.jsonl", row(), b"", bad, row())
    with pytest.raises(DataError) as caught:
        read_chats(config(file))
    problem = caught.value.problems[0]
    assert problem.where == "chats.jsonl:3"
    assert reason in problem.what
    skipped = read_chats(config(file, on_bad_row="skip"))
    assert [chat.place for chat in skipped.train] == ["chats.jsonl:1", "chats.jsonl:4"]
    assert skipped.skipped == [BadRow("chats.jsonl:3", problem.what)]


def test_all_bad_rows_at_once_and_the_list_is_capped(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", *[b" " * i + b"no" for i in range(15)])
    held = write(tmp_path / "b.jsonl", *[b" " * i + b"no" for i in range(20, 35)])
    with pytest.raises(DataError) as caught:
        read_chats(config(train, validation=held))
    problems = caught.value.problems
    assert [p.where for p in problems[:20]] == [f"a.jsonl:{i}" for i in range(1, 16)] + [
        f"b.jsonl:{i}" for i in range(1, 6)
    ]
    assert len(problems) == 21
    assert "and 10 more; 30 bad rows" in problems[20].what
    assert "on_bad_row: skip" in problems[20].fix


def test_good_rows_in_every_form(tmp_path: Path) -> None:
    many = {
        "messages": [{"role": "system", "content": "s"}, *turns("user", "assistant", "user", "assistant")["messages"]]
    }
    many["messages"][2]["weight"] = 0
    file = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + json.dumps(many).encode(), b"  ", row("a\u2028b", name="x"))
    chats = read_chats(config(file))
    assert [chat.place for chat in chats.train] == ["a.jsonl:1", "a.jsonl:3"]
    assert [m.weight for m in chats.train[0].messages] == [1, 1, 0, 1, 1]
    assert chats.train[1].messages == (Message("user", "a\u2028b"), Message("assistant", "That."))
    raw = json.dumps(row("a\u2028b"), ensure_ascii=False).encode()
    assert read_chats(config(write(tmp_path / "raw.jsonl", raw))).train[0].messages[0].content == "a\u2028b"
    assert chats.held_out == []


def test_parquet_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    (folder / "deeper").mkdir(parents=True)
    table = pyarrow.Table.from_pylist([{**row(str(i), weight=1), "id": i} for i in range(3)])
    pyarrow.parquet.write_table(table, folder / "part-0.parquet")
    write(folder / "part-1.jsonl", row())
    write(folder / "deeper" / "no.jsonl", b"bad")
    (folder / ".hidden.jsonl").write_text("bad")
    (folder / "README.md").write_text("bad")
    chats = read_chats(config(str(folder)))
    assert [c.place for c in chats.train] == [f"part-0.parquet row {i}" for i in range(3)] + ["part-1.jsonl:1"]
    assert [c.messages[0].content for c in chats.train] == ["0", "1", "2", "What?"]
    assert len(read_chats(config(str(folder), max_rows=2)).train) == 2


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files.append(write(tmp_path / name / "a.jsonl", row()))
    assert [c.place for c in read_chats(config(tuple(files))).train] == [f"{file}:1" for file in files]


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path / "chats.jsonl", row())
    write(tmp_path / "empty.jsonl", b"")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"words": "x"}]), tmp_path / "other.parquet")

    def message(*names: str) -> str:
        with pytest.raises(DataError) as caught:
            read_chats(config(tuple(str(tmp_path / name) for name in names)))
        return str(caught.value)

    several = message("chat.jsonl", "nothing", "a.txt")
    assert "did you mean" in several
    assert "chats.jsonl" in several
    assert "holds no .jsonl, .csv, .parquet file" in several
    assert "a.txt is no .jsonl, .json, .csv, .parquet file" in several
    assert "holds no rows" in message("empty.jsonl")
    assert "not a Parquet file" in message("broken.parquet")
    assert "no column `messages`, or `conversations`" in message("other.parquet")
    assert "its columns are words" in message("other.parquet")
    assert "does not exist either" in message("no/such/file.jsonl")
    with pytest.raises(DataError, match="no usable row"):
        read_chats(config(write(tmp_path / "bad.jsonl", b"bad"), on_bad_row="skip"))


def test_a_slip_in_a_relative_path_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "chats").mkdir(parents=True)
    with pytest.raises(DataError, match="did you mean data/chats"):
        read_chats(config("data/chatz"))


def test_hub_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str, str | None]] = []

    def load_dataset(name: str, subset: str | None, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((name, subset, split, revision))
        return datasets.Dataset.from_list([row("a"), row("b")])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    chats = read_chats(config("owner/name", split="train_sft", validation="owner/name", revision="v1"))
    assert [c.place for c in chats.train] == ["owner/name[train_sft] row 0", "owner/name[train_sft] row 1"]
    assert len(chats.held_out) == 2
    assert asked == [("owner/name", None, "train_sft", "v1"), ("owner/name", None, "test", "v1")]


def test_hub_set_out_of_reach_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="hub set can't be loaded") as caught:
        read_chats(config("nobody/no-such-set"))
    assert "folder of its Parquet files" in str(caught.value)


def test_split_keeps_equal_prompts_together_and_is_stable(tmp_path: Path) -> None:
    rows = [row(f"question {i % 50}", f"answer {i}") for i in range(200)]
    file = write(tmp_path / "a.jsonl", *rows)
    chats = read_chats(config(file, validation_share=0.3))
    sides = [{c.messages[0].content for c in side} for side in (chats.train, chats.held_out)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 50
    assert 5 <= len(sides[1]) <= 25
    more = read_chats(config(write(tmp_path / "b.jsonl", row("new"), *reversed(rows)), validation_share=0.3))
    assert {c.messages[0].content for c in more.held_out} - {"new"} == sides[1]


def test_prompt_share_is_a_fixed_function_of_the_prompt() -> None:
    def chat(*messages: tuple[str, str]) -> Chat:
        return Chat(tuple(Message(role, content) for role, content in messages), "p")

    first = chat(("user", "hi"), ("assistant", "a"))
    assert prompt_share(first) == pytest.approx(0.40373953994180667, abs=1e-12)
    assert prompt_share(first) == prompt_share(chat(("user", "hi"), ("assistant", "b"), ("user", "c")))
    assert prompt_share(first) != prompt_share(chat(("system", "s"), ("user", "hi"), ("assistant", "a")))


def test_a_split_that_leaves_nothing_to_train_on(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", row())
    with pytest.raises(DataError, match="none is left to train on"):
        read_chats(config(file, validation_share=0.9999999))
