"""What `auto` becomes for the fields that decide a step's memory, each with its reason.

`data.pack_length`, `model.activation_checkpointing` and `train.micro_batch` follow from the plan of memory, in this
order: the pack that holds the longest row and keeps the device busy, recomputing only where that does not fit, then as
many packs a forward pass as fit and gain time. Explicit fields are kept as they are, and the others follow them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from phi3_dist.config.schema import RunConfig
from phi3_dist.family.variants import Family, Shape
from phi3_dist.planning.facts import Choice, LaunchFacts, MachineFacts
from phi3_dist.planning.memory import fits, total_gib
from phi3_dist.planning.plan import RunPlan, make_plan
from phi3_dist.planning.workload import account

__all__ = [
    "AUTO",
    "RowLengths",
    "auto_fields",
    "get_field",
    "is_auto",
    "plan_with_auto",
    "set_fields",
    "settle",
    "shortest_pack",
]

AUTO = ("data.pack_length", "model.activation_checkpointing", "train.micro_batch")
TARGET = {"cuda": 4096, "cpu": 2048}
"""Tokens of a pack, where rows are shorter. An H200 took 160 ms for a step of 2,048 tokens and 148 for one of 4,096, as
its host gives out the same work for either (docs/gpu.md). A CPU takes the same time a token from 512 on."""
ENOUGH = {"cuda": 16384, "cpu": 8192}
"""Tokens of a forward pass beyond which none is expected to be faster: four times the 4,096 with which an H200 is busy
while its host gives out a pass (not measured), and the longest that was measured on a CPU."""
HOST_RESERVE = 0.5
"""Of a host: other processes, and the pages of the files that are read, need it too."""
_SHORTEST, _STEP = 512, 64
_ENDLESS_GIB = 2.0**20


@dataclass(frozen=True)
class RowLengths:
    """Tokens of the longest row, of all rows to train on, and how many rows there are."""

    longest: int
    tokens: int
    rows: int


def is_auto(value: object) -> bool:
    """Whether a field of the run file is still to be settled; its type says what it is from then on."""
    return value == "auto"


def auto_fields(cfg: RunConfig) -> tuple[str, ...]:
    """The fields of `AUTO` that are `auto`."""
    return tuple(path for path in AUTO if is_auto(get_field(cfg, path)))


def get_field(cfg: RunConfig, path: str) -> Any:
    """The value at a dotted path."""
    section, _, key = path.partition(".")
    return getattr(getattr(cfg, section), key)


def set_fields(cfg: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The run with these values, by dotted path."""
    for path, value in values.items():
        section, _, key = path.partition(".")
        cfg = cfg.model_copy(update={section: getattr(cfg, section).model_copy(update={key: value})})
    return cfg


@dataclass(frozen=True)
class _Try:
    """One set of values, the memory of its worst rank (GiB; on a CPU of all ranks of a host), and whether it fits."""

    values: Mapping[str, Any]
    gib: float
    fits: bool


@dataclass
class _Place:
    """Where the run is to fit."""

    cfg: RunConfig
    machine: MachineFacts
    launch: LaunchFacts
    model: Family | Shape | Mapping[str, Any]
    _chosen: dict[str, str] = field(default_factory=dict)

    @cached_property
    def shape(self) -> Shape:
        if isinstance(self.model, Family):
            return self.model.shape
        return self.model if isinstance(self.model, Shape) else Shape.of(self.model)

    @property
    def kind(self) -> str:
        return "cpu" if self.machine.device == "cpu" else "cuda"

    @property
    def room(self) -> str:
        if self.kind == "cpu":
            return f"of the host's {self.machine.host_memory_gib:.1f} GiB, half kept free"
        return f"of {self.machine.device_memory_gib:.1f} GiB, a tenth kept free"

    def attempt(self, values: Mapping[str, Any]) -> _Try:
        """Raises PlanError as `make_plan` does, at the first values."""
        cfg = set_fields(self.cfg, values)
        endless = replace(self.machine, device_memory_gib=_ENDLESS_GIB, host_memory_gib=_ENDLESS_GIB)
        if not self._chosen:  # neither depends on the fields
            plan = make_plan(cfg, endless, self.launch, family_or_shape=self.model)
            self._chosen.update(precision=plan.precision, kernels=plan.kernels)
        _, terms, _ = account(cfg, endless, self.launch, self.shape, **self._chosen)
        per_node = self.launch.ranks_per_node
        host = per_node * total_gib(terms, "host")
        if self.kind == "cpu":
            return _Try(values, host, host <= self.machine.host_memory_gib * (1 - HOST_RESERVE))
        room = fits(terms, self.machine.device_memory_gib) and host <= self.machine.host_memory_gib
        return _Try(values, total_gib(terms), room)


