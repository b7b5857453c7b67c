"""Files that are not what their names say: read as what they are where that is safe, else named with what to do."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from phi3_dist.config.schema import DataConfig
from phi3_dist.data.blocks import read_chats, reader_of
from phi3_dist.data.read import file_types as opening
from phi3_dist.data.read import json_array
from phi3_dist.data.read import raw_rows as readers
from phi3_dist.errors import DataError

ROWS = [{"prompt": f'question {i} "{"é" * i}"', "completion": f"answer {i}\n"} for i in range(3)]
LINES = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in ROWS)
PRETTY = "\n".join(json.dumps(row, indent=1) for row in ROWS)
CSV = "prompt,completion\n" + "".join(
    f'"{r["prompt"].replace(chr(34), chr(34) * 2)}","{r["completion"]}"\n' for r in ROWS
)
BOM = b"\xef\xbb\xbf"


def parquet(rows: list[Any]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def zst(raw: bytes) -> bytes:
    return bytes(pyarrow.compress(raw, codec="zstd", asbytes=True))


def config(path: Path, **more: Any) -> DataConfig:
    return DataConfig.model_validate({"train": str(path), "validation_share": 0, **more})


READ: list[tuple[str, Callable[[], bytes], str, str]] = [
    ("marks.jsonl", lambda: b"".join(BOM + line for line in LINES.encode().splitlines(True)), "marks.jsonl:3", ""),
    ("a.jsonl", lambda: gzip.compress(LINES.encode()), "a.jsonl:3", "is packed with gzip"),
    ("b.jsonl", lambda: zst(LINES.encode()), "b.jsonl:3", "is packed with zstd"),
    ("c.jsonl.gz", LINES.encode, "c.jsonl.gz:3", "is not packed"),
    ("d.csv", lambda: gzip.compress(CSV.encode()), "d.csv:6", "is packed with gzip"),
    ("e.jsonl", lambda: LINES.encode("utf-16"), "e.jsonl:3", "is UTF-16"),
    ("f.jsonl", lambda: b"\xfe\xff" + LINES.encode("utf-16-be"), "f.jsonl:3", "is UTF-16"),
    ("g.json", lambda: json.dumps(ROWS).encode("utf-32"), "g.json row 2", "is UTF-32"),
    ("h.csv", lambda: CSV.encode("utf-16"), "h.csv:6", "is UTF-16"),
    ("i.jsonl", lambda: b"\n " + json.dumps(ROWS, indent=1).encode(), "i.jsonl row 2", "is one JSON array"),
    ("j.jsonl", lambda: json.dumps(ROWS).encode(), "j.jsonl row 2", "is one JSON array"),
    ("k.jsonl", PRETTY.encode, "k.jsonl:9", "holds JSON objects over several lines"),
    ("l.json", PRETTY.encode, "l.json:9", "holds JSON objects over several lines"),
    ("m.jsonl.gz", lambda: gzip.compress(PRETTY.encode("utf-16")), "m.jsonl.gz:9", "is UTF-16 and holds JSON objects"),
    ("n.jsonl", lambda: parquet(ROWS), "n.jsonl row 2", "is a Parquet file"),
]


@pytest.mark.parametrize(("name", "raw", "place", "said"), READ, ids=[name for name, *_ in READ])
def test_read_as_what_it_is(tmp_path: Path, name: str, raw: Callable[[], bytes], place: str, said: str) -> None:
    (tmp_path / name).write_bytes(raw())
    chats = read_chats(config(tmp_path / name, format="prompt_completion"))
    pairs = [tuple(message.content for message in chat.messages) for chat in chats.train]
    assert pairs == [(row["prompt"], row["completion"]) for row in ROWS]
    assert chats.train[2].place == place
    assert [notice.startswith(f"{name}: {said}") for notice in chats.notices] == [True] * bool(said)
    assert len(read_chats(config(tmp_path / name, max_rows=2)).train) == 2


def test_one_object_over_several_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0], indent=2), encoding="utf-8")
    assert len(read_chats(config(tmp_path / "a.jsonl")).train) == 1


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
NAMED: list[tuple[str, bytes, str]] = [
    ("a.jsonl", POINTER, "a.jsonl: is a Git LFS pointer, not the data itself\n    fix: git lfs pull"),
    ("a.parquet", POINTER, "is a Git LFS pointer"),
    ("a.csv", POINTER, "is a Git LFS pointer"),
    ("a.jsonl.gz", POINTER, "is a Git LFS pointer"),
    ("b.jsonl", b"PK\x03\x04rest", "is a zip archive"),
    ("b.jsonl", gzip.compress(b"PK\x03\x04rest"), "is a zip archive"),
    ("c.json", b"\n<!DOCTYPE html><html>", "is a web page: a download that went wrong"),
    ("d.jsonl", b"BZh91AY", "is packed with bzip2"),
    ("e.jsonl", b"\x80\x04\x95", "is a pickle, which is never read"),
    ("f.jsonl", bytes(5000), "is full of zero bytes"),
    ("g.jsonl", LINES.encode("utf-16-le"), "UTF-16 without its mark"),
    ("h.jsonl", LINES.encode("utf-16")[:-1], "not UTF-16 all the way"),
    ("i.parquet", LINES.encode(), "not a Parquet file that can be read: by its first bytes it is JSON"),
    ("j.jsonl.gz", gzip.compress(parquet(ROWS)), "is a packed Parquet file"),
    ("k.tar.jsonl", b"x" + bytes(256) + b"ustar", "is a tar archive"),
    ("l.jsonl", PRETTY.encode()[:-9], "l.jsonl: not JSON"),
]


@pytest.mark.parametrize(("name", "raw", "message"), NAMED, ids=[f"{n}: {m[-20:]}" for n, _, m in NAMED])
def test_named_once_with_what_to_do(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError) as caught:
        read_chats(config(tmp_path / name, on_bad_row="skip"))
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.fixture
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (opening, readers, json_array):
        monkeypatch.setattr(module, "LONGEST_ROW", 2000)


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_line_beyond_all_rows_is_one_bad_row(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    lines = LINES.encode().splitlines(True)
    (tmp_path / "a.jsonl").write_bytes(pack(lines[0] + b'{"prompt": "' + b"x" * 5_000_000 + b'"}\n' + lines[2]))
    chats = read_chats(config(tmp_path / "a.jsonl", on_bad_row="skip"))
    assert [chat.place for chat in chats.train] == ["a.jsonl:1", "a.jsonl:3"]
    assert [(row.place, row.reason) for row in chats.skipped] == [
        ("a.jsonl:2", "a line of more than 2,000 bytes: too long for a row")
    ]


@pytest.mark.usefixtures("short_rows")
def test_an_element_beyond_all_rows_ends_the_array(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([ROWS[0], {"prompt": "x" * 5_000_000}]))
    with pytest.raises(DataError, match=r"a\.json: not JSON: a value of more than 2,000 characters"):
        read_chats(config(tmp_path / "a.json"))
    (tmp_path / "b.json").write_text('{"prompt": "' + "x" * 5_000_000)
    with pytest.raises(DataError, match="a line of more than 2,000 bytes"):
        read_chats(config(tmp_path / "b.json"))


def test_a_long_cell_of_csv_is_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text(f"prompt,completion\nq,{'x' * 300_000}\nq,a\n")
    assert [len(chat.messages[1].content) for chat in read_chats(config(tmp_path / "a.csv")).train] == [300_000, 1]
    monkeypatch.setattr(readers, "LONGEST_ROW", 200_000)
    (tmp_path / "b.csv").write_text('prompt,completion\nq,a\nq,"' + "x\n" * 300_000)
    with pytest.raises(DataError, match=r"b\.csv:3: a field that begins here has(.|\n)*closing quote"):
        read_chats(config(tmp_path / "b.csv"))


@pytest.mark.parametrize("pack", [gzip.compress, zst])
@pytest.mark.parametrize("filling", [b"\n", b" ", b"0"])
def test_a_bomb_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Callable[[bytes], bytes], filling: bytes
) -> None:
    monkeypatch.setattr(opening, "_BOMB_BYTES", 2**20)
    (tmp_path / "a.jsonl").write_bytes(pack(LINES.encode() + filling * (8 * 2**20)))
    with pytest.raises(DataError, match="unpacks to more than 200 times its size"):
        read_chats(config(tmp_path / "a.jsonl", on_bad_row="skip"))


def test_what_python_cannot_hold_is_one_bad_row(tmp_path: Path) -> None:
    text = pyarrow.array([b"q", b"\xff", b"q"]).view(pyarrow.string())
    far = pyarrow.array([0, 0, 2**40], pyarrow.timestamp("s"))
    plain = pyarrow.array(["a", "a", "a"])
    table = pyarrow.table({"prompt": text, "completion": plain, "system": far, "date": far})
    pyarrow.parquet.write_table(table.drop_columns(["system"]), tmp_path / "a.parquet")
    chats = read_chats(config(tmp_path / "a.parquet", on_bad_row="skip"))
    assert [chat.place for chat in chats.train] == ["a.parquet row 0", "a.parquet row 2"]
    assert [(row.place, row.reason) for row in chats.skipped] == [
        ("a.parquet row 1", "prompt holds text that is not UTF-8")
    ]
    assert chats.notices[-1] == "not read: columns date (3) (list intended ones in data.ignore)"
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    reasons = [row.reason for row in all_bad(tmp_path / "b.parquet")]
    assert reasons[0].startswith("system is datetime")
    assert reasons[1] == "prompt holds text that is not UTF-8"
    assert reasons[2].startswith("system holds what can't be read")


def all_bad(path: Path) -> list[Any]:
    reader = reader_of(config(path))
    rows = readers.raw_rows(path, "b", list)
    return [reader.read(row, place) if isinstance(row, dict) else row for place, row in rows]


def test_pictures_in_a_table_are_not_kept_and_refuse_their_rows_alone(tmp_path: Path) -> None:
    rows = [{**ROWS[i], "image": picture} for i, picture in enumerate([{"bytes": b"x", "path": None}, None, None])]
    (tmp_path / "a.parquet").write_bytes(parquet(rows))
    chats = read_chats(config(tmp_path / "a.parquet", on_bad_row="skip"))
    assert [chat.place for chat in chats.train] == ["a.parquet row 1", "a.parquet row 2"]
    assert "has image, and only text can be trained on" in chats.skipped[0].reason
    lists = [{**ROWS[i], "images": pictures} for i, pictures in enumerate([["a.png"], [], None])]
    (tmp_path / "b.parquet").write_bytes(parquet(lists))
    assert len(read_chats(config(tmp_path / "b.parquet", on_bad_row="skip")).train) == 2
