"""What a preparation has counted of the rows, for `phi3-dist plan`, which loads no tokenizer.

The note is kept under what the run file names and the size and time of each local file. It is a help for a plan: a run
counts its own tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phi3_dist.config.json_text import parse_json
from phi3_dist.config.schema import RunConfig
from phi3_dist.data.read.sources import located
from phi3_dist.errors import DataError
from phi3_dist.planning.auto_fields import RowLengths

__all__ = ["note_lengths", "noted_lengths"]

_FOLDER = "row-lengths"
_NOT_COUNTED = {"pack_length", "on_long_row", "cache", "max_validation_rows"}


def _files(cfg: RunConfig) -> Iterator[Path]:
    sources = located(cfg.data)
    for source, _ in (*sources.train, *sources.held_out):
        if isinstance(source, Path):
            yield from sorted(source.rglob("*")) if source.is_dir() else [source]


def _note(cache: Path, cfg: RunConfig) -> Path:
    """Raises DataError for sources that are not there, OSError for files that are gone meanwhile."""
    stats = [(str(path.resolve()), path.stat()) for path in _files(cfg)]
    model = cfg.model
    parts: list[Any] = [cfg.data.model_dump(mode="json", exclude=_NOT_COUNTED)]
    parts += [model.tokenizer or model.source, model.revision, model.new_tokens]
    parts += [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return cache / _FOLDER / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.json"


def note_lengths(cache: Path, cfg: RunConfig, lengths: RowLengths) -> None:
    """Keep them; where that is not possible nothing is lost."""
    with contextlib.suppress(OSError, DataError):
        path = _note(cache, cfg)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(lengths)), encoding="utf-8")


def noted_lengths(cache: Path, cfg: RunConfig) -> RowLengths | None:
    """What was kept for these rows as they are now; None where nothing was."""
    try:
        values = parse_json(_note(cache, cfg).read_text("utf-8"))
        return RowLengths(**{key: int(value) for key, value in values.items()})
    except (OSError, DataError, ValueError, TypeError, AttributeError):
        return None
