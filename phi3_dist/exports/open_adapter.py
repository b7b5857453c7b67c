"""What `phi3-dist export` and `check` are given: a run's folder or an adapter's, with the base that it belongs on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor

from phi3_dist.adapters.loading import not_to_go_on_from, rows_needed, without_frozen_tables
from phi3_dist.adapters.reading import CONFIG, WEIGHTS, read_adapter, read_metadata
from phi3_dist.config.load import load_run
from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import AdapterError, ConfigError, ModelError, Phi3DistError, Problem, RunFolderError
from phi3_dist.exports.weight_updates import AdapterContents, contents_of
from phi3_dist.modeling.base import Base, find_base
from phi3_dist.training.run_folder_contents import is_run

__all__ = ["Opened", "TrainedOn", "adapter_folder", "first_line", "open_adapter", "run_config", "run_of"]

TrainedOn = Literal["none", "nf4", "int8"]
_QUANTISATIONS = ("none", "nf4", "int8")


@dataclass(frozen=True)
class Opened:
    """An adapter that was read whole and fits its base.

    `tensors` and `config` are PEFT's, `metadata` what the weights' header says beside (adapters/loading.py).
    `trained_on` is how the base was quantised then; `lora_init` is `lora.init`, where anybody has written it down.
    """

    folder: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    metadata: dict[str, str]
    contents: AdapterContents
    base: Base
    trained_on: TrainedOn
    lora_init: str
    run: Path | None
    run_config: RunConfig | None

    @property
    def metadata_to_keep(self) -> dict[str, str]:
        """What an adapter of the same update says in its header too."""
        kept = ("base_rows", "longrope", "quantization", "start")
        return {key: value for key, value in self.metadata.items() if key in kept}

    @property
    def rows(self) -> int:
        """Rows that the tables of embedding and head must have."""
        return max(int(self.metadata.get("base_rows", 0)), int(self.base.config.vocab_size))


def adapter_folder(where: Path) -> Path:
    """The adapter's folder that a run's folder, or an adapter's own, stands for.

    Raises RunFolderError for a run that has left no adapter yet, AdapterError for a folder of something else.
    """
    if not where.is_dir():
        raise AdapterError(Problem(str(where), "no such folder", "name a run's folder, or an adapter's"))
    if (where / CONFIG).exists() or (where / WEIGHTS).exists():
        return where
    if (where / "adapter" / CONFIG).exists():
        return where / "adapter"
    if is_run(where):
        fix = f"phi3-dist train … --resume finishes it; phi3-dist adapter {where} OUT takes its last checkpoint"
        raise RunFolderError(Problem(str(where), "is a run that has not finished: it has no adapter yet", fix))
    what = f"is neither a run's folder nor an adapter's: it has no {CONFIG}"
    raise AdapterError(Problem(str(where), what, "name the folder that training has left"))


def run_of(folder: Path) -> Path | None:
    """The run whose adapter `folder` is, where it still stands in there."""
    above = folder.resolve().parent
    return above if folder.resolve().name == "adapter" and is_run(above) else None


def run_config(run: Path) -> RunConfig:
    """A run's resolved file. Raises RunFolderError where the folder has none, ConfigError where it is none."""
    path = run / "config.yaml"
    if not path.is_file():
        what = "is not a run's folder: it has no config.yaml"
        raise RunFolderError(Problem(str(run), what, "name the folder that phi3-dist train has made"))
    return load_run(path)


def open_adapter(where: str | Path, base: str | None = None) -> Opened:
    """Read an adapter and find its base; `base` (a folder or a hub id) in place of the one that it names.

    Raises AdapterError, with all that is wrong: damaged files, a kind that is not LoRA, a base that can't be found, one
    that the adapter's tensors don't fit.
    """
    folder = adapter_folder(Path(where))
    tensors, config = read_adapter(folder)
    metadata = read_metadata(folder)
    run = run_of(folder)
    settings = _settings(run)
    problems = [Problem(str(folder), p.what, p.fix) for p in not_to_go_on_from(folder, config)]
    if problems:
        raise AdapterError(*problems)
    found = _base_of(folder, config, settings, base)
    rows = rows_needed(folder, config, int(found.config.vocab_size))
    if rows > int(found.config.vocab_size):
        metadata["base_rows"] = str(rows)
    tensors = without_frozen_tables(tensors, found, config)
    contents = contents_of(tensors, config)
    problems = contents.unfit(found, rows, str(folder))
    if problems:
        raise AdapterError(*problems)
    trained_on = metadata.get("quantization") or (settings.model.quantization if settings else "none")
    lora_init = metadata.get("start") or (settings.lora.init if settings else "")
    if trained_on not in _QUANTISATIONS:
        raise AdapterError(Problem(str(folder), f"says quantization {trained_on!r}", "save the adapter again"))
    return Opened(
        folder=folder,
        tensors=tensors,
        config=config,
        metadata=metadata,
        contents=contents,
        base=found,
        trained_on=cast(TrainedOn, trained_on),
        lora_init=lora_init,
        run=run,
        run_config=settings,
    )


def _settings(run: Path | None) -> RunConfig | None:
    if run is None or not (run / "config.yaml").is_file():
        return None
    try:
        return load_run(run / "config.yaml")
    except ConfigError:  # of another version: the adapter itself says what is needed
        return None


def _base_of(folder: Path, config: dict[str, Any], settings: RunConfig | None, named: str | None) -> Base:
    named = named or config.get("base_model_name_or_path") or (settings.model.source if settings else None)
    fix = "--base FOLDER, or the hub id of the model that it was trained on"
    if not named:
        raise AdapterError(Problem(str(folder), "does not say what base it was trained on", fix))
    try:
        return find_base(str(named), None if named else config.get("revision"))
    except ModelError as error:
        what = f"its base can't be used: {error.problems[0].where.removeprefix('model.source: ')}: "
        raise AdapterError(Problem(str(folder), what + error.problems[0].what, fix)) from error


def first_line(error: Phi3DistError) -> str:
    """The first problem of an error, in one line."""
    problem = error.problems[0]
    return " ".join(f"{problem.where}: {problem.what}".split())
