"""The plan before anything is started: the launch as an Accelerate config describes it, the machine as the user says.

`phi3-dist plan` runs on a login node: nothing here looks at a device, and torch is not imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from phi3_dist.config.schema import RunConfig
from phi3_dist.config.shipped_files import here_or_shipped
from phi3_dist.config.unsafe_texts import is_folder
from phi3_dist.config.yaml_text import YamlFault, read_yaml_file
from phi3_dist.errors import DataError, ModelError, PlanError, Problem
from phi3_dist.family.base_config import read_config
from phi3_dist.family.variants import Family, family_of_hub_id
from phi3_dist.planning.facts import LaunchFacts, MachineFacts
from phi3_dist.planning.launch_configs import SHIPPED
from phi3_dist.planning.memory import fits, total_gib
from phi3_dist.planning.memory_savers import smaller
from phi3_dist.planning.plan import RunPlan, make_plan

__all__ = ["assumed_machine", "check_fit", "check_rows", "launch_of_config", "plan_table", "shape_of_source"]

_OF_ACCELERATE = frozenset({"distributed_type", "compute_environment", "num_processes", "deepspeed_config"})
"""Without any of these Accelerate starts one process, whatever else the file says."""
_ROW_FILES = r"\.(jsonl?|csv|parquet|txt|gz|zst)$"


def launch_of_config(config: Path | None, processes: int | None, nodes: int | None = None) -> LaunchFacts:
    """The launch that `accelerate launch --config_file CONFIG` would make; without a config, one process.

    Raises PlanError where the file can't be read or asks for what this toolkit doesn't do.
    """
    if config is None:
        world = processes or 1
        return LaunchFacts(world_size=world, nodes=nodes or 1, strategy="single" if world == 1 else "ddp")
    config = here_or_shipped(config)
    try:
        values = read_yaml_file(config)
    except (OSError, YamlFault) as error:
        raise PlanError(Problem(str(config), f"cannot be read: {error}", "one of configs/accelerate/")) from error
    if not isinstance(values, dict):
        raise PlanError(Problem(str(config), "is not an Accelerate config", "one of configs/accelerate/"))
    if not _OF_ACCELERATE & values.keys():
        keys = ", ".join(str(key)[:40] for key in list(values)[:5]) or "none"
        what = f"is not an Accelerate config: it has neither distributed_type nor num_processes; its keys are {keys}"
        fix = "one of configs/accelerate/; `phi3-dist import` reads run files of other tools"
        raise PlanError(Problem(str(config), what, fix))
    kind = str(values.get("distributed_type", "NO"))
    world = processes or (1 if kind == "NO" else _count(config, values, "num_processes"))
    strategy, settings = _strategy(config, kind, values)
    return LaunchFacts(
        world_size=world,
        nodes=nodes or _count(config, values, "num_machines"),
        strategy=("single" if world == 1 else "ddp") if strategy == "ddp" else strategy,
        zero_settings=settings,
        use_cpu=values.get("use_cpu") is True,
    )


def _count(config: Path, values: Mapping[str, Any], key: str) -> int:
    number = values.get(key, 1)
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number < 2**31:
        raise PlanError(Problem(f"{config}: {key}", f"is {str(number)[:60]}; expected a whole number of 1 or more"))
    return number


def _section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The keys under `key`; none where nothing or something else stands there."""
    inner = values.get(key)
    return inner if isinstance(inner, dict) else {}


