"""Rows of Parquet files, of folders made by `save_to_disk`, and of hub sets: all are Arrow tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_dist.config.json_text import parse_json
from phi3_dist.data.read.printable import clipped
from phi3_dist.data.read.row_formats import BadRow
from phi3_dist.data.read.turns import MEDIA
from phi3_dist.errors import DataError, Problem

if TYPE_CHECKING:
    import pyarrow

__all__ = ["Rows", "WantedColumns", "arrow_files", "arrow_rows", "hub_rows", "parquet_rows"]

_ROWS_AT_A_TIME = 1024
_PICTURES_AT_A_TIME = 32

Rows = Iterator[tuple[str, Any]]
WantedColumns = Callable[[list[str]], list[str]]
"""From the columns of a table to those that are read. May raise DataError."""


def parquet_rows(path: Path, label: str, wanted: WantedColumns) -> Rows:
    """(place, row) for each row of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = wanted(file.schema_arrow.names)
            rows = _PICTURES_AT_A_TIME if MEDIA & set(columns) else _ROWS_AT_A_TIME
            yield from _rows_of(file.iter_batches(rows, columns=columns), label)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(Problem(label, f"not a Parquet file that can be read: {clipped(str(error))}")) from error


def arrow_files(folder: Path, label: str) -> list[Path]:
    """The tables of a saved data set, in order, as its state.json names them."""
    try:
        state = parse_json((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / str(part["filename"]) for part in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(Problem(label, f"its state.json can't be read: {clipped(str(error))}")) from error


def arrow_rows(folder: Path, label: str, wanted: WantedColumns) -> Rows:
    """(place, row) for each row of a saved data set."""
    import pyarrow

    def batches() -> Iterator[pyarrow.RecordBatch]:
        for part in arrow_files(folder, label):
            # read, not mapped: a file that is cut short meanwhile must not end the process by a signal
            with pyarrow.OSFile(str(part)) as file, pyarrow.ipc.open_stream(file) as stream:
                columns = wanted(stream.schema.names)
                for batch in stream:
                    yield batch.select(columns)

    try:
        yield from _rows_of(batches(), label)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(Problem(label, f"not a saved data set that can be read: {clipped(str(error))}")) from error


def hub_rows(dataset: Any, label: str, wanted: WantedColumns) -> Rows:
    """(place, row) for each row of a `datasets.Dataset`, whose pictures are not decoded."""
    columns = wanted(dataset.column_names)
    tables = dataset.select_columns(columns).with_format("arrow").iter(_ROWS_AT_A_TIME)
    yield from _rows_of((batch for table in tables for batch in table.to_batches()), label)


def _rows_of(batches: Iterable[pyarrow.RecordBatch], label: str) -> Rows:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS_AT_A_TIME):
            for row in _values(batch.slice(start, _ROWS_AT_A_TIME)):
                place = f"{label} row {number}"
                yield place, BadRow(place, row) if isinstance(row, str) else row
                number += 1


def _values(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any] | str]:
    """Each row, or why Python can't hold it. Of a picture, whether there is one."""
    media = {name: _there(batch.column(name)) for name in batch.schema.names if name in MEDIA}
    plain = batch.select([name for name in batch.schema.names if name not in MEDIA])
    try:
        rows: Iterable[dict[str, Any] | str] = plain.to_pylist()
    except (ValueError, OverflowError):  # bytes that are no UTF-8, a date beyond Python's: one of the rows has them
        rows = (_row(plain, i) for i in range(plain.num_rows))
    for i, row in enumerate(rows):
        yield row if isinstance(row, str) else {**row, **{name: True for name, there in media.items() if there[i]}}


def _there(column: Any) -> list[bool]:
    import pyarrow

    kind = column.type
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return [bool(length) for length in column.value_lengths().to_pylist()]
    if pyarrow.types.is_struct(kind) and kind.num_fields:
        inner = [column.field(i).is_valid().to_pylist() for i in range(kind.num_fields)]
        return [valid and any(flags) for valid, *flags in zip(column.is_valid().to_pylist(), *inner, strict=True)]
    return [bool(valid) for valid in column.is_valid().to_pylist()]


def _row(batch: pyarrow.RecordBatch, i: int) -> dict[str, Any] | str:
    row: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[i].as_py()
        except UnicodeDecodeError:
            return f"{name} holds text that is not UTF-8"
        except (ValueError, OverflowError) as error:
            return f"{name} holds what can't be read: {error}"
    return row
