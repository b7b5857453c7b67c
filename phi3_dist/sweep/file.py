"""A sweep file: a run file with a section `sweep`, and the candidates that it means. Imports no torch."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, StrictInt, StrictStr, ValidationError

from phi3_dist.config.load import flatten, load_run, read_section
from phi3_dist.config.mistakes import explain
from phi3_dist.config.schema import Count, Real, RunConfig, Section
from phi3_dist.errors import ConfigError, Problem, shown
from phi3_dist.planning.auto_fields import auto_fields

__all__ = ["Candidate", "EarlyConfig", "Sweep", "SweepConfig", "load_sweep", "load_sweep_or_run", "resolved_section"]

MOST = 512
"""Candidates of one sweep."""
_MAY_DIFFER = ("optim.", "lora.", "train.", "data.")
_MAY_NOT = {
    "data.pack_length": "packs of all candidates are joined into one row",
    "data.cache": "it is a place, not a setting",
    "train.micro_batch": "a forward pass takes as many packs of each candidate",
    "train.profile": "a trace is one of all candidates together",
    "train.deterministic": "all candidates share one attention",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,-]{0,99}")


class EarlyConfig(Section):
    """Successive halving: at each rung the candidates with the lowest held-out losses go on."""

    rule: Literal["none", "halving"] = "none"
    keep: Annotated[Real, Field(gt=0, lt=1)] = 0.5
    """The share of those still running that continues at each rung (rounded up)."""
    first: Count = 1
    """The first rung: so many held-out losses after the one before step 1. The next have 2, 4, 8 … times as many."""
    floor: Count = 1
    """As many candidates always continue to the end."""


class SweepConfig(Section):
    """The section `sweep` of a sweep file."""

    axes: dict[StrictStr, list[Any]] = Field(default_factory=dict)
    """Dotted keys of the run file and the values each takes."""
    how: Literal["grid", "zip"] = "grid"
    """`grid`: every combination of the axes; `zip`: the first values together, the second values together …"""
    candidates: list[dict[StrictStr, Any]] = Field(default_factory=list)
    """Named candidates beside those of the axes: `{name: wide, lora.r: 64}`."""
    early: EarlyConfig = EarlyConfig()
    together: Literal["auto"] | Annotated[StrictInt, Field(ge=1, le=MOST)] = "auto"
    """Candidates that train at once; `auto`: as many as the memory plan has room for."""
    pass_tokens: Literal["auto"] | Count = "auto"
    """Tokens of one forward pass over the base: as many candidates share it as their full packs fit, at least one. More
    cost memory for activations; `auto`: 512 on a CPU, where longer passes gain nothing; 8,192 on a GPU (untimed); where
    the base is sharded as many candidates as memory holds, since each pass gathers it."""


@dataclass(frozen=True)
class Candidate:
    """One run of a sweep: its name, what it sets, and its whole run file."""

    name: str
    settings: Mapping[str, Any]
    cfg: RunConfig


@dataclass(frozen=True)
class Sweep:
    """`cfg` is the run file without candidates; its save.folder holds theirs."""

    cfg: RunConfig
    early: EarlyConfig
    together: int | Literal["auto"]
    pass_tokens: int | Literal["auto"]
    candidates: tuple[Candidate, ...]

    @property
    def differing(self) -> tuple[str, ...]:
        """The keys in which candidates differ."""
        return tuple(dict.fromkeys(key for candidate in self.candidates for key in candidate.settings))

    @property
    def data_runs(self) -> tuple[RunConfig, ...]:
        """One candidate's run for each `data` section that differs from the others."""
        sections: dict[str, RunConfig] = {}
        for one in self.candidates:
            sections.setdefault(json.dumps(one.cfg.data.model_dump(mode="json")), one.cfg)
        return tuple(sections.values())


def _section(path: Path) -> SweepConfig:
    values, where = read_section(path, "sweep")
    if values is None:
        fix = "add axes, such as `sweep: {axes: {optim.lr: [1e-4, 3e-4]}}`; phi3-dist train runs it as it is"
        raise ConfigError(Problem(str(path), "has no section `sweep`", fix))
    if isinstance(values, dict) and isinstance(values.get("early"), str):
        values = {**values, "early": {"rule": values["early"]}}
    try:
        return SweepConfig.model_validate(values)
    except ValidationError as error:
        found = explain(error, values if isinstance(values, dict) else {}, SweepConfig)
        raise ConfigError(
            *(Problem(where(f"sweep.{at}".rstrip(".")), what, fix or _without(at)) for at, what, fix in found[:20])
        ) from None


