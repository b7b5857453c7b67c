"""From a run file and overrides to a `RunConfig`, or to one `ConfigError` that holds every mistake.

Nothing here imports torch, so that a misspelt key is answered in a fraction of a second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from phi3_dist.config import mistakes
from phi3_dist.config.cross_checks import cross_checks
from phi3_dist.config.schema import RunConfig
from phi3_dist.config.shipped_files import here_or_shipped
from phi3_dist.config.unsafe_texts import expanded, text_faults
from phi3_dist.config.yaml_text import DEEPEST, LARGEST_BYTES, YamlFault, read_yaml
from phi3_dist.errors import ConfigError, Problem, kind, shown

__all__ = ["load_run", "read_section", "resolved_yaml", "json_schema", "diff", "flatten"]

_TOLD_AT_MOST = 50
"""Mistakes in one message. What is wrong with a thousand keys is wrong with the file."""


@dataclass
class _Source:
    """The user's values before they are checked, and where each one stands (dotted path → `run.yaml:12`)."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    untold: int = 0

    def read(self, text: str, place: Callable[[int], str], path: str = "") -> Any:
        """The values of a YAML text that stands at `path`. Raises `YamlFault`."""
        document = read_yaml(text, place=place, path=path, name=self.name)
        self.places |= document.places
        self.problems += document.problems
        self.untold += document.untold
        return document.values

    def where(self, path: str) -> str:
        """`path (run.yaml:12)`; for a missing key the place of the nearest section above it."""
        place = self.places.get(path)
        return f"{path} ({place})" if place else path


def _read_file(path: Path) -> _Source:
    source = _Source(path.name)
    place = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_BYTES + 1)
        values = source.read(raw.decode("utf-8-sig"), lambda line: f"{path.name}:{line}")
    except FileNotFoundError:
        raise ConfigError(Problem(place, "no such file", _nearby(path))) from None
    except IsADirectoryError:
        raise ConfigError(Problem(place, "is a folder; expected a run file", _nearby(path / "x"))) from None
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text: {error.reason} at byte {error.start}"
        raise ConfigError(Problem(place, what, "save it as UTF-8")) from None
    except YamlFault as error:
        where = f"{place}:{error.line}" if error.line else place
        raise ConfigError(*source.problems, Problem(where, error.what, "correct the YAML at that place")) from None
    except OSError as error:
        raise ConfigError(Problem(place, f"cannot be read: {error.strerror}")) from None
    except ValueError:  # what the system takes for no path at all
        raise ConfigError(Problem(repr(place), "has a null character, which no path has")) from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(Problem(place, f"is {kind(values)}, not a mapping", "start it with `model:` and `data:`"))
    source.values = values
    return source


def _nearby(path: Path) -> str:
    folder = path.parent
    near = sorted(p.name for p in folder.glob("*.yaml")) if folder.is_dir() else []
    if near:
        return f"run files in {folder}: {', '.join(near[:8])}"
    shipped = here_or_shipped(path) != path
    return "phi3-dist init FOLDER lays a project out that has it; run the command in there" if shipped else ""


def _apply_override(source: _Source, text: str) -> None:
    path, equals, value_text = text.partition("=")
    path = path.strip().lstrip("-")
    place = f"override {shown(text)}"
    parts = path.split(".")
    if not equals or not path or not all(part.strip() for part in parts) or len(parts) > DEEPEST:
        fix = "write it as key.path=value, such as optim.lr=1e-4"
        source.problems.append(Problem(place, "is not of the form key.path=value", fix))
        return
    try:
        value = source.read(value_text, lambda line: "override", path)
    except YamlFault as error:
        what = error.what.replace("is not YAML", "its value is not YAML")
        source.problems.append(Problem(place, what, "quote the value"))
        return
    section = source.values
    *parents, last = path.split(".")
    for depth, parent in enumerate(parents):
        inner = section.setdefault(parent, {})
        if inner is None:  # `lora:` with nothing under it
            inner = section[parent] = {}
        if not isinstance(inner, dict):
            above = ".".join(parents[: depth + 1])
            source.problems.append(Problem(place, f"{above} is {shown(inner)}, not a section"))
            return
        section = inner
    section[last] = value
    source.places[path] = place