def settle(
    cfg: RunConfig,
    machine: MachineFacts,
    launch: LaunchFacts,
    model: Family | Shape | Mapping[str, Any] | None,
    *,
    rows: RowLengths | None = None,
    resumed: Mapping[str, Any] | None = None,
) -> tuple[RunConfig, tuple[Choice, ...]]:
    """The run with a value for each field that is `auto`, and the reasons. `resumed`: values that a resumed run has.

    Without `model` nothing can be counted, and the fields get their defaults. Raises PlanError as `make_plan` does.
    """
    fields = auto_fields(cfg)
    if not fields:
        return cfg, ()
    before = {path: value for path, value in (resumed or {}).items() if path in fields}
    if before.get("train.micro_batch") and not _divides(cfg, launch, before["train.micro_batch"]):
        del before["train.micro_batch"]  # on other ranks than before
    choices = [_choice(path, value, "as the run began with") for path, value in before.items()]
    cfg = set_fields(cfg, before)
    fields = auto_fields(cfg)
    if fields and model is None:
        usual = {path: {"data.pack_length": 2048, "train.micro_batch": 1}.get(path, False) for path in fields}
        why = "the default: the shape of model.source is not known here"
        return set_fields(cfg, usual), (*choices, *(_choice(path, value, why) for path, value in usual.items()))
    if fields and model is not None:
        values, reasons = _search(_Place(cfg, machine, launch, model), fields, rows)
        choices += [_choice(path, values[path], reasons[path]) for path in fields]
        cfg = set_fields(cfg, values)
    return cfg, tuple(choices)


def _choice(path: str, value: Any, why: str) -> Choice:
    shown = ("yes" if value else "no") if isinstance(value, bool) else f"{value:,}"
    return Choice(path, shown, why)


def plan_with_auto(
    cfg: RunConfig,
    machine: MachineFacts,
    launch: LaunchFacts,
    model: Family | Shape | Mapping[str, Any] | None,
    *,
    rows: RowLengths | None = None,
    resumed: Mapping[str, Any] | None = None,
) -> tuple[RunConfig, RunPlan]:
    """`settle` and `make_plan`: the run with its values, and its plan, in which the reasons stand first."""
    cfg, choices = settle(cfg, machine, launch, model, rows=rows, resumed=resumed)
    plan = make_plan(cfg, machine, launch, family_or_shape=model)
    return cfg, replace(plan, choices=(*choices, *plan.choices))


def _divides(cfg: RunConfig, launch: LaunchFacts, micro_batch: int) -> bool:
    return cfg.train.global_batch % (micro_batch * _data_ranks(cfg, launch)) == 0


