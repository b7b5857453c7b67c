"""What the machine is, and what the plan would choose on it."""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch

from phi3_dist.bench.card.checks import Group
from phi3_dist.machine.probe import package_versions, probe
from phi3_dist.planning.attention_choice import backends

__all__ = ["facts"]


def _machine(group: Group) -> dict[str, Any]:
    header = Path(sysconfig.get_path("include"), "Python.h")
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "gcc": shutil.which("gcc"),
        "nvcc": shutil.which("nvcc"),
        "python_h": header.is_file(),
        **package_versions(),
    }
    if group.cpu:
        return found
    card = torch.cuda.get_device_properties(0)
    buffer = torch.empty(256 * 2**20, dtype=torch.float32, device=group.device)
    copy_s = group.milliseconds(buffer.clone) * 1e-3
    return {
        **found,
        "gpu": card.name,
        "capability": [card.major, card.minor],
        "gib": round(card.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
        "copy_tb_per_s": round(2 * buffer.nbytes / copy_s / 1e12, 2),
    }


def _plan(group: Group) -> dict[str, Any]:
    seen = probe(use_cpu=group.cpu)
    found = backends(
        seen.device,
        96,
        "bf16",
        2047,
        seen.packages,
        capability=seen.capability,
        varlen_arguments=seen.varlen_arguments,
    )
    return {
        "device": seen.device_name,
        "no_compiler": seen.no_compiler,
        "attention": [[one.name, one.available, one.reason] for one in found],
        "varlen_arguments": sorted(seen.varlen_arguments or ()),
    }


def facts(group: Group) -> None:
    group.check("machine", lambda: _machine(group))
    group.check("what the plan sees", lambda: _plan(group))
