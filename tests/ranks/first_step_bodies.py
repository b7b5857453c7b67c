"""What each rank does in test_first_step_ranks.py: whole runs of the debug file, started from inside."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from phi3_dist.config.load import load_run
from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import PlanError
from phi3_dist.machine.probe import probe
from phi3_dist.planning.auto_fields import AUTO
from phi3_dist.planning.facts import LaunchFacts
from phi3_dist.planning.launch_configs import deepspeed_json
from phi3_dist.training import build, whole_run
from tests.ranks.launcher import REPO

PART = "layers.1.mlp.down_proj"


def _cfg(folder: str, *overrides: str) -> RunConfig:
    words = [f"data.train={REPO / 'configs/run/debug_chats.jsonl'}", "train.max_steps=1", f"save.folder={folder}"]
    words += ["log.trackers=[]", "train.micro_batch=1", f"data.cache={folder}-cache", "save.every=1", *overrides]
    return load_run(REPO / "configs/run/debug.yaml", words)


def _launch(strategy: str) -> LaunchFacts:
    zero = json.loads(deepspeed_json(strategy)) if strategy.startswith("zero") else {}
    return LaunchFacts(2, 1, strategy, zero_settings=zero, use_cpu=True, rank=int(os.environ["RANK"]))


def detached(strategy: str, folder: str) -> list[str]:
    """A run in which the loss does not reach one LoRA module: the places that are refused."""

    def without_one(model: Any, *args: Any, **kwargs: Any) -> Any:
        report = install(model, *args, **kwargs)
        layer = next(module for name, module in model.named_modules() if name.endswith(PART))
        layer.forward = partial(nn.Module.__call__, layer.base_layer)  # the call, at which ZeRO-3 gathers weights
        return report

    install = build.install_fused
    build.install_fused = without_one
    try:
        whole_run.train(_cfg(folder), probe(use_cpu=True), _launch(strategy))
    except PlanError as error:
        return [f"{p.where}: {p.what}" for p in error.problems]
    return []


def auto(strategy: str, folder: str) -> list[Any]:
    """Fields on `auto` on two hosts, of which the second is small: what the run has, and how many steps it made."""
    rank = int(os.environ["RANK"])
    machine = replace(probe(use_cpu=True), host_memory_gib=64.0 if rank == 0 else 0.01)
    cfg = _cfg(folder, *(f"{path}=auto" for path in AUTO), "train.global_batch=8", "model.precision=fp32")
    result = whole_run.train(cfg, machine, _launch(strategy))
    ours = load_run(Path(folder) / "config.yaml")
    return [ours.data.pack_length, ours.model.activation_checkpointing, ours.train.micro_batch, result.steps]
