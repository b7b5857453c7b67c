"""Rows in the forms people bring: each becomes the same conversation, or is refused with its reason."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from phi3_dist.config.schema import DataConfig
from phi3_dist.data.blocks import read_chats
from phi3_dist.data.prepare import prepare
from phi3_dist.data.read.row_formats import BadRow, Chat, RowReader
from phi3_dist.data.read.turns import TEXT, Message
from phi3_dist.data.render.encode import document_end
from phi3_dist.data.show import show
from phi3_dist.errors import DataError
from phi3_dist.modeling.tokenizer import tiny_tokenizer

QUESTION, ANSWER = Message("user", "Q"), Message("assistant", "A")
SYSTEM = Message("system", "S")
MESSAGES = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
HUMAN = {"from": "human", "value": "Q"}
SHAREGPT = {"conversations": [HUMAN, {"from": "gpt", "value": "A"}]}
ALPACA = {"instruction": "Q", "input": "", "output": "A"}
PAIR = {"prompt": "Q", "completion": "A"}


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def config(train: object, **more: Any) -> DataConfig:
    return DataConfig.model_validate({"train": train, "validation_share": 0, **more})


GOOD: list[tuple[str, dict[str, Any], tuple[Message, ...]]] = [
    ("messages", MESSAGES, (QUESTION, ANSWER)),
    ("messages", {**MESSAGES, **PAIR, "text": "x"}, (QUESTION, ANSWER)),
    ("sharegpt", SHAREGPT, (QUESTION, ANSWER)),
    (
        "sharegpt",
        {"conversations": [{"from": r, "value": v} for r, v in (("system", "S"), ("user", "Q"), ("assistant", "A"))]},
        (SYSTEM, QUESTION, ANSWER),
    ),
    ("sharegpt", {"conversations": [*SHAREGPT["conversations"]], "system": "S"}, (SYSTEM, QUESTION, ANSWER)),
    (
        "sharegpt",
        {"conversations": [*SHAREGPT["conversations"], HUMAN, {"from": "gpt", "value": "A", "weight": 0}]},
        (QUESTION, ANSWER, QUESTION, Message("assistant", "A", 0)),
    ),
    ("alpaca", ALPACA, (QUESTION, ANSWER)),
    ("alpaca", {"instruction": "Q", "output": "A", "system": "S"}, (SYSTEM, QUESTION, ANSWER)),
    ("alpaca", {**ALPACA, "input": "more", "text": "all"}, (Message("user", "Q\n\nmore"), ANSWER)),
    ("prompt_completion", PAIR, (QUESTION, ANSWER)),
    ("text", {"text": " Once upon\n", "id": 7}, (Message(TEXT, " Once upon\n"),)),
    (
        "prompt_completion",
        {
            "prompt": [*MESSAGES["messages"], MESSAGES["messages"][0]],
            "completion": [{"role": "assistant", "content": "B"}],
        },
        (QUESTION, Message("assistant", "A", 0), QUESTION, Message("assistant", "B")),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("format", "row", "messages"), GOOD)
def test_every_format_is_detected_and_can_be_named(
    format: str, row: dict[str, Any], messages: tuple[Message, ...]
) -> None:
    for asked in ("auto", format):
        reader = RowReader(asked, {})  # type: ignore[arg-type]
        assert reader.read(row, "a:1") == Chat(messages, "a:1")
        assert reader.format == format


BAD: list[tuple[str, object, str]] = [
    ("text", {"text": ["once"]}, "text is a list, not text"),
    ("text", {"text": " "}, "text is empty"),
    ("text", {"body": "x"}, "no text; its keys are body"),
    ("auto", {"instruction": "Q", "input": "x"}, "no output beside instruction; its keys are instruction, input"),
    ("auto", {}, "no messages"),
    ("alpaca", {"instruction": "Q"}, "no output beside instruction; its keys are instruction"),
    ("prompt_completion", {"x": 1}, "no prompt and no completion; its keys are x"),
    ("alpaca", MESSAGES, "is messages where the source is alpaca: one source has one format"),
    ("alpaca", {**ALPACA, "output": " "}, "output is empty"),
    ("alpaca", {**ALPACA, "instruction": 3}, "instruction is a number, not text"),
    ("alpaca", {**ALPACA, "input": ["x"]}, "input is a list, not text"),
    ("alpaca", {**ALPACA, "system": 3}, "system is a number, not text"),
    ("alpaca", {**ALPACA, "history": [["a", "b"]]}, "has history, which is not supported"),
    ("prompt_completion", {"prompt": "\ud800", "completion": "A"}, "prompt holds half of a surrogate pair"),
    ("prompt_completion", {"prompt": MESSAGES["messages"], "completion": "A"}, "prompt is a list, not text"),
    ("sharegpt", {"conversations": "x"}, "conversations is text, not a list"),
    ("sharegpt", {"conversations": []}, "conversations is empty"),
    ("sharegpt", {"conversations": ["x"]}, "conversations[0]: not an object but text"),
    (
        "sharegpt",
        {"conversations": [{"from": "critic", "value": "x"}]},
        "conversations[0]: unknown from 'critic'; known",
    ),
    ("sharegpt", {"conversations": [{"from": ["x"], "value": "x"}]}, "conversations[0]: unknown from ['x']"),
    ("sharegpt", {"conversations": SHAREGPT["conversations"][1:]}, "conversations[0] is assistant where user is due"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "conversations[0]: empty content (user)"),
]


@pytest.mark.parametrize(("format", "row", "reason"), BAD, ids=[reason for _, _, reason in BAD])
def test_rows_that_do_not_fit_say_why(format: str, row: object, reason: str) -> None:
    bad = RowReader(format, {}).read(row, "a:1")  # type: ignore[arg-type]
    assert isinstance(bad, BadRow)
    assert reason in bad.reason


def test_columns_have_other_names(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"question": "Q", "answer": "A", "prompt": 7, "persona": "S"})
    columns = {"prompt": "question", "completion": "answer", "system": "persona"}
    assert read_chats(config(file, columns=columns)).train[0].messages == (SYSTEM, QUESTION, ANSWER)
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"chat": MESSAGES["messages"], "id": 1}]), table)
    assert read_chats(config(str(table), columns={"messages": "chat"})).train[0].messages == (QUESTION, ANSWER)
    with pytest.raises(DataError, match=r"no column `talk`; its columns are chat, id(.|\n)*data\.columns"):
        read_chats(config(str(table), columns={"messages": "talk"}, format="messages"))
    with pytest.raises(ValidationError, match="mesages"):
        config(file, columns={"mesages": "x"})


def test_a_source_has_one_format_and_sources_may_differ(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", {**ALPACA, "output": ""}, PAIR, ALPACA, PAIR)
    second = write(tmp_path / "b.jsonl", MESSAGES)
    third = write(tmp_path / "c.jsonl", PAIR)
    chats = read_chats(config([first, second, third], on_bad_row="skip"))
    assert [chat.place for chat in chats.train] == ["a.jsonl:2", "a.jsonl:4", "b.jsonl:1", "c.jsonl:1"]
    assert [(bad.place, bad.reason) for bad in chats.skipped] == [
        ("a.jsonl:1", "output is empty"),
        ("a.jsonl:3", "is alpaca where the source is prompt_completion: one source has one format"),
    ]
    assert chats.notices == ("a.jsonl, c.jsonl: rows are read as prompt_completion (data.format: auto)",)
    assert read_chats(config(third, format="prompt_completion")).notices == ()


def test_the_detected_format_is_shown(tmp_path: Path) -> None:
    cfg = config(write(tmp_path / "a.jsonl", ALPACA), pack_length=64)
    notice = "a.jsonl: rows are read as alpaca (data.format: auto)"
    for _ in range(2):  # from the cache too
        assert prepare(cfg, tiny_tokenizer(), tmp_path / "cache").notices == (notice,)
    assert any(f"note: {notice}" in str(part) for part in show(cfg, tiny_tokenizer(), 1).renderables)
    messages = config(write(tmp_path / "b.jsonl", MESSAGES), pack_length=64)
    assert prepare(messages, tiny_tokenizer(), None).notices == ()
    first, second = (prepare(c, tiny_tokenizer(), None).fingerprint for c in (cfg, messages))
    assert first == second


def rows(n: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(start, start + n)]


def test_sources_count_by_their_weights(tmp_path: Path) -> None:
    plain, twice, part = (write(tmp_path / f"{i}.jsonl", *rows(400, 1000 * i)) for i in range(3))
    weighted = [plain, {"path": twice, "weight": 2}, {"path": part, "weight": 0.25}]
    chats = read_chats(config(weighted))
    counts = {name: [c.place for c in chats.train if c.place.startswith(name)] for name in ("0", "1", "2")}
    assert counts["0"] == [f"0.jsonl:{i}" for i in range(1, 401)]
    assert counts["1"] == [f"1.jsonl:{i}" for i in range(1, 401) for _ in range(2)]
    assert 70 <= len(counts["2"]) <= 130
    assert len(set(counts["2"])) == len(counts["2"])
    assert chats.notices[-1] == f"weights of data.train: 1,200 training rows are read as {len(chats.train):,}"
    # which rows count depends on nothing but the rows
    again = [c.place for c in read_chats(config([{"path": part, "weight": 0.25}])).train]
    assert again == counts["2"]
    more = read_chats(config([{"path": part, "weight": 1.25}])).train
    assert len(more) == 400 + len(again)
    assert {c.place for c in more if more.count(c) == 2} == set(again)


def test_held_out_rows_have_no_weight(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *rows(200))
    plain = read_chats(config(file, validation_share=0.2))
    heavy = read_chats(config([{"path": file, "weight": 3}], validation_share=0.2))
    assert heavy.held_out == plain.held_out
    assert len(heavy.train) == 3 * len(plain.train)
    prepared = prepare(config([{"path": file, "weight": 3}], pack_length=64), tiny_tokenizer(), tmp_path / "cache")
    assert len(prepared.train.rows) == 600


def test_weights_that_leave_nothing(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", PAIR)
    with pytest.raises(DataError, match="no row is left of 1 with these weights"):
        read_chats(config([{"path": file, "weight": 1e-9}]))
    for weight in (0, -1, True):
        with pytest.raises(ValidationError):
            config([{"path": file, "weight": weight}])


def test_raw_text_is_learned_but_for_its_first_token(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    file = write(tmp_path / "a.jsonl", {"story": "Once"}, {"story": " upon\n"}, {"story": "a <|end|> time"})
    cfg = config(file, columns={"text": "story"}, on_bad_row="skip", pack_length=16)
    prepared = prepare(cfg, tokenizer, None)
    assert [(bad.place, bad.reason) for bad in prepared.skipped] == [
        ("a.jsonl:3", "text holds '<|end|>', which the tokenizer would read as a control token")
    ]
    rows = prepared.train.rows
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    spans = [slice(a, b) for a, b in pairwise(rows.offsets.tolist())]
    assert [tokenizer.decode(rows.ids[s][:-1]) for s in spans] == ["Once", " upon\n"]
    assert [int(rows.ids[s][-1]) for s in spans] == [end, end]
    assert [rows.supervised[s].tolist() for s in spans] == [[False] + [True] * 4, [False] + [True] * 6]
    assert prepared.notices == ("a.jsonl: rows are read as text (data.format: auto)",)
    assert int(prepared.train.targets.sum()) == 10
    shown = show(cfg, tokenizer, 2)
    assert any("rows are read as text" in str(part) for part in shown.renderables)


def test_raw_text_beside_conversations_changes_none_of_them(tmp_path: Path) -> None:
    chats, texts = write(tmp_path / "a.jsonl", MESSAGES, MESSAGES), write(tmp_path / "b.jsonl", {"text": "Once"})
    mixed = prepare(config([texts, chats, texts], pack_length=64), tiny_tokenizer(), None).train.rows
    alone = prepare(config(chats, pack_length=64), tiny_tokenizer(), None).train.rows
    inside = slice(int(mixed.offsets[1]), int(mixed.offsets[3]))
    assert mixed.ids[inside].tolist() == alone.ids.tolist()
    assert mixed.supervised[inside].tolist() == alone.supervised.tolist()


def test_the_token_that_ends_a_document() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|end|>"  # as in Phi-4, whose turns end with its eos token
    assert document_end(tokenizer) == "<|endoftext|>"
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")), eos_token="</s>")
    assert document_end(other) == "</s>"
