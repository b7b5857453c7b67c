"""`train --dry-run` on one rank: base, tokenizer, first rows, plan and room. No weights are loaded, nothing is written.

Rows are read up to `SAMPLE_ROWS`; the rows behind them are for `phi3-dist prepare`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_dist.config.schema import RunConfig
from phi3_dist.data.prepare import Prepared, prepare
from phi3_dist.data.read.sources import located
from phi3_dist.data.render.template_probe import ChatFormat
from phi3_dist.errors import Phi3DistError, Problem, RunFolderError
from phi3_dist.family.variants import Shape
from phi3_dist.machine.findings import Finding, of_error, tried
from phi3_dist.machine.free_room import free_disk_bytes, locked_by, refuse_dead_meeting
from phi3_dist.machine.incomplete_launch import whole_number
from phi3_dist.machine.probe import launch_facts, probe
from phi3_dist.modeling.base import Base
from phi3_dist.planning.facts import LaunchFacts, MachineFacts
from phi3_dist.planning.plan import RunPlan, make_plan
from phi3_dist.planning.preview import shape_of_source
from phi3_dist.training.inputs import find_model
from phi3_dist.training.preflight.context_window import context_finding
from phi3_dist.training.preflight.hub import hub_findings, hub_ids, missing_ids
from phi3_dist.training.preflight.launcher_settings import not_read, refuse_contradictions
from phi3_dist.training.preflight.memory_and_disk import Room, disk_findings, memory_findings
from phi3_dist.training.preflight.trackers_and_inputs import check_folder, check_modules, check_trackers, inputs_of
from phi3_dist.training.run_folder_contents import LOCK

__all__ = ["Looked", "look"]

SAMPLE_ROWS = 256


@dataclass(frozen=True)
class Looked:
    """What one rank found. `launch` is None where the environment is not a launch: the ranks can't meet."""

    findings: tuple[Finding, ...]
    launch: LaunchFacts | None
    device: str


def look(cfg: RunConfig, *, overwrite: bool, resume: bool) -> Looked:
    """Every check that one rank can make by itself, in the order of a start."""
    environ = os.environ
    found: list[Finding] = []
    launch = _launch(found)
    first = environ.get("RANK", "0") == "0"
    if launch is not None:
        found += tried("port", lambda: _meeting(launch))
    found += tried("trackers", lambda: _trackers(cfg, 0 if first else 1))
    if first:
        found += tried("run folder", lambda: _folder(cfg, overwrite=overwrite, resume=resume))
    machine = probe()
    launched = launch or LaunchFacts()
    if first:
        found += hub_findings(cfg, environ)
    # what is not here would be downloaded
    here = not {cfg.model.source, cfg.model.tokenizer} & {*missing_ids(cfg)}
    model = _model(cfg, found) if here else None
    plan = _plan(cfg, machine, launched, model, found)
    if plan is not None:
        found += [Finding("warn", line, check="launcher") for line in not_read(cfg, environ, plan)]
        room = Room.of(plan, whole_number(environ, "LOCAL_RANK", 0))
        found += memory_findings(plan, launched, room)
    found += tried("rows", lambda: _sources(cfg))
    if model is not None:
        base, tokenizer, _ = model
        if first:
            found += disk_findings(
                cfg,
                Shape.of(base.config.to_dict()),
                cfg.train.max_steps,
                free_disk_bytes(Path(cfg.save.folder)),
            )
        found += tried("template", lambda: _template(tokenizer, base))
        found += _rows(cfg, base, tokenizer)
    return Looked(tuple(found), launch, machine.device)


def _launch(found: list[Finding]) -> LaunchFacts | None:
    try:
        launch = launch_facts(os.environ)
        refuse_contradictions(os.environ, launch)
    except Phi3DistError as error:
        found += of_error("launch", error)
        return None
    many = f"{launch.world_size} ranks on {launch.nodes} nodes" if launch.nodes > 1 else f"{launch.world_size} ranks"
    what = "one process" if launch.world_size == 1 else f"{many}, {launch.strategy}"
    found.append(Finding("ok", what, check="launch"))
    return launch


def _meeting(launch: LaunchFacts) -> str:
    refuse_dead_meeting(os.environ)
    if launch.world_size == 1:
        return "none is needed"
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} answers or is free"


def _trackers(cfg: RunConfig, rank: int) -> str:
    check_trackers(cfg.log, rank)
    return ", ".join(cfg.log.trackers) or "none"


