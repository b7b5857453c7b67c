"""What a launch may not be: ranks that did not come up, and a DeepSpeed file that says what the run file decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi3_dist.errors import Problem
from phi3_dist.planning.facts import LaunchFacts, MachineFacts

__all__ = ["CPU_LAUNCH", "launch_problems", "zero_file_problems"]

CPU_LAUNCH = "configs/accelerate/cpu_2.yaml (distributed_type: MULTI_GPU with use_cpu: true)"
_ZERO_FILE_AUTO = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
_ZERO_UNPROVEN = {
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_hpz_partition_size": 1,
}
"""Settings of ZeRO++, as they are where they do nothing."""


def launch_problems(machine: MachineFacts, launch: LaunchFacts) -> list[Problem]:
    problems = []
    if launch.asked_world_size is not None and launch.asked_world_size != launch.world_size:
        what = (
            f"{launch.asked_world_size} processes were asked for by {launch.asked_by}, "
            f"but this process is one of {launch.world_size}"
        )
        if machine.device == "cpu":
            fix = f"use {CPU_LAUNCH}; `--cpu` and MULTI_CPU silently start one process"
        else:
            fix = "use configs/accelerate/ddp.yaml, or pass --multi_gpu to accelerate launch"
        problems.append(Problem("world size", what, fix))
    if launch.world_size % launch.nodes:
        what = f"{launch.world_size} processes do not spread evenly over {launch.nodes} nodes"
        problems.append(Problem("nodes", what, "start the same number of processes on each node"))
    per_node = launch.world_size // launch.nodes
    if machine.device == "cuda" and per_node > machine.devices_per_node:
        what = f"{per_node} processes on a node with {machine.devices_per_node} GPUs"
        problems.append(Problem("world size", what, f"pass --num_processes {machine.devices_per_node * launch.nodes}"))
    return problems


def zero_file_problems(launch: LaunchFacts) -> list[Problem]:
    """Facts that stand in the run file and may not stand in the DeepSpeed file too."""
    settings = launch.zero_settings
    fix = 'write "auto", or leave it out: the run file says it, and it is filled in'
    problems = [
        Problem(f"DeepSpeed config: {key}", f"is {settings[key]!r}, which the run file decides", fix)
        for key in _ZERO_FILE_AUTO
        if settings.get(key, "auto") != "auto"
    ]
    for key in ("optimizer", "scheduler"):
        if key in settings:
            what = "is in the DeepSpeed file, but the run file sets the optimizer (section `optim`)"
            problems.append(Problem(f"DeepSpeed config: {key}", what, "remove it there"))
    for key in ("bf16", "fp16"):
        section = settings.get(key, {})
        enabled = section.get("enabled", "auto") if isinstance(section, Mapping) else section
        if enabled is True or (key == "bf16" and enabled is False):
            what = f"is {str(enabled).lower()}, which the run file decides (model.precision)"
            problems.append(Problem(f"DeepSpeed config: {key}.enabled", what, fix))
    zero: Mapping[str, Any] = settings.get("zero_optimization") or {}
    for key, harmless in _ZERO_UNPROVEN.items():
        if zero.get(key, harmless) != harmless:
            what = f"is {zero[key]!r}: shards of another kind, which this toolkit neither fills nor gathers"
            problems.append(Problem(f"DeepSpeed config: zero_optimization.{key}", what, "leave it out"))
    return problems