def read_section(path: str | Path, name: str) -> tuple[Any, Callable[[str], str]]:
    """A top-level section of a YAML file as it stands there (None where it is not), and `where` of its dotted paths.

    Raises ConfigError where the file cannot be read.
    """
    source = _read_file(Path(path))
    if source.problems:
        raise ConfigError(*_first(source.problems, source.untold))
    return source.values.get(name), source.where


def load_run(path: str | Path, overrides: Sequence[str] = (), *, apart: Sequence[str] = ()) -> RunConfig:
    """Read a run file without its sections `apart`, apply `key.path=value` overrides in order, check everything.

    Values of overrides are read as YAML (`optim.lr=1e-4`, `lora.targets=[qkv_proj,o_proj]`). An empty `name` becomes
    the file's stem, and `{name}` in `save.folder` is filled in.
    Raises `ConfigError` with all problems: the dotted path and line, the value, and the fix.
    """
    file = Path(path)
    source = _read_file(file)
    for section in apart:
        source.values.pop(section, None)
    for override in overrides:
        _apply_override(source, override)
    problems = list(source.problems)
    config, bad_paths = None, set()
    try:
        config = RunConfig.model_validate(source.values)
    except ValidationError as error:
        said = {problem.where for problem in source.problems}
        for bad, what, fix in mistakes.explain(error, source.values):
            bad_paths.add(bad)
            if source.where(bad) not in said:
                problems.append(Problem(source.where(bad), what, fix))
        source.untold += max(0, error.error_count() - mistakes.EXPLAINED_AT_MOST)
        config = _what_makes_sense(source.values, bad_paths)
    if config is not None:
        config = config.model_copy(update={"name": config.name or file.stem})
        for cross in (*text_faults(config), *cross_checks(config)):
            if not any(_overlap(cross_path, bad) for cross_path in cross.paths for bad in bad_paths):
                problems.append(Problem(source.where(cross.paths[0]), cross.what, cross.fix))
    if problems:
        raise ConfigError(*_first(problems, source.untold))
    assert config is not None
    save = config.save.model_copy(update={"folder": config.save.folder.replace("{name}", config.name)})
    return expanded(config.model_copy(update={"save": save}))


def _first(problems: list[Problem], untold: int) -> list[Problem]:
    """As many as a person reads, and how many more there are."""
    untold += max(0, len(problems) - _TOLD_AT_MOST)
    about = "about " if len(problems) >= mistakes.EXPLAINED_AT_MOST else ""
    more = [Problem("", f"and {about}{untold:,} more")] if untold else []
    return [*problems[:_TOLD_AT_MOST], *more]


def _overlap(one: str, other: str) -> bool:
    """Whether one dotted path is the other, or lies in it."""
    return one == other or one.startswith((f"{other}.", f"{other}[")) or other.startswith((f"{one}.", f"{one}["))


def _what_makes_sense(values: Mapping[str, Any], bad_paths: set[str]) -> RunConfig | None:
    """The config without its bad values, so that the pairs that remain can still be checked."""
    valid: dict[str, Any] = json.loads(json.dumps(values, default=str))
    for path in bad_paths:
        *parents, last = re.sub(r"\[.*", "", path).split(".")
        section: Any = valid
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(last, None)
    for section_name, required in (("model", "source"), ("data", "train")):
        valid.setdefault(section_name, {})
        if isinstance(valid[section_name], dict):
            valid[section_name].setdefault(required, "missing")
    try:
        return RunConfig.model_validate(valid)
    except ValidationError:
        return None


def resolved_yaml(cfg: RunConfig) -> str:
    """The run with every default written out, as YAML that `load_run` reads back to an equal config."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a run file, for editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}
    schema["title"] = "phi3_dist run file"
    return schema


def diff(a: RunConfig, b: RunConfig) -> list[tuple[str, Any, Any]]:
    """(dotted path, value in a, value in b) for each field that differs, in the schema's order."""
    flat_a, flat_b = flatten(a.model_dump(mode="json")), flatten(b.model_dump(mode="json"))
    return [(path, value, flat_b[path]) for path, value in flat_a.items() if value != flat_b[path]]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by their dotted paths, in order; a list is one leaf, and so is an empty mapping."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        is_section = isinstance(value, Mapping) and value and not key.endswith("_pattern")
        out |= flatten(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return out
