"""What a file of rows is, by its first bytes, and its bytes as UTF-8.

The name says what is meant; the bytes say what is there. Where the two differ and nothing can go wrong by it, the file
is read as what it is, and that is said once; everything else is named with what to do.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, cast

from phi3_dist.errors import DataError, Problem

__all__ = ["KINDS", "LONGEST_ROW", "Form", "bounded_lines", "form_of", "kind_of", "opened"]

KINDS = (".jsonl", ".json", ".csv", ".parquet")
_PACKED = (".gz", ".zst")
LONGEST_ROW = 16 * 2**20
"""Bytes of a row at most, 4,000 pages: more fits no pack."""
_HEAD = 2**20
_BOMB_BYTES, _BOMB_RATIO = 256 * 2**20, 200
"""Unpacked bytes from which a file may not be more than so many times as long as it was."""
_BUFFER = 2**18
_UTF8 = b"\xef\xbb\xbf"
_MARKS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_UNPACK = "unpack it, and name the file inside"
_OTHERS = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the data itself", "git lfs pull"),
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"BZh", "packed with bzip2", _UNPACK),
    (b"\xfd7zXZ\x00", "packed with xz", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (b"PARE", "an encrypted Parquet file", "write it without encryption"),
    (b"ARROW1", "an Arrow file", "write it as Parquet"),
    (b"SQLite format 3\x00", "an SQLite database", "export its rows as JSON lines"),
    (b"%PDF-", "a PDF", "name a file of rows"),
    (b"\x89HDF", "an HDF5 file", "write it as Parquet"),
    (b"\x80\x03", "a pickle, which is never read", "write it as Parquet or JSON lines"),
    (b"\x80\x04", "a pickle, which is never read", "write it as Parquet or JSON lines"),
    (b"\x80\x05", "a pickle, which is never read", "write it as Parquet or JSON lines"),
    (b"\x00\x00\x00\x00\x00\x00\x00\x00", "full of zero bytes: it was damaged", "copy or download it again"),
)

Shape = Literal["lines", "array", "values", "odd", "csv", "parquet"]


@dataclass(frozen=True)
class Form:
    """How a file has to be read."""

    shape: Shape
    """`values`: JSON objects one after the other, each over several lines; `odd`: JSON that may be no rows at all."""
    packing: Literal["", "gzip", "zstd"] = ""
    encoding: str = "utf-8"
    mismatch: str = ""
    """Where it is not what its name says."""


def kind_of(path: Path) -> str:
    """The kind of a file by its name, without .gz or .zst; "" if it can't be read here."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in _PACKED
    kind = suffixes[-1 - packed] if len(suffixes) > packed else ""
    return kind if kind in KINDS and not (packed and kind == ".parquet") else ""


def form_of(path: Path, label: str) -> Form:
    """What a file of one of the `KINDS` is. Raises DataError, naming `label`, where it can't be read as rows."""
    kind, first_bytes = kind_of(path), b""
    with _faults_named(label), path.open("rb") as file:
        first_bytes = file.read(_HEAD)
    _refuse_others(first_bytes, label)
    if first_bytes.startswith(b"PAR1"):
        return Form("parquet", mismatch="" if kind == ".parquet" else "is a Parquet file, and read as one")
    if kind == ".parquet":
        looks = "JSON" if first_bytes.lstrip()[:1] in (b"{", b"[") else "something else"
        what = f"is not a Parquet file that can be read: by its first bytes it is {looks}"
        raise DataError(Problem(label, what, "download or write it again, or give it the ending of what it is"))
    packing, mismatches = _packing(path, first_bytes, label)
    if packing:
        with _faults_named(label), _unpacked(path, packing, label) as unpacked:
            first_bytes = unpacked.read(_HEAD)
        _refuse_others(first_bytes, label)
        if first_bytes.startswith(b"PAR1"):
            raise DataError(Problem(label, "is a packed Parquet file", "unpack it: Parquet is packed inside"))
    encoding = next((name for mark, name in _MARKS if first_bytes.startswith(mark)), "utf-8")
    if encoding == "utf-8" and first_bytes[:64].count(0) > len(first_bytes[:64]) // 3:
        what = "has a zero byte beside every other: UTF-16 without its mark?"
        raise DataError(Problem(label, what, "write it as UTF-8"))
    if encoding != "utf-8":
        mismatches.append(f"is {encoding.upper()}")
        first_bytes = codecs.getincrementaldecoder(encoding)("replace").decode(first_bytes).encode("utf-8", "replace")
    shape = "csv" if kind == ".csv" else _json_shape(first_bytes.removeprefix(_UTF8).lstrip(), kind)
    if shape == "array" and kind == ".jsonl":
        mismatches.append("is one JSON array")
    elif shape == "values":
        mismatches.append("holds JSON objects over several lines")
    return Form(shape, packing, encoding, " and ".join(mismatches) + ", and read as that" if mismatches else "")


