"""Weight files as they lie on disk: tensors by name, mapped and not copied, whole or by rows.

A mapped tensor is the page cache's own pages: ranks of one node that read the same base share them. The format is
safetensors' (header length, JSON header, data); pickled weights are never read.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi3_dist.config.json_text import parse_json
from phi3_dist.errors import ModelError, Problem

__all__ = ["Weights", "freed_memory_goes_back"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MEAN_ROWS = 4096
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
# mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class _File:
    """One mapped safetensors file. Raises ModelError where header and size don't agree."""

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_LONGEST_HEADER, size - 8):
                raise self._damaged("its header is cut short")
            try:
                header: Any = parse_json(file.read(length))
                header.pop("__metadata__", None)
                self.entries: dict[str, Any] = {n: self._entry(n, e, size - 8 - length) for n, e in header.items()}
            except (ValueError, AttributeError, KeyError, TypeError) as error:
                raise self._damaged(f"its header is not safetensors': {error}") from error
        self._start = 8 + length
        # private: pages are shared until somebody writes to them, and the file never changes
        self._storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)

    def _damaged(self, what: str) -> ModelError:
        return ModelError(Problem(f"model.source: {self.path.name}", what, "download the model again"))

    def _entry(self, name: str, entry: Any, data_bytes: int) -> tuple[torch.dtype, tuple[int, ...], int]:
        dtype, shape, (start, stop) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if not 0 <= start <= stop <= data_bytes or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} ends beyond the file")
        return dtype, shape, start

    def tensor(self, name: str) -> Tensor:
        dtype, shape, start = self.entries[name]
        first = self._start + start
        count = math.prod(shape)
        if first % dtype.itemsize:  # allowed by the format, made by no known writer
            raw = torch.empty(0, dtype=torch.uint8).set_(self._storage, first, (count * dtype.itemsize,))  # type: ignore[call-overload]
            copied: Tensor = raw.clone().view(dtype).view(shape)
            return copied
        flat = torch.empty(0, dtype=dtype).set_(self._storage, first // dtype.itemsize, (count,))  # type: ignore[call-overload]
        mapped: Tensor = flat.view(shape)
        return mapped


class Weights:
    """A base model's tensors: from the safetensors files of a folder, or from memory.

    `added` (name → rows): tables that are longer here than there. Each added row is the mean of those that are there.
    """

    def __init__(
        self, files: Mapping[str, Path], tensors: Mapping[str, Tensor], added: Mapping[str, int] | None = None
    ) -> None:
        self._file_of, self._tensors, self.added = dict(files), dict(tensors), dict(added or {})
        self._open: dict[Path, _File] = {}
        self._mean: dict[str, Tensor] = {}

    def enlarged(self, added: Mapping[str, int]) -> Weights:
        """The same tensors, those that `added` names with so many more rows. The files stay as they are."""
        return Weights(self._file_of, self._tensors, added)

    @classmethod
    def of_folder(cls, folder: Path) -> Weights:
        """Raises ModelError where the folder holds no safetensors, or an index that names a missing file."""
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.is_file():
            try:
                by_name = {k: folder / v for k, v in parse_json(index.read_text("utf-8"))["weight_map"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(Problem(f"model.source: {index.name}", f"cannot be read: {error}", "")) from error
        elif single.is_file():
            by_name = dict.fromkeys(_File(single).entries, single)
        else:
            raise ModelError(
                Problem(
                    f"model.source: {folder.name}",
                    "no model.safetensors and no model.safetensors.index.json (pickled weights are not read)",
                    "save the model with save_pretrained, which writes safetensors",
                )
            )
        missing = sorted({path.name for path in by_name.values() if not path.is_file()})
        if missing:
            what = f"weight files missing: {', '.join(missing)}"
            raise ModelError(Problem(f"model.source: {folder.name}", what, "download again"))
        return cls(by_name, {})

    def names(self) -> set[str]:
        return {*self._file_of, *self._tensors}

    def whole(self, name: str) -> Tensor:
        """The tensor; from a file it is mapped, not copied, unless it has added rows.

        Raises ModelError where the file lacks it.
        """
        stored = self._stored(name)
        return torch.cat((stored, self._more(name, stored))) if name in self.added else stored

    def shape(self, name: str) -> torch.Size:
        """As `whole` has it, without a copy."""
        stored = self._stored(name).shape
        return torch.Size((stored[0] + self.added[name], *stored[1:])) if name in self.added else stored

    def mean_row(self, name: str, rows: int | None = None) -> Tensor:
        """The mean of a stored table's first `rows` rows, or of all; float32, and no float32 copy of the table."""
        table = self._stored(name)[:rows]
        parts = [table[at : at + _MEAN_ROWS].double().sum(0) for at in range(0, len(table), _MEAN_ROWS)]
        return (torch.stack(parts).sum(0) / len(table)).float()

    def _more(self, name: str, stored: Tensor) -> Tensor:
        if name not in self._mean:
            self._mean[name] = self.mean_row(name).to(stored.dtype)
        return self._mean[name].expand(self.added[name], -1)

    def _stored(self, name: str) -> Tensor:
        if name in self._tensors:
            return self._tensors[name]
        path = self._file_of[name]
        if path not in self._open:
            self._open[path] = _File(path)
        if name not in self._open[path].entries:
            what = f"the index says that it holds {name}, and it does not"
            raise ModelError(Problem(f"model.source: {path.name}", what, "download the model again"))
        return self._open[path].tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop); pages of the others are not touched."""
        stored = self._stored(name)
        end = len(stored)
        if name not in self.added or stop <= end:
            return stored[start:stop]
        more = self._more(name, stored)[max(start - end, 0) : stop - end]
        return torch.cat((stored[start:stop], more))

    def close(self) -> None:
        """Let go of the mapped files. Tensors that were handed out keep theirs."""
        self._open.clear()


@contextmanager
def freed_memory_goes_back() -> Iterator[None]:
    """Large blocks freed inside go back to the system at once, with glibc; elsewhere nothing changes.

    glibc keeps freed blocks of up to 32 MiB for later. ZeRO-3 makes each weight whole before it keeps a shard of it,
    and the holes pile up to the size of the base (measured).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        if mallopt is not None:
            # where glibc's own adjustment ends, which the call above has turned off
            mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
            mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)