def _without(path: str) -> str:
    """What a key of the section is where it's left out, for those that are one value."""
    field = SweepConfig.model_fields.get(path)
    return f"leave it out for {field.default}" if field is not None and isinstance(field.default, str) else ""


def _combinations(sweep: SweepConfig) -> Iterator[dict[str, Any]]:
    """What each unnamed candidate sets."""
    if not sweep.axes:
        return
    if sweep.how == "grid":
        for values in itertools.product(*sweep.axes.values()):
            yield dict(zip(sweep.axes, values, strict=True))
        return
    for values in zip(*sweep.axes.values(), strict=True):
        yield dict(zip(sweep.axes, values, strict=True))


def _is_the_sweeps(name: str) -> bool:
    """Where a sweep writes its own files, also on a disk to which BEST is best."""
    return name.lower() in ("best", "sweep.json", "sweep.html")


def _shape_problems(sweep: SweepConfig) -> list[Problem]:
    problems = [
        Problem(f"sweep.axes.{key}", "has no value", "give at least one, or take the axis out")
        for key, values in sweep.axes.items()
        if not values
    ]
    lengths = {key: len(values) for key, values in sweep.axes.items()}
    if sweep.how == "zip" and len(set(lengths.values())) > 1:
        said = ", ".join(f"{key} has {count}" for key, count in lengths.items())
        problems.append(Problem("sweep.axes", f"differ in length, and zip takes one of each: {said}", "how: grid"))
    for number, one in enumerate(sweep.candidates):
        name = one.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or _is_the_sweeps(name):
            what = f"is {shown(name)}: a folder is named after it" if "name" in one else "is missing"
            problems.append(
                Problem(
                    f"sweep.candidates[{number}].name",
                    what,
                    "letters, digits and ._+=,- alone, and another word than best, sweep.json and sweep.html",
                )
            )
    keys = {*sweep.axes, *(key for one in sweep.candidates for key in one if key != "name")}
    problems += [problem for key in sorted(keys) if (problem := _key_problem(key))]
    count = len(sweep.candidates)
    if sweep.axes and not problems:
        sizes = list(lengths.values())
        grid = 1
        for size in sizes:
            grid *= size
        count += grid if sweep.how == "grid" else sizes[0]
    if not problems and not 1 <= count <= MOST:
        what = f"means {count:,} candidates" if count else "has neither axes nor candidates"
        problems.append(Problem("sweep", what, f"between 1 and {MOST}"))
    return problems


def _key_problem(key: str) -> Problem | None:
    nearest = "phi3-dist slurm --array trains separate runs, each with a base"
    why = _MAY_NOT.get(key)
    if why is None and not key.startswith(_MAY_DIFFER):
        why = "candidates share one base, one model and one place"
    return Problem(f"sweep: {key}", f"cannot differ between candidates: {why}", f"nearest: {nearest}") if why else None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=True)
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_")[:32] or "empty"


def _name_of(settings: Mapping[str, Any]) -> str:
    """lr=0.0001,r=8: the last part of each key, or all of it where two end alike."""
    ends = [key.rsplit(".", 1)[-1] for key in settings]
    names = [end if ends.count(end) == 1 else key for end, key in zip(ends, settings, strict=True)]
    return ",".join(f"{name}={_short(value)}" for name, value in zip(names, settings.values(), strict=True))[:100]


def _candidate(path: Path, overrides: Sequence[str], cfg: RunConfig, name: str, settings: Mapping[str, Any]) -> Any:
    """The candidate, or its problems."""
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    try:
        own = load_run(path, [*overrides, *words], apart=("sweep",))
    except ConfigError as error:
        return [Problem(f"sweep candidate {name}: {p.where}", p.what, p.fix) for p in error.problems]
    changed = {
        "name": f"{cfg.name}-{name}",
        "save": own.save.model_copy(update={"folder": str(Path(cfg.save.folder) / name)}),
        "log": own.log.model_copy(update={"trackers": ()}),  # an Accelerator has one run of a tracker
    }
    return Candidate(name, dict(settings), own.model_copy(update=changed))


