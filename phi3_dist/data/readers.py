"""Raw rows out of one local source, each with its place.

JSONL and CSV lines count from 1, as editors do; rows of Parquet, JSON arrays and Arrow folders count from 0, as
`dataset[7]` does. `.gz` and `.zst` are unpacked while reading.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from phi3_dist.data.formats import BadRow
from phi3_dist.data.json_array import array_elements
from phi3_dist.errors import DataError, Problem

__all__ = ["KINDS", "arrow_folder", "content_hash", "kind_of", "line_blocks", "raw_rows", "rows_of_lines"]

KINDS = (".jsonl", ".json", ".csv", ".parquet")
_PACKED = (".gz", ".zst")
_ROWS_AT_A_TIME = 1024
_JSON_BYTES = 2**20

Rows = Iterator[tuple[str, Any]]
WantedColumns = Callable[[list[str]], list[str]]
"""From the columns of a table to those that are read. May raise DataError."""


def kind_of(path: Path) -> str:
    """The kind of a file by its name, without .gz or .zst; "" if it can't be read here."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in _PACKED
    kind = suffixes[-1 - packed] if len(suffixes) > packed else ""
    return kind if kind in KINDS and not (packed and kind == ".parquet") else ""


def arrow_folder(path: Path, split: str) -> Path | None:
    """The folder of one Dataset.save_to_disk (of the split's, for a DatasetDict), or None if `path` is not one.

    Raises DataError where a DatasetDict has no such split.
    """
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return path
    if not (path / "dataset_dict.json").is_file():
        return None
    inside = path / split
    if not (inside / "state.json").is_file():
        splits = sorted(p.parent.name for p in path.glob("*/state.json"))
        what = f"has no split {split!r}; it has {', '.join(splits) or 'none'}"
        raise DataError(Problem(str(path), what, "set data.split or data.validation_split, or name the split's folder"))
    return inside


def raw_rows(path: Path, label: str, wanted: WantedColumns) -> Rows:
    """(place, row) for each row; a row that can't even be parsed comes as a BadRow.

    Raises DataError where the file as a whole can't be read.
    """
    if path.is_dir():
        return _arrow_rows(path, label, wanted)
    kind = kind_of(path)
    if kind == ".parquet":
        return _parquet_rows(path, label, wanted)
    return _unpacked_rows(path, label, wanted)


def content_hash(path: Path) -> str:
    """sha256 (hex) of a file's bytes, or of an Arrow folder's tables in their order."""
    digest = hashlib.sha256()
    try:
        for part in _arrow_files(path, str(path)) if path.is_dir() else [path]:
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise DataError(Problem(str(path), f"can't be read: {error.strerror}")) from error
    return digest.hexdigest()


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _unpacked_rows(path: Path, label: str, wanted: WantedColumns) -> Rows:
    kind = kind_of(path)
    try:
        with _open(path) as file:
            if kind == ".csv":
                yield from _csv_rows(file, label, wanted)
            else:
                yield from (_json_rows if kind == ".json" else rows_of_lines)(file, label)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(Problem(label, f"can't be read: {reason}")) from error


def line_blocks(path: Path, label: str, lines: int, block_bytes: int) -> Iterator[tuple[int, list[bytes]]]:
    """The lines of a JSONL file in blocks of at most `lines`, each with the number of its first line.

    A block ends after the line that brings it to `block_bytes`. Raises DataError where the file can't be read.
    """
    try:
        with _open(path) as file:
            block: list[bytes] = []
            first, size = 1, 0
            for number, line in enumerate(file, 1):
                block.append(line)
                size += len(line)
                if len(block) == lines or size >= block_bytes:
                    yield first, block
                    block, first, size = [], number + 1, 0
            if block:
                yield first, block
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(Problem(label, f"can't be read: {reason}")) from error