def _strategy(config: Path, kind: str, values: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    if kind in {"NO", "MULTI_GPU"}:
        return "ddp", {}
    if kind == "FSDP":
        return ("fsdp2_offload" if _section(values, "fsdp_config").get("fsdp_offload_params") else "fsdp2"), {}
    if kind != "DEEPSPEED":
        raise PlanError(
            Problem(f"{config}: distributed_type", f"{kind} is not supported", "one of configs/accelerate/")
        )
    inline = _section(values, "deepspeed_config")
    where, settings = (
        _zero_of_file(config, inline["deepspeed_config_file"])
        if inline.get("deepspeed_config_file") is not None
        else (config, _inline_zero(inline))
    )
    zero = _section(settings, "zero_optimization") if isinstance(settings, dict) else {}
    if zero.get("stage") not in (1, 2, 3):
        what = f"its zero_optimization.stage is {str(zero.get('stage'))[:60]}"
        raise PlanError(Problem(str(where), what, "1, 2 or 3; compare configs/deepspeed/zero3.json"))
    offload = any(_section(zero, f"offload_{k}").get("device", "none") != "none" for k in ("optimizer", "param"))
    return f"zero{zero['stage']}" + ("_offload" if offload else ""), settings


def _zero_of_file(config: Path, file: object) -> tuple[Path, Any]:
    """The DeepSpeed file that the config names, and what stands in it. A shipped one is known by its name anywhere.

    accelerate looks from the folder it is run in; the shipped files lie beside each other.
    """
    found = next((p for p in (Path(str(file)), config.parent.parent.parent / str(file)) if p.is_file()), None)
    if found is not None:
        return found, _json_of(found)
    if str(file) in SHIPPED:
        return Path(str(file)), json.loads(SHIPPED[str(file)])
    raise PlanError(Problem(f"{config}: deepspeed_config_file", f"{file} is not there", "configs/deepspeed/"))


def _inline_zero(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """ZeRO's settings from the fields that `accelerate config` asks for, as the launch itself reads them."""
    zero: dict[str, Any] = {"stage": section.get("zero_stage", 2)}
    for key in ("offload_optimizer", "offload_param"):
        device = section.get(f"{key}_device", "none")
        if device != "none":
            zero[key] = {"device": device}
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 0
    return {"zero_optimization": zero}


def assumed_machine(device: str, devices: int, memory_gib: float, packages: Mapping[str, str]) -> MachineFacts:
    """A machine as the user describes it, where the run will not be on this one. bf16 is taken as fast on a GPU."""
    return MachineFacts(
        device=device,
        device_name=f"assumed {device}",
        devices_per_node=devices,
        device_memory_gib=memory_gib,
        host_memory_gib=memory_gib if device == "cpu" else float("inf"),
        cpu_count=1,
        fast_bf16=device == "cuda",
        fast_bf16_reason="assumed: a GPU of compute capability 8 or more"
        if device == "cuda"
        else "assumed: a plain CPU",
        packages=packages,
    )


def shape_of_source(cfg: RunConfig) -> Family | Mapping[str, Any] | None:
    """The base model's shape: a known hub id, or a local folder's config.json; None where it isn't known here.

    A local one has the rows that `model.new_tokens` add to its tables, if its tokenizer is a local folder too.
    """
    if not is_folder(cfg.model.source):
        return family_of_hub_id(cfg.model.source)
    values: Mapping[str, Any] = read_config(Path(cfg.model.source).expanduser(), f"model.source: {cfg.model.source}")
    rows = _rows_for(cfg.model.new_tokens, Path(cfg.model.tokenizer or cfg.model.source) / "tokenizer.json")
    return {**values, "vocab_size": rows} if rows > values.get("vocab_size", rows) else values


def _json_of(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(Problem(str(file), f"is not JSON: {error}", "write or download it again")) from error


def _rows_for(tokens: Sequence[str], tokenizer_json: Path) -> int:
    """Rows up to the last of `tokens`, which get ids as the tokenizers library gives them; 0 without tokens or a file.

    A token that is new gets the next id after the added ones, or the model's number of tokens if that is greater.
    """
    if not tokens or not tokenizer_json.is_file():
        return 0
    try:
        values = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(Problem(str(tokenizer_json), f"is not JSON: {error}", "download the model again")) from error
    try:
        vocab = {str(token): int(number) for token, number in values["model"]["vocab"].items()}
        added = {str(token["content"]): int(token["id"]) for token in values["added_tokens"]}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"does not say which token has which id: {error!r}"
        raise ModelError(Problem(str(tokenizer_json), what, "download the model again")) from error
    free = max(len(vocab), *(number + 1 for number in added.values()))
    fresh = [token for token in tokens if token not in vocab and token not in added]
    ids = {**vocab, **added, **{token: free + place for place, token in enumerate(fresh)}}
    return 1 + max(ids[token] for token in tokens)


def check_rows(cfg: RunConfig) -> None:
    """Raises DataError for rows that are named as a file or folder and are not there. Hub ids are not looked up."""
    problems = []
    for key, value in (("data.train", cfg.data.train), ("data.validation", cfg.data.validation or ())):
        for entry in (value,) if isinstance(value, str) else value:
            name = entry if isinstance(entry, str) else entry.path
            on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not re.search(_ROW_FILES, name)
            if not Path(name).exists() and (not on_hub or name.startswith(".")):
                problems.append(Problem(key, f"{name} is not there", "name a file, a folder or a hub id"))
    if problems:
        raise DataError(*problems)


def check_fit(
    cfg: RunConfig,
    machine: MachineFacts,
    launch: LaunchFacts,
    plan: RunPlan,
    shape: Family | Mapping[str, Any] | None,
) -> None:
    """Raises PlanError for a plan whose memory is estimated to be more than there is, with changes that would fit."""
    if shape is None or _fits(plan, machine, launch):
        return
    place = "host" if machine.device == "cpu" else "device"
    ranks = launch.ranks_per_node if machine.device == "cpu" else 1
    have = machine.host_memory_gib if machine.device == "cpu" else machine.device_memory_gib
    terms = plan.memory or ()
    need = ranks * (total_gib(terms, "host") if machine.device == "cpu" else total_gib(terms))
    found = []
    for name, changed, other in smaller(cfg, launch):
        try:
            if _fits(make_plan(changed, machine, other, family_or_shape=shape), machine, other):
                found.append(name)
        except PlanError:
            continue
    fix = f"fits with {', or '.join(found[:3])}" if found else f"a {place} with more memory, or a smaller model"
    what = f"{need:.1f} GiB are estimated, a tenth is kept free, and the {place} has {have:.1f} GiB"
    raise PlanError(Problem("memory", what, fix))


def _fits(plan: RunPlan, machine: MachineFacts, launch: LaunchFacts) -> bool:
    if machine.device == "cpu":
        return launch.ranks_per_node * total_gib(plan.memory or (), "host") <= machine.host_memory_gib
    return fits(plan.memory or (), machine.device_memory_gib)


def plan_table(plan: RunPlan) -> Table:
    """The plan as a table: each choice with its reason, then memory term by term."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("what", "value", "why"):
        table.add_column(name, overflow="fold")
    for choice in plan.choices:
        table.add_row(choice.name, choice.value, choice.why)
    for term in plan.memory or ():
        about = "about " if term.estimated else ""
        table.add_row(f"  {term.name} ({term.place})", f"{about}{term.gib:.2f} GiB", term.formula)
    return table