def _twins(candidates: Sequence[Candidate]) -> list[Problem]:
    """Candidates that are the same, and those whose names are."""
    problems = []
    seen: dict[str, str] = {}
    for one in candidates:
        facts = flatten(one.cfg.model_dump(mode="json"))
        what = json.dumps({key: value for key, value in facts.items() if key not in {"name", "save.folder"}})
        if what in seen:
            where = f"sweep candidates {seen[what]} and {one.name}"
            problems.append(Problem(where, "are the same run", "take one of them out"))
        seen.setdefault(what, one.name)
    names = [one.name for one in candidates]
    problems += [
        Problem(f"sweep candidate {name}", "is named twice", "give it a name under sweep.candidates")
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    return problems


def _refused(one: Candidate) -> Iterator[Problem]:
    """What a candidate may not ask for, however alone it is in that."""
    cfg, where = one.cfg, f"sweep candidate {one.name}: "
    nearest = "nearest: phi3-dist train, or phi3-dist slurm --array"
    for key, wrong, why in (
        ("model.new_tokens", bool(cfg.model.new_tokens), "the embedding would be another for each candidate"),
        ("lora.bias", cfg.lora.bias != "none", "the base's biases would be others for each candidate"),
        ("lora.modules_to_save", bool(cfg.lora.modules_to_save), "a whole module would be another for each candidate"),
        (
            "lora.init",
            cfg.lora.init.startswith("pissa"),
            "PiSSA takes each candidate's start out of the base, which all share; loftq and eva leave it as it is",
        ),
        ("lora.targets", bool({"lm_head", "embed_tokens"} & set(cfg.lora.targets)), "head and embedding are shared"),
        ("eval.generate", bool(cfg.eval.generate), "answers are made by one model at a time"),
        ("train.profile", bool(cfg.train.profile), "a trace is one of all candidates together"),
    ):
        if wrong:
            yield Problem(f"{where}{key}", f"cannot be in a sweep: {why}", nearest)


def _fp8_problems(candidates: Sequence[Candidate]) -> list[Problem]:
    """FP8 is for the linears that have an adapter: one base can hold one such set."""
    if not any(one.cfg.model.fp8 for one in candidates):
        return []
    kinds = {(one.cfg.lora.targets, one.cfg.lora.layers, one.cfg.lora.dora) for one in candidates}
    if len(kinds) == 1 and not candidates[0].cfg.lora.dora:
        return []
    what = "is true: only linears with an adapter are kept in FP8, and "
    what += "DoRA reads the weights" if any(one.cfg.lora.dora for one in candidates) else "candidates adapt others"
    fix = "give all the same lora.targets and lora.layers, without DoRA; or model.fp8=false"
    return [Problem("model.fp8", what, fix)]


def _early_problems(sweep: SweepConfig, candidates: Sequence[Candidate]) -> list[Problem]:
    if sweep.early.rule == "none":
        return []
    every = {one.cfg.train.eval_every for one in candidates}
    if every == {0} or len(every) > 1:
        what = "compares held-out losses after the same steps"
        return [Problem("sweep.early", what, "set train.eval_every to one number of steps for all")]
    return []


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file and every candidate of it. Raises ConfigError with all problems."""
    file = Path(path)
    section = _section(file)
    problems = _shape_problems(section)
    if problems:
        raise ConfigError(*problems)
    cfg = load_run(file, overrides, apart=("sweep",))
    alone = "is auto, which is counted for one adapter, and a sweep trains several"
    problems += [Problem(path, alone, "write a value in its place") for path in auto_fields(cfg)]
    named = [(str(one["name"]), {k: v for k, v in one.items() if k != "name"}) for one in section.candidates]
    wanted = [*((_name_of(settings), settings) for settings in _combinations(section)), *named]
    candidates: list[Candidate] = []
    for name, settings in wanted:
        found = _candidate(file, overrides, cfg, name, settings)
        if isinstance(found, Candidate):
            candidates.append(found)
            problems += _refused(found)
        else:
            problems += found
    problems += _twins(candidates) + _fp8_problems(candidates) + _early_problems(section, candidates)
    if problems:
        raise ConfigError(*problems[:50])
    return Sweep(cfg, section.early, section.together, section.pass_tokens, tuple(candidates))


def load_sweep_or_run(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, Sweep | None]:
    """A file's run, and its sweep where it has a section `sweep`. Raises ConfigError with all problems."""
    if read_section(path, "sweep")[0] is None:
        return load_run(path, overrides), None
    sweep = load_sweep(path, overrides)
    return sweep.cfg, sweep


def resolved_section(sweep: Sweep) -> str:
    """The section `sweep` in YAML with every candidate by its name."""
    section = {
        "candidates": [{"name": one.name, **one.settings} for one in sweep.candidates],
        "early": sweep.early.model_dump(mode="json"),
        "together": sweep.together,
        "pass_tokens": sweep.pass_tokens,
    }
    return yaml.safe_dump({"sweep": section}, sort_keys=False, allow_unicode=True, width=120)
