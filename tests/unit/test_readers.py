"""Files of every kind give the same rows; what is wrong is named by file and line or row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from phi3_dist.config.schema import DataConfig
from phi3_dist.data.blocks import read_chats
from phi3_dist.data.prepare import prepare
from phi3_dist.data.read import raw_rows as readers
from phi3_dist.data.read.file_types import kind_of
from phi3_dist.data.read.json_array import array_elements
from phi3_dist.errors import DataError
from phi3_dist.modeling.tokenizer import tiny_tokenizer

ROWS = [{"prompt": f'question {i},\n"{"é" * i}"', "completion": f"answer {i}"} for i in range(3)]


def config(path: Path, **more: Any) -> DataConfig:
    return DataConfig.model_validate({"train": str(path), "validation_share": 0, **more})


def lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def table(rows: list[dict[str, str]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["prompt", "completion"])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8-sig")


def zst(raw: bytes) -> bytes:
    return bytes(pyarrow.compress(raw, codec="zstd", asbytes=True))


FILES: list[tuple[str, Callable[[], bytes], str]] = [
    ("a.jsonl", lambda: lines(ROWS), "a.jsonl:3"),
    ("A.JSONL.GZ", lambda: gzip.compress(lines(ROWS)), "A.JSONL.GZ:3"),
    ("a.jsonl.zst", lambda: zst(lines(ROWS)), "a.jsonl.zst:3"),
    ("a.json", lambda: json.dumps(ROWS, indent=1).encode("utf-8-sig"), "a.json row 2"),
    ("a.json.gz", lambda: gzip.compress(json.dumps(ROWS).encode()), "a.json.gz row 2"),
    ("a.json.zst", lambda: zst(json.dumps(ROWS).encode()), "a.json.zst row 2"),
    ("lines.json", lambda: lines(ROWS), "lines.json:3"),
    ("a.csv", lambda: table(ROWS), "a.csv:6"),
    ("a.csv.gz", lambda: gzip.compress(table(ROWS)), "a.csv.gz:6"),
]


@pytest.mark.parametrize(("name", "raw", "place"), FILES, ids=[name for name, _, _ in FILES])
def test_every_kind_of_file_gives_the_same_rows(
    tmp_path: Path, name: str, raw: Callable[[], bytes], place: str
) -> None:
    (tmp_path / name).write_bytes(raw())
    chats = read_chats(config(tmp_path / name))
    pairs = [tuple(message.content for message in chat.messages) for chat in chats.train]
    assert pairs == [(row["prompt"], row["completion"]) for row in ROWS]
    assert chats.train[2].place == place
    assert len(read_chats(config(tmp_path / name, max_rows=1)).train) == 1


@pytest.mark.parametrize(("name", "kind"), [("a.b.jsonl", ".jsonl"), ("a.csv.zst", ".csv"), ("a.parquet.gz", ""),
                                            ("a.gz", ""), ("jsonl", ""), ("a.txt", "")])  # fmt: skip
def test_kind_by_name(name: str, kind: str) -> None:
    assert kind_of(Path(name)) == kind


def test_bad_rows_are_named_in_every_kind(tmp_path: Path) -> None:
    good, bad = {"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": " "}
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines([good, bad]) + b"{oops\n"))
    (tmp_path / "a.json").write_text(json.dumps([good, bad, 7]))
    (tmp_path / "a.csv").write_text('prompt,completion\nq,"two\nlines"\n\nq,\nq\nq,a,b\n')
    (tmp_path / "text.csv").write_text("prompt,completion\nq,a\n")

    def skipped(name: str) -> list[tuple[str, str]]:
        chats = read_chats(config(tmp_path / name, on_bad_row="skip"))
        assert len(chats.train) == 1
        return [(row.place, row.reason) for row in chats.skipped]

    assert [place for place, _ in skipped("a.jsonl.gz")] == ["a.jsonl.gz:2", "a.jsonl.gz:3"]
    assert skipped("a.json") == [
        ("a.json row 1", "completion is empty"),
        ("a.json row 2", "not an object but a number"),
    ]
    assert skipped("a.csv") == [
        ("a.csv:5", "completion is empty"),
        ("a.csv:6", "has 1 fields, the header 2"),
        ("a.csv:7", "has 3 fields, the header 2"),
    ]
    assert skipped("text.csv") == []


WHOLE: list[tuple[str, bytes, str]] = [
    ("torn.jsonl.gz", gzip.compress(lines(ROWS))[:-12], "torn.jsonl.gz: can't be read"),
    ("not.jsonl.gz", b"plain", "not.jsonl.gz: can't be read: Not a gzipped file"),
    ("not.jsonl.zst", b"plain text", "not.jsonl.zst: can't be read"),
    ("torn.json", b'[{"prompt": "q"', "torn.json: not JSON"),
    ("bytes.json", b"[\xff]", "bytes.json: not UTF-8 (byte 1)"),
    ("bytes_2.json", b'\xef\xbb\xbf["\xc3\xa4\xff"]', "bytes_2.json: not UTF-8 (byte 7)"),
    ("bytes_3.json", b'["\xc3', "bytes_3.json: not UTF-8 (byte 2)"),
    ("two.json", b'[\n{"prompt": "q"},\n{"prompt" "q"}]', "two.json: not JSON: Expecting ':' delimiter: line 3"),
    ("comma.json", b"[1,\n]", "comma.json: not JSON: Expecting value: line 2"),
    ("more.json", b"[1]\n[2]", "more.json: not JSON: Extra data: line 2"),
    ("number.json", b"7", "number.json: holds one JSON value, not an array of rows"),
    ("pretty.json", b'{\n"data": []\n}\n', "pretty.json: holds one JSON value, not an array of rows"),
    ("nothing.json", b"", "nothing.json: not JSON"),
    ("object.json", b'{"data": []}', "object.json: holds one JSON value, not an array of rows"),
    ("columns.csv", b"a,b\n1,2\n", "its columns are a, b"),
    ("twice.csv", b"prompt,prompt\n1,2\n", "names a column twice"),
    ("quote.csv", b'prompt,completion\nq,a\nq,"a', "quote.csv:3: not CSV"),
    ("bytes.csv", b"prompt,completion\nq,\xff\n", "not UTF-8 from here on"),
    ("empty.csv", b"", "empty.csv: holds no rows"),
    ("empty.json", b"[]", "empty.json: holds no rows"),
]


@pytest.mark.parametrize(("name", "raw", "message"), WHOLE, ids=[name for name, _, _ in WHOLE])
def test_files_that_cannot_be_read(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError) as caught:
        read_chats(config(tmp_path / name, on_bad_row="skip"))
    assert message in str(caught.value)


def test_folder_of_several_kinds(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl.gz").write_bytes(gzip.compress(lines(ROWS[:1])))
    (tmp_path / "2.csv").write_bytes(table(ROWS[1:2]))
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert [chat.place for chat in read_chats(config(tmp_path)).train] == ["1.jsonl.gz:1", "2.csv:2"]


@pytest.fixture
def quiet() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.mark.usefixtures("quiet")
def test_saved_data_sets(tmp_path: Path) -> None:
    many = [{"prompt": f"q{i}", "completion": "a", "id": i} for i in range(5)]
    one = datasets.Dataset.from_list(many)
    one.save_to_disk(tmp_path / "one", num_shards=2)
    chats = read_chats(config(tmp_path / "one"))
    assert [chat.messages[0].content for chat in chats.train] == [f"q{i}" for i in range(5)]
    assert [chat.place for chat in chats.train] == [f"one row {i}" for i in range(5)]
    datasets.DatasetDict({"train": one, "test": one.select([3])}).save_to_disk(tmp_path / "both")
    both = read_chats(config(tmp_path / "both", validation=str(tmp_path / "both")))
    assert (len(both.train), [chat.messages[0].content for chat in both.held_out]) == (5, ["q3"])
    with pytest.raises(DataError, match=r"has no split 'dev'; it has test, train"):
        read_chats(config(tmp_path / "both", split="dev"))
    (tmp_path / "one" / "data-00001-of-00002.arrow").write_bytes(b"torn")
    with pytest.raises(DataError, match="one: not a saved data set that can be read"):
        read_chats(config(tmp_path / "one"))


@pytest.mark.usefixtures("quiet")
def test_the_cache_knows_a_saved_data_sets_content(tmp_path: Path) -> None:
    for content in ("first", "second"):
        saved = datasets.Dataset.from_list([{"prompt": content, "completion": "a"}])
        saved.save_to_disk(tmp_path / content)
    cfg = config(tmp_path / "rows", pack_length=64)
    seen = []
    for content in ("first", "second"):
        (tmp_path / content).rename(tmp_path / "rows")
        seen += [prepare(cfg, tiny_tokenizer(), tmp_path / "cache").cached for _ in range(2)]
        (tmp_path / "rows").rename(tmp_path / content)
    assert seen == [False, True, False, True]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_read_in_pieces(piece: int, indent: int | None) -> None:
    rows: list[Any] = [
        {"prompt": 'Grüße, 世界 🙂 \\ "]', "n": [-12.5e3, [], {}]},
        123456,
        "x]",
        None,
        [1, [2]],
        True,
        {"a": "y" * 500},
    ]
    for n in range(len(rows) + 1):
        whole = json.dumps(rows[:n], ensure_ascii=False, indent=indent).encode("utf-8-sig")
        cut = [whole[at : at + piece] for at in range(0, len(whole), piece)]
        assert list(array_elements(cut, "a.json")) == rows[:n]


def test_a_large_array_is_not_held() -> None:
    row = json.dumps({"prompt": "q" * 2000, "completion": "a"}).encode()
    pieces = chain([b"["], ((row + b",") * 100 for _ in range(200)), [row + b"]"])
    tracemalloc.start()
    try:
        assert sum(1 for _ in array_elements(pieces, "a.json")) == 20001
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20  # of 40 MB
    finally:
        tracemalloc.stop()


def test_json_lines_called_json_are_read_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + lines(ROWS * 20).rstrip())
    monkeypatch.setattr(readers, "_odd_json_rows", None)
    for size in (len(lines(ROWS)), 2**20):
        monkeypatch.setattr(readers, "_JSON_BYTES", size)
        found = list(readers.raw_rows(tmp_path / "a.json", "a.json", list))
        assert found == [(f"a.json:{i}", row) for i, row in enumerate(ROWS * 20, 1)]
