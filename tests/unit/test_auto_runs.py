"""`auto` fields in whole runs: settled at the start, written down, and kept by a resume on another machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import yaml

from phi3_dist.config.load import load_run
from phi3_dist.config.schema import RunConfig
from phi3_dist.machine.probe import launch_facts, probe
from phi3_dist.planning.auto_fields import AUTO
from phi3_dist.planning.facts import MachineFacts
from phi3_dist.training import whole_run
from phi3_dist.training.auto_values import kept_values

REPO = Path(__file__).parents[2]
PACK, AGAIN, MICRO = AUTO


def _auto(folder: Path, *overrides: str) -> RunConfig:
    words = [f"data.train={REPO / 'configs/run/debug_chats.jsonl'}", "model.precision=fp32", f"save.folder={folder}"]
    words += ["log.trackers=[]", *(f"{path}=auto" for path in AUTO), "train.global_batch=8", "save.every=1", *overrides]
    return load_run(REPO / "configs/run/debug.yaml", words)


def _train(folder: Path, *overrides: str, host_gib: float, resume: bool = False) -> RunConfig:
    machine: MachineFacts = replace(probe(use_cpu=True), host_memory_gib=host_gib)
    cache = folder.parent / "cache"
    whole_run.train(_auto(folder, *overrides), machine, launch_facts({}), cache=cache, resume=resume)
    return load_run(folder / "config.yaml")


def test_a_run_writes_its_values_down_and_a_resume_keeps_them(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ours = _train(folder, "train.max_steps=1", host_gib=64.0)
    assert (ours.data.pack_length, ours.model.activation_checkpointing, ours.train.micro_batch) == (1024, False, 8)
    plan = json.loads((folder / "plan.json").read_text())
    assert [choice["name"] for choice in plan["choices"][:3]] == list(AUTO)
    assert (plan["micro_batch"], plan["accumulation"]) == (8, 1)
    assert kept_values(folder, _auto(folder)) == {PACK: 1024, AGAIN: False, MICRO: 8}
    again = _train(folder, "train.max_steps=2", host_gib=0.05, resume=True)
    assert again.train.micro_batch == 8
    assert again.data == ours.data
    small = _train(tmp_path / "small", "train.max_steps=1", host_gib=0.01)
    assert (small.model.activation_checkpointing, small.train.micro_batch) == (True, 1)
    values = yaml.safe_load((tmp_path / "small" / "config.yaml").read_text())
    assert values["model"]["activation_checkpointing"] is True