def _folder(cfg: RunConfig, *, overwrite: bool, resume: bool) -> str:
    check_folder(cfg, overwrite=overwrite, resume=resume)
    process = next(filter(None, map(locked_by, (Path(cfg.save.folder), Path(cfg.save.folder) / LOCK))), None)
    if process is not None:
        what, fix = f"process {process} trains in here", "stop it first, or another save.folder"
        raise RunFolderError(Problem(cfg.save.folder, what, fix))
    there = Path(cfg.save.folder).is_dir()
    verb = "is continued" if resume and there else "is replaced" if overwrite and there else "can be made"
    return f"{cfg.save.folder}: {verb}"


def _sources(cfg: RunConfig) -> str:
    sources = located(cfg.data)
    held_out = f", {len(sources.held_out)} held out" if sources.held_out else ""
    return f"{len(sources.train)} source{'s' * (len(sources.train) != 1)} to train on{held_out}"


def _model(cfg: RunConfig, found: list[Finding]) -> tuple[Base, Any, list[int]] | None:
    try:
        check_modules(cfg.lora)
        model = find_model(cfg)
    except Phi3DistError as error:
        found += of_error("model", error)
        return None
    targets = cfg.lora.targets if isinstance(cfg.lora.targets, str) else ", ".join(cfg.lora.targets)
    layers = f"{model[0].config.num_hidden_layers} layers"
    found.append(Finding("ok", f"{cfg.model.source}: {layers}; targets {targets} are there", check="model"))
    return model


def _plan(
    cfg: RunConfig,
    machine: MachineFacts,
    launch: LaunchFacts,
    model: tuple[Base, Any, list[int]] | None,
    found: list[Finding],
) -> RunPlan | None:
    try:
        shape = shape_of_source(cfg) if model is None else model[0].config.to_dict()
        plan = make_plan(cfg, machine, launch, family_or_shape=shape)
    except Phi3DistError as error:
        found += of_error("plan", error)
        return None
    ranks = f"{plan.world_size} rank{'s' * (plan.world_size != 1)}"
    batch = f"global batch {plan.global_batch} = {ranks} × {plan.micro_batch} × {plan.accumulation}"
    what = f"{plan.strategy} in {plan.precision} on {plan.device}, attention {plan.attention}; {batch} packs"
    found.append(Finding("ok", what, check="plan"))
    return plan


def _template(tokenizer: Any, base: Base) -> str:
    ChatFormat.of(tokenizer)
    return f"renders and is masked; {len(tokenizer):,} tokens in {int(base.config.vocab_size):,} rows of the base"


def _rows(cfg: RunConfig, base: Base, tokenizer: Any) -> Iterator[Finding]:
    """Supervised tokens of the first packs, and their longest row against the model's window."""
    remote = [name for name in hub_ids(cfg) if name in inputs_of(cfg)[1:] and name != cfg.model.tokenizer]
    if remote:
        yield Finding("warn", f"{', '.join(remote)}: a hub's rows are not read here", check="supervised tokens")
        return
    most = min(cfg.data.max_rows or SAMPLE_ROWS, SAMPLE_ROWS)
    sample: dict[str, Any] = {"validation": None, "validation_share": 0.0, "max_rows": most}
    if str(cfg.data.pack_length) == "auto":
        sample["pack_length"] = int(base.config.max_position_embeddings)
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update=sample)})
    try:
        prepared = prepare(cfg.data, tokenizer, None)
    except Phi3DistError as error:
        yield from of_error("supervised tokens", error)
        return
    yield _supervised(cfg, prepared)
    yield context_finding(cfg, base.config, int(prepared.train.rows.lengths.max()))


def _supervised(cfg: RunConfig, prepared: Prepared) -> Finding:
    packs = prepared.train
    first = [int(count) for count in packs.targets[: max(cfg.train.global_batch, 8)]]
    rows = packs.rows
    total = int(rows.lengths.sum())
    what = f"{sum(first):,} in the first {len(first)} packs; {len(rows):,} rows of {total:,} tokens were looked at"
    if not sum(first):
        fix = "every row needs an assistant turn; phi3-dist data show prints what is learned"
        return Finding("bad", what, fix, "supervised tokens", 3)
    if 0 in first:
        fix = "phi3-dist data show prints what is learned"
        return Finding("warn", f"{what}, and {first.count(0)} packs learn nothing", fix, "supervised tokens")
    return Finding("ok", what, check="supervised tokens")