def rows_of_lines(lines: Iterable[bytes], label: str, first: int = 1) -> Rows:
    """(place, row) for each JSON line, the first of which has the number `first`."""
    for number, line in enumerate(lines, first):  # bytes end at \n alone: a U+2028 inside a string is text
        if not line.strip():
            continue
        place = f"{label}:{number}"
        try:
            yield place, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            yield place, BadRow(place, f"not UTF-8 (byte 0x{line[error.start]:02x} at {error.start})")
        except json.JSONDecodeError as error:
            yield place, BadRow(place, f"not JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError):  # a number of thousands of digits; thousands of open brackets
            yield place, BadRow(place, "not JSON that can be read: nested too deep or a number too long")


def _json_rows(file: IO[bytes], label: str) -> Rows:
    """A JSON array of rows; or JSON lines, which many call .json. Neither is read as a whole."""
    head = file.read(_JSON_BYTES)
    body = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if body[:1] == b"[":
        pieces = chain([head], iter(partial(file.read, _JSON_BYTES), b""))
        yield from ((f"{label} row {i}", row) for i, row in enumerate(array_elements(pieces, label)))
    elif _begins_lines(body):
        *lines, torn = head.split(b"\n")
        yield from rows_of_lines(chain((line + b"\n" for line in lines), [torn + file.readline()], file), label)
    else:
        yield from _odd_json_rows(head + file.read(), label)


def _begins_lines(body: bytes) -> bool:
    """Whether an object stands on the first line, and more on others."""
    first, _, rest = body.partition(b"\n")
    try:
        return isinstance(json.loads(first), dict) and bool(rest.strip())
    except (ValueError, RecursionError):
        return False


def _odd_json_rows(raw: bytes, label: str) -> Rows:
    """JSON lines the first of which is bad; else no rows at all."""
    try:
        json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(Problem(label, f"not UTF-8 (byte {error.start})")) from error
    except (ValueError, RecursionError) as error:
        if raw.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"{":
            raise DataError(Problem(label, f"not JSON: {error}")) from error
        yield from rows_of_lines(io.BytesIO(raw), label)
        return
    fix = "write an array of rows, or one JSON object on each line of a .jsonl file"
    raise DataError(Problem(label, "holds one JSON value, not an array of rows", fix))


def _csv_rows(file: IO[bytes], label: str, wanted: WantedColumns) -> Rows:
    """The first line names the columns; a row's place is the line it begins on."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, strict=True)
    begins = 1
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(Problem(label, f"names a column twice: {', '.join(header)}"))
        if header:
            wanted(header)
        begins = reader.line_num + 1
        for fields in reader:
            place, begins = f"{label}:{begins}", reader.line_num + 1
            if not fields:
                continue
            if len(fields) == len(header):
                yield place, dict(zip(header, fields, strict=True))
            else:
                yield place, BadRow(place, f"has {len(fields)} fields, the header {len(header)}")
    except UnicodeDecodeError as error:
        raise DataError(Problem(f"{label}:{begins}", "not UTF-8 from here on")) from error
    except csv.Error as error:
        raise DataError(Problem(f"{label}:{begins}", f"not CSV: {error}", "quote fields with double quotes")) from error
    finally:
        text.detach()


def _parquet_rows(path: Path, label: str, wanted: WantedColumns) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            row = 0
            for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=wanted(file.schema_arrow.names)):
                for value in batch.to_pylist():
                    yield f"{label} row {row}", value
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(Problem(label, f"not a Parquet file that can be read: {error}")) from error


def _arrow_files(folder: Path, label: str) -> list[Path]:
    """The tables of a saved data set, in order, as its state.json names them."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / str(part["filename"]) for part in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(Problem(label, f"its state.json can't be read: {error}")) from error


def _arrow_rows(folder: Path, label: str, wanted: WantedColumns) -> Rows:
    import pyarrow

    row = 0
    try:
        for part in _arrow_files(folder, label):
            with pyarrow.memory_map(str(part)) as file, pyarrow.ipc.open_stream(file) as stream:
                columns = wanted(stream.schema.names)
                for batch in stream:
                    for start in range(0, batch.num_rows, _ROWS_AT_A_TIME):
                        for value in batch.select(columns).slice(start, _ROWS_AT_A_TIME).to_pylist():
                            yield f"{label} row {row}", value
                            row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(Problem(label, f"not a saved data set that can be read: {error}")) from error
