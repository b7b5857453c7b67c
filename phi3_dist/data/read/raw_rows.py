"""Raw rows out of one local source, each with its place.

JSONL and CSV lines count from 1, as editors do; rows of Parquet, JSON arrays and Arrow folders count from 0, as
`dataset[7]` does. What a file is and how its bytes are unpacked is `opening`'s matter, tables are `tables`'.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO

from phi3_dist.data.read.arrow_tables import Rows, WantedColumns, arrow_files, arrow_rows, parquet_rows
from phi3_dist.data.read.file_types import KINDS, LONGEST_ROW, Form, bounded_lines, form_of, kind_of, opened
from phi3_dist.data.read.json_array import array_elements, objects
from phi3_dist.data.read.printable import clipped
from phi3_dist.data.read.row_formats import BadRow
from phi3_dist.errors import DataError, Problem

__all__ = ["KINDS", "arrow_folder", "content_hash", "form_of", "kind_of", "line_blocks", "raw_rows", "rows_of_lines"]

_JSON_BYTES = 2**20
_UTF8 = b"\xef\xbb\xbf"


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
        splits = arrow_splits(path)
        what = f"has no split {split!r}; it has {', '.join(splits) or 'none'}"
        raise DataError(Problem(str(path), what, "set data.split or data.validation_split, or name the split's folder"))
    return inside


def arrow_splits(path: Path) -> list[str]:
    """The splits of a saved DatasetDict."""
    return sorted(p.parent.name for p in path.glob("*/state.json"))


def raw_rows(path: Path, label: str, wanted: WantedColumns, form: Form | None = None) -> Rows:
    """(place, row) for each row; a row that can't even be parsed comes as a BadRow.

    Raises DataError where the file as a whole can't be read.
    """
    if path.is_dir():
        yield from arrow_rows(path, label, wanted)
        return
    form = form or form_of(path, label)
    if form.shape == "parquet":
        yield from parquet_rows(path, label, wanted)
        return
    with opened(path, form, label) as file:
        if form.shape == "csv":
            yield from _csv_rows(file, label, wanted)
        elif form.shape == "lines":
            yield from rows_of_lines(bounded_lines(file), label)
        elif form.shape == "odd":
            yield from _odd_json_rows(file, label)
        else:
            pieces = iter(partial(file.read, _JSON_BYTES), b"")
            if form.shape == "array":
                yield from ((f"{label} row {i}", row) for i, row in enumerate(array_elements(pieces, label)))
            else:
                yield from ((f"{label}:{line}", row) for line, row in objects(pieces, label))


def content_hash(path: Path) -> str:
    """sha256 (hex) of a file's bytes, or of an Arrow folder's tables in their order."""
    digest = hashlib.sha256()
    try:
        for part in arrow_files(path, str(path)) if path.is_dir() else [path]:
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise DataError(Problem(str(path), f"can't be read: {error.strerror}")) from error
    return digest.hexdigest()


def line_blocks(path: Path, form: Form, label: str, lines: int, block_bytes: int) -> Iterator[tuple[int, list[bytes]]]:
    """The lines of a JSONL file in blocks of at most `lines`, each with the number of its first line.

    A block ends after the line that brings it to `block_bytes`. Raises DataError where the file can't be read.
    """
    with opened(path, form, label) as file:
        block: list[bytes] = []
        first, size = 1, 0
        for number, line in enumerate(bounded_lines(file), 1):
            block.append(line)
            size += len(line)
            if len(block) == lines or size >= block_bytes:
                yield first, block
                block, first, size = [], number + 1, 0
        if block:
            yield first, block


def rows_of_lines(lines: Iterable[bytes], label: str, first: int = 1) -> Rows:
    """(place, row) for each JSON line, the first of which has the number `first`."""
    for number, line in enumerate(lines, first):  # bytes end at \n alone: a U+2028 inside a string is text
        if line.startswith(_UTF8):  # files that began with a mark were laid end to end
            line = line.removeprefix(_UTF8)  # noqa: PLW2901
        if not line.strip():
            continue
        place = f"{label}:{number}"
        if len(line) > LONGEST_ROW:
            yield place, BadRow(place, f"a line of more than {LONGEST_ROW:,} bytes: too long for a row")
            continue
        try:
            yield place, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield place, BadRow(place, f"not UTF-8 (byte 0x{line[error.start]:02x} at {error.start})")
        except json.JSONDecodeError as error:
            yield place, BadRow(place, f"not JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError):  # a number of thousands of digits; thousands of open brackets
            yield place, BadRow(place, "not JSON that can be read: nested too deep or a number too long")


def _odd_json_rows(file: IO[bytes], label: str) -> Rows:
    """JSON lines the first of which is bad; else no rows at all."""
    raw = file.read(LONGEST_ROW)
    try:
        json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        if error.end < len(raw) or len(raw) < LONGEST_ROW:
            raise DataError(Problem(label, f"not UTF-8 (byte {error.start})")) from error
    except (ValueError, RecursionError) as error:
        if raw.removeprefix(_UTF8).lstrip()[:1] != b"{":
            raise DataError(Problem(label, f"not JSON: {error}")) from error
        *lines, torn = raw.split(b"\n")
        whole = torn + file.readline(max(LONGEST_ROW + 1 - len(torn), 1))
        yield from rows_of_lines(chain((line + b"\n" for line in lines), [whole], bounded_lines(file)), label)
        return
    fix = "write an array of rows, or one JSON object on each line of a .jsonl file"
    raise DataError(Problem(label, "holds one JSON value, not an array of rows", fix))


def _csv_rows(file: IO[bytes], label: str, wanted: WantedColumns) -> Rows:
    """The first line names the columns; a row's place is the line it begins on."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    csv.field_size_limit(LONGEST_ROW)  # the module's own 128 KiB is shorter than many an answer
    reader = csv.reader(text, strict=True)
    begins = 1
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(Problem(label, clipped(f"names a column twice: {', '.join(header)}")))
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
        if "field limit" in str(error):
            what = f"a field that begins here has more than {LONGEST_ROW:,} characters"
            raise DataError(Problem(f"{label}:{begins}", what, "is a closing quote missing?")) from error
        raise DataError(Problem(f"{label}:{begins}", f"not CSV: {error}", "quote fields with double quotes")) from error
    finally:
        text.detach()