def _packing(path: Path, first_bytes: bytes, label: str) -> tuple[Literal["", "gzip", "zstd"], list[str]]:
    suffix = path.suffix.lower()
    packing: Literal["", "gzip", "zstd"] = ""
    if first_bytes.startswith(b"\x1f\x8b"):
        packing = "gzip"
    elif first_bytes.startswith(b"\x28\xb5\x2f\xfd"):
        packing = "zstd"
    named = {".gz": "gzip", ".zst": "zstd"}.get(suffix, "")
    if packing == named:
        return packing, []
    if packing:
        return packing, [f"is packed with {packing}"]
    if first_bytes and first_bytes.removeprefix(_UTF8).lstrip()[:1] not in (b"{", b"["):
        what = f"can't be read: Not a {'gzipped' if named == 'gzip' else 'zstd'} file, as its name says"
        raise DataError(Problem(label, what, "give it the ending of what it is"))
    return "", ["is not packed"] if first_bytes else []


def _refuse_others(first_bytes: bytes, label: str) -> None:
    for magic, what, fix in _OTHERS:
        if first_bytes.startswith(magic):
            raise DataError(Problem(label, f"is {what}", fix))
    if first_bytes[257:262] == b"ustar":
        raise DataError(Problem(label, "is a tar archive", _UNPACK))
    if first_bytes[:512].lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        what = "is a web page: a download that went wrong"
        raise DataError(Problem(label, what, "download it again; a gated set needs a login"))


def _json_shape(body: bytes, kind: str) -> Shape:
    """What JSON begins like this; `body` has no mark and no white space in front."""
    first, _, rest = body.partition(b"\n")
    if body[:1] == b"[":
        lists = kind == ".jsonl" and _is_json(first, list) and rest.removeprefix(_UTF8).lstrip()[:1] == b"["
        return "lines" if lists else "array"
    if _is_json(first, dict):
        return "lines" if kind == ".jsonl" or rest.strip() else "odd"
    if body[:1] == b"{" and rest and _begins_with_long_object(body, alone=kind == ".jsonl"):
        return "values"
    return "lines" if kind == ".jsonl" else "odd"


def _is_json(text: bytes, kind: type) -> bool:
    try:
        return isinstance(json.loads(text), kind)
    except (ValueError, RecursionError):
        return False


def _begins_with_long_object(body: bytes, *, alone: bool) -> bool:
    """Whether the first object ends on a later line than it begins, and another follows; or none, if it may be `alone`.

    Of one that is longer than what was read, the first line must be a bracket.
    """
    text = body.decode("utf-8", "replace")
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return text.partition("\n")[0].strip() == "{" and len(body) >= _HEAD // 2
    more = text[end:].lstrip(" \t\r\n\ufeff")
    return isinstance(value, dict) and "\n" in text[:end] and (more[:1] == "{" or (alone and not more))


@contextmanager
def _faults_named(label: str) -> Iterator[None]:
    """Whatever keeps a file from being read, as one message."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(Problem(label, f"can't be read: {reason}")) from error


@contextmanager
def opened(path: Path, form: Form, label: str) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked and in UTF-8. Raises DataError where they can't be read, also inside the block."""
    with _faults_named(label), _unpacked(path, form.packing, label) as file:
        if form.encoding == "utf-8":
            yield file
            return
        yield cast(IO[bytes], io.BufferedReader(_Utf8(file, form.encoding, label), _BUFFER))


@contextmanager
def _unpacked(path: Path, packing: str, label: str) -> Iterator[IO[bytes]]:
    with path.open("rb") as raw:
        if not packing:
            yield raw
            return
        stream: Any
        if packing == "gzip":
            stream = gzip.GzipFile(fileobj=raw)
        else:
            import pyarrow

            stream = pyarrow.input_stream(raw, compression="zstd")
        with stream:
            yield cast(IO[bytes], io.BufferedReader(_Watched(stream, path.stat().st_size, label), _BUFFER))


class _Watched(io.RawIOBase):
    """What is unpacked, as long as it is not a bomb: a small file that never ends."""

    def __init__(self, inner: Any, packed_bytes: int, label: str) -> None:
        self._inner, self._label, self._bytes = inner, label, 0
        self._most = max(_BOMB_BYTES, _BOMB_RATIO * packed_bytes)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._inner.read(len(buffer))
        self._bytes += len(piece)
        if self._bytes > self._most:
            what = f"unpacks to more than {_BOMB_RATIO} times its size, {self._bytes:,} bytes so far"
            raise DataError(Problem(self._label, what, "if that is right, unpack it yourself"))
        buffer[: len(piece)] = piece
        return len(piece)


class _Utf8(io.RawIOBase):
    """A stream in another encoding as UTF-8."""

    def __init__(self, inner: IO[bytes], encoding: str, label: str) -> None:
        self._inner, self._label, self._encoding = inner, label, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            piece = self._inner.read(_BUFFER)
            try:
                self._left = self._decoder.decode(piece, final=not piece).encode("utf-8")
            except UnicodeError as error:
                what = f"not {self._encoding.upper()} all the way: {error}"
                raise DataError(Problem(self._label, what, "write it as UTF-8")) from error
            if not piece:
                break
        found, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(found)] = found
        return len(found)


def bounded_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines, with their ends. Of one that is longer than a row may be, so much that it can be told."""
    for line in iter(partial(file.readline, LONGEST_ROW + 1), b""):
        if len(line) > LONGEST_ROW and not line.endswith(b"\n"):
            for rest in iter(partial(file.readline, _HEAD), b""):
                if rest.endswith(b"\n"):
                    break
        yield line