def _data_ranks(cfg: RunConfig, launch: LaunchFacts) -> int:
    """Ranks, where those that share their packs count as one."""
    return max(1, launch.world_size // cfg.train.sequence_parallel)


def _search(place: _Place, fields: tuple[str, ...], rows: RowLengths | None) -> tuple[dict[str, Any], dict[str, str]]:
    why: dict[str, str] = {}
    lengths, long_why = [int(place.cfg.data.pack_length)] if "data.pack_length" not in fields else [], ""
    if not lengths:
        lengths, long_why = _pack_lengths(place, rows)
    tried = _until_it_fits(place, fields, lengths)
    first, best = tried[0], tried[-1]
    none = "" if best.fits else f"nothing fits, and this takes the least: {best.gib:.1f} GiB {place.room}"
    if "data.pack_length" in fields:
        taken = int(best.values["data.pack_length"])
        less = f"; {lengths[0]:,} would take {first.gib:.1f} GiB {place.room}" if taken < lengths[0] else ""
        why["data.pack_length"] = none or long_why + less
    if "model.activation_checkpointing" in fields:
        name = "model.activation_checkpointing"
        why[name] = none or (
            f"without it {tried[-2].gib:.1f} GiB would be needed {place.room}"
            if best.values[name]
            else f"{best.gib:.1f} GiB fit without it {place.room}, and it would take a fifth more time"
        )
    values = dict(best.values)
    if "train.micro_batch" in fields:
        values["train.micro_batch"], why["train.micro_batch"] = _micro_batch(place, values, best)
        why["train.micro_batch"] = none or why["train.micro_batch"]
    return values, why


def _until_it_fits(place: _Place, fields: tuple[str, ...], lengths: Sequence[int]) -> list[_Try]:
    """Values in the order of preference, up to the first that fit: shorter packs come after recomputing."""
    tried: list[_Try] = []
    for length in lengths:
        for again in (False, True):
            values: dict[str, Any] = {"train.micro_batch": 1} if "train.micro_batch" in fields else {}
            if "data.pack_length" in fields:
                values["data.pack_length"] = length
            if "model.activation_checkpointing" in fields:
                values["model.activation_checkpointing"] = again
            elif again:
                break
            tried.append(place.attempt(values))
            if tried[-1].fits:
                return tried
    return tried


def shortest_pack(longest: int) -> int:
    """The shortest pack, of those as long as a power of two, that holds a row of `longest` tokens."""
    return 1 << max(4, (longest - 1).bit_length())


def _pack_lengths(place: _Place, rows: RowLengths | None) -> tuple[list[int], str]:
    """Lengths to try, the wanted one first, and the reason for that."""
    target, window = TARGET[place.kind], _window(place.model)
    if rows is None:
        want, busy = min(target, window), "long enough to keep a device busy"
        return [want, *_halves(want, _SHORTEST)], f"{busy}; the rows are not counted yet (phi3-dist prepare does so)"
    longest = min(rows.longest, window)
    want = least = shortest_pack(longest)
    batch = place.cfg.train.global_batch
    while want * 2 <= target and rows.tokens // (want * 2) >= batch:
        want *= 2
    want = min(want, window)
    exact = max(16, min(-(-longest // _STEP) * _STEP, window))
    lengths = [want, *_halves(want, least)]
    lengths += [exact] if exact < lengths[-1] else []
    if place.cfg.data.on_long_row != "error":
        lengths += [length for length in _halves(least, _SHORTEST) if length < lengths[-1]]
    why = f"holds the longest of {rows.rows:,} rows, {rows.longest:,} tokens"
    if rows.longest > window:
        why = f"the model has {window:,} positions, and the longest of {rows.rows:,} rows {rows.longest:,} tokens"
    elif want > least:
        why += ", and is long enough to keep a device busy" if want * 2 > target else ""
    if want * 2 <= target and rows.tokens // (want * 2) < batch:
        why += f"; longer packs would be fewer than the {batch} of a step"
    return lengths, why


def _halves(length: int, least: int) -> Iterator[int]:
    half = 1 << (length - 1).bit_length() - 1
    while half >= least:
        if half < length:
            yield half
        half //= 2


def _window(model: Family | Shape | Mapping[str, Any]) -> int:
    if isinstance(model, Family):
        return model.max_positions
    found = model.get("max_position_embeddings") if isinstance(model, Mapping) else None
    return found if isinstance(found, int) and found >= 16 else 2**31 - 1


def _micro_batch(place: _Place, values: Mapping[str, Any], one: _Try) -> tuple[int, str]:
    """The most packs of a rank's share of a step that fit, and why not more."""
    batch, world = place.cfg.train.global_batch, _data_ranks(place.cfg, place.launch)
    length = int(values.get("data.pack_length", place.cfg.data.pack_length))
    share = batch // world if batch % world == 0 else 1
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    enough = ENOUGH[place.kind]
    useful = [size for size in sizes if size == 1 or size * length <= enough]
    taken, gib, more = 1, one.gib, "which is a rank's whole step"
    for size in useful[1:]:
        found = place.attempt({**values, "train.micro_batch": size})
        if not found.fits:
            more = f"{size} would take {found.gib:.1f}"
            break
        taken, gib = size, found.gib
    else:
        if len(useful) < len(sizes):
            more = f"passes of more than {enough:,} tokens are not expected to be faster"
    ranks = f"of each of {world} ranks" if world > 1 else "of the one rank"
    return taken, f"of the {share} packs a step {ranks} {taken} at a time take {gib:.1f} GiB {place.room}; {more}"
