"""Turns as people write them: each key that means something is honoured, refused or counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phi3_dist.config.schema import DataConfig
from phi3_dist.data.blocks import Totals, blocks_of, encode_blocks_of, read_chats
from phi3_dist.data.read import turns
from phi3_dist.data.read.row_formats import BadRow, Chat, RowReader
from phi3_dist.data.read.turns import Message, Rules
from phi3_dist.data.render.encode import encode_chats
from phi3_dist.data.render.template_probe import ChatFormat
from phi3_dist.errors import DataError
from phi3_dist.modeling.tokenizer import tiny_tokenizer

ASKED = {"role": "user", "content": "Q"}
NAN = float("nan")
PHI3 = tiny_tokenizer()


def answer(content: Any = "A", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def row(*messages: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}


def read(value: Any, **rules: Any) -> tuple[Chat | BadRow, dict[tuple[str, str], int]]:
    reader = RowReader("auto", {}, Rules(**rules))
    return reader.read(value, "a:1"), dict(reader.seen)


def config(path: Path, *rows: Any, **more: Any) -> DataConfig:
    path.write_text("".join(f"{json.dumps(value)}\n" for value in rows), encoding="utf-8")
    return DataConfig.model_validate({"train": str(path), "validation_share": 0, "pack_length": 512, **more})


@pytest.mark.parametrize("key", ["weight", "loss", "train", "trainable", "train_on_turn"])
@pytest.mark.parametrize("no", [0, 0.0, False])
@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_a_flag_keeps_an_answer_out_of_the_loss(key: str, no: Any, form: str) -> None:
    if key == "weight" and no is False:
        return
    yes: Any = type(no)(1)
    bad, good = answer("bad", **{key: no}), answer("good", **{key: yes})
    found, seen = read({form: [ASKED, bad, ASKED, good]})
    assert isinstance(found, Chat)
    assert [m.weight for m in found.messages] == [1, 0, 1, 1]
    assert seen == {("not learned", key): 1}
    found, seen = read({form: [ASKED, bad, ASKED, good]}, ignore=frozenset({key}))
    assert isinstance(found, Chat)
    assert [m.weight for m in found.messages] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("flag", "known"),
    [({"loss": "no"}, "true or false"), ({"train": 2}, "true or false"), ({"weight": 0.5}, "0 or 1")],
)
def test_a_flag_that_says_neither_is_refused(flag: dict[str, Any], known: str) -> None:
    found, _ = read(row(ASKED, answer(**flag)))
    assert isinstance(found, BadRow)
    assert f"it can be {known}" in found.reason


def test_what_is_counted() -> None:
    told = {**ASKED, "train": True, "name": "Ann", "id": ""}
    found, seen = read(
        row({"role": "system", "content": " "}, told, answer(mask=False), labels=[1], chosen="x", empty=None)
    )
    assert found == Chat((Message("user", "Q"), Message("assistant", "A")), "a:1")
    assert seen == {
        ("empty system", ""): 1,
        ("asks to learn", "train"): 1,
        ("message key", "name"): 1,
        ("message key", "mask"): 1,
        ("column", "labels"): 1,
        ("column", "chosen"): 1,
    }
    ignore = frozenset({"name", "mask", "labels", "chosen", "train"})
    assert read(row(told, answer(mask=False), labels=[1], chosen="x"), ignore=ignore)[1] == {}


def test_counts_reach_the_notices_and_bad_rows_have_none(tmp_path: Path) -> None:
    good = row({"role": "system", "content": ""}, ASKED, answer(loss=False), ASKED, answer(name="x"), rejected="r")
    bad = row(ASKED, rejected="r")
    chats = read_chats(config(tmp_path / "a.jsonl", good, good, bad, on_bad_row="skip"))
    assert chats.notices == (
        "answers that are not learned, by their own flag: loss (2)",
        "2 empty system messages are left out",
        "not read: columns rejected (2); message keys name (2) (list intended ones in data.ignore)",
    )


def test_an_empty_system_message_moves_no_place() -> None:
    found, _ = read(row({"role": "system", "content": None}, ASKED, ASKED))
    assert isinstance(found, BadRow)
    assert "messages[2] is user where assistant is due" in found.reason
    for nothing in ([{"role": "system", "content": ""}], [{"from": "system", "value": NAN}]):
        found, _ = read({"messages": nothing})
        assert found == BadRow("a:1", "no assistant turn")


PARTS = [{"type": "text", "text": "one "}, {"type": "input_text", "text": "two"}]


def test_text_parts_are_joined_and_others_refused_by_kind() -> None:
    found, _ = read(row({"role": "user", "content": PARTS}, answer([{"type": "text", "text": "A"}])))
    assert found == Chat((Message("user", "one two"), Message("assistant", "A")), "a:1")
    for part, kind in (({"type": "image_url", "image_url": "x"}, "'image_url'"), ({"text": "x"}, "None")):
        found, _ = read(row({"role": "user", "content": [*PARTS, part]}, answer()))
        assert isinstance(found, BadRow)
        assert f"messages[0]: content[2] is a part of type {kind}, and only text" in found.reason
    found, _ = read(row({"role": "user", "content": [{"type": "text", "text": ""}]}, answer()))
    assert found == BadRow("a:1", "messages[0]: empty content (user)")


@pytest.mark.parametrize(
    "value",
    [
        row(ASKED, answer(), images=["a.png"]),
        row(ASKED, answer(), image={"bytes": "x"}),
        row({**ASKED, "videos": ["a.mp4"]}, answer()),
        row({"role": "user", "content": "<image>What is it?"}, answer()),
        row({"role": "user", "content": "<|image_1|>What is it?"}, answer()),
        {"prompt": "<audio>Who speaks?", "completion": "x"},
        {"instruction": "<video> What happens?", "output": "x"},
    ],
)
def test_what_is_no_text_is_refused(value: Any) -> None:
    found, _ = read(value)
    assert isinstance(found, BadRow)
    assert "only text can be trained on" in found.reason


def test_html_and_empty_pictures_are_text() -> None:
    page = {"role": "user", "content": "Why is <video>x</video> black, and <image> </image> too?"}
    for value in (row(page, answer()), row(ASKED, answer(), images=[], image=None, audio=NAN)):
        assert isinstance(read(value)[0], Chat)
    with_hole = row({"role": "user", "content": "<image>"}, answer(), images=["x"])
    assert isinstance(read(with_hole, ignore=frozenset({"images", "<image>"}))[0], Chat)


@pytest.mark.parametrize("none", ["[]", [], "null", None, "", NAN, " {} "])
def test_no_tools_are_no_tools(none: Any) -> None:
    assert isinstance(read(row(ASKED, answer(tool_calls=none), tools=none))[0], Chat)
    found, _ = read(row(ASKED, answer(), tools='[{"name": "f"}]'))
    assert found == BadRow("a:1", "has tools, which are not supported")


def test_nan_is_missing() -> None:
    found, seen = read({"instruction": "Q", "input": NAN, "output": "A", "system": NAN, "note": NAN})
    assert found == Chat((Message("user", "Q"), Message("assistant", "A")), "a:1")
    assert not seen
    assert isinstance(read(row(ASKED, answer(weight=NAN, loss=None)))[0], Chat)


@pytest.mark.parametrize("key", ["messages", "conversations", "conversation", "turns", "dialogue"])
@pytest.mark.parametrize(
    "turns", [[ASKED, answer()], [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]], ids=["role", "from"]
)
def test_turns_of_either_kind_in_a_column_of_any_usual_name(key: str, turns: list[Any]) -> None:
    found, seen = read({key: turns, "id": 3})
    assert found == Chat((Message("user", "Q"), Message("assistant", "A")), "a:1")
    assert seen.get(("turns in", key), 0) == (key not in ("messages", "conversations"))
    assert ("column", key) not in seen


@pytest.mark.parametrize(
    ("value", "way"),
    [
        ({"question": "Q", "answer": "A"}, "data.columns: {prompt: question, completion: answer}"),
        ({"Question": "Q", "Response": "A"}, "data.columns: {prompt: Question, completion: Response}"),
        (
            {"instruction": "Q", "context": "c", "response": "A"},
            "input: context, output: response} reads it as",
        ),
        ({"log": [ASKED, answer()]}, "data.columns: {messages: log}"),
        ({"words": "x"}, "its keys are words"),
    ],
)
def test_a_row_of_other_columns_names_the_way(value: Any, way: str) -> None:
    found, _ = read(value)
    assert isinstance(found, BadRow)
    assert way in found.reason


THINKS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m.reasoning_content is defined %}{{ '(' + m.reasoning_content + ')' }}{% endif %}"
    "{{ m['content'] + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def notices(cfg: DataConfig, tokenizer: Any) -> list[str]:
    fmt, totals = ChatFormat.of(tokenizer), Totals(cfg)
    for _, done in encode_blocks_of(blocks_of(cfg), cfg, fmt, tokenizer):
        totals.add(done.tallies)
    totals.check()
    return totals.notices(fmt)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_reasoning_is_rendered_where_the_template_does(tmp_path: Path, key: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKS
    cfg = config(tmp_path / "a.jsonl", row(ASKED, answer(**{key: "hm"})), row(ASKED, answer()))
    chats = read_chats(cfg).train
    first, second = encode_chats(tokenizer, chats, "all")
    assert tokenizer.decode(first.ids) == "<|user|>Q<|end|><|assistant|>(hm)A<|end|>"
    assert tokenizer.decode(second.ids) == "<|user|>Q<|end|><|assistant|>A<|end|>"
    assert sum(first.supervised) == len("(hm)A") + 1
    assert notices(cfg, tokenizer) == [f"reasoning is rendered as the chat template does: {key} (1)"]
    (said,) = notices(cfg, PHI3)
    assert said.startswith(f"reasoning is dropped: {key} (1) (the chat template does not render it; data.reasoning")
    control = config(tmp_path / "b.jsonl", row(ASKED, answer(**{key: "<|end|>"})))
    with pytest.raises(DataError, match=r"holds '<\|end\|>'"):
        encode_chats(tokenizer, read_chats(control).train, "all")


def test_reasoning_can_be_dropped_or_refused() -> None:
    value = row(ASKED, answer(reasoning_content="hm"))
    assert read(value, reasoning="drop") == (Chat((Message("user", "Q"), Message("assistant", "A")), "a:1"), {})
    assert read(value)[0] == Chat((Message("user", "Q"), Message("assistant", "A", 1, "hm")), "a:1")
    found, _ = read(value, reasoning="refuse")
    assert isinstance(found, BadRow)
    assert "has reasoning_content, which data.reasoning: refuse" in found.reason


def test_a_text_beyond_all_packs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "LONGEST_TEXT", 10)
    found, _ = read({"prompt": "x" * 11, "completion": "A"})
    assert found == BadRow("a:1", "prompt has 11 characters, 10 at most")


def test_reasons_are_one_short_printable_line() -> None:
    for value in ({"\x1b]0;title\x07": 1}, {f"k{i}\n": i for i in range(5000)}, row({"role": "\u202e" * 900})):
        found, _ = read(value)
        assert isinstance(found, BadRow)
        assert found.reason.isprintable()
        assert len(found.reason) < 700
