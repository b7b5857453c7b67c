"""What this machine is and what the launcher set up, as plain values for the plan.

torch is imported inside `probe` alone: reading the launch costs nothing.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from phi3_dist.errors import PlanError, Problem
from phi3_dist.machine import launch_request
from phi3_dist.machine.card_measurements import measured_on
from phi3_dist.machine.incomplete_launch import refuse_half_a_launch, whole_number
from phi3_dist.machine.installed_versions import versions_of
from phi3_dist.machine.launch_request import LaunchRequest
from phi3_dist.machine.launcher import deepspeed_file_beside
from phi3_dist.planning.attention_choice import PACKAGES as ATTENTION_PACKAGES
from phi3_dist.planning.facts import LaunchFacts, MachineFacts
from phi3_dist.planning.launch_configs import SHIPPED

__all__ = ["cpu_count", "launch_facts", "no_compiler", "package_versions", "probe", "varlen_arguments"]

GIB = 1024**3
PACKAGES = (
    *ATTENTION_PACKAGES,
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "deepspeed",
    "bitsandbytes",
    "liger-kernel",
    "triton",
)
"""Distributions whose presence or version decides something."""


def package_versions() -> dict[str, str]:
    """Version of each of `PACKAGES` that is installed."""
    return versions_of(PACKAGES)


def probe(*, use_cpu: bool | None = None) -> MachineFacts:
    """The facts of this node. `use_cpu`: leave a GPU alone; None: as the launcher was asked.

    bf16 is fast on CUDA from compute capability 8 on (where tensor cores have it), and on a CPU with AMX or
    AVX512-BF16; without those it ran at an eighth of fp32's speed and less.
    """
    import torch

    if use_cpu is None:
        use_cpu = launch_request.cpu_was_asked(os.environ)
    host_gib = _host_memory_bytes() / GIB
    if torch.cuda.is_available() and not use_cpu:
        device = torch.cuda.get_device_properties(0)
        fast = device.major >= 8
        tensor_cores = "has bf16 tensor cores" if fast else "has no bf16 tensor cores, which come with 8.0"
        return MachineFacts(
            device="cuda",
            device_name=device.name,
            devices_per_node=torch.cuda.device_count(),
            device_memory_gib=device.total_memory / GIB,
            host_memory_gib=host_gib,
            cpu_count=cpu_count(),
            fast_bf16=fast,
            fast_bf16_reason=f"{device.name} (compute capability {device.major}.{device.minor}) {tensor_cores}",
            packages=package_versions(),
            capability=(device.major, device.minor),
            no_compiler=no_compiler(cuda=True),
            varlen_arguments=varlen_arguments(),
            measured=measured_on(device.name),
        )
    fast, reason = _cpu_bf16()
    return MachineFacts(
        device="cpu",
        device_name=_cpu_name(),
        devices_per_node=1,
        device_memory_gib=host_gib,
        host_memory_gib=host_gib,
        cpu_count=cpu_count(),
        fast_bf16=fast,
        fast_bf16_reason=reason,
        packages=package_versions(),
        no_compiler=no_compiler(cuda=False),
    )


@cache
def varlen_arguments() -> frozenset[str]:
    """The names of the arguments of torch's `varlen_attn`, which grow from release to release; none without it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def no_compiler(*, cuda: bool) -> str:
    """Why torch can compile nothing on this node, or empty: it needs a compiler, Python's headers, Triton on CUDA.

    Sources: `cpp.cxx` in torch/_inductor/config.py (2.13), and `_build` in triton/runtime/build.py.
    """
    asked = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    compilers = [os.environ["CC"]] if cuda and "CC" in os.environ else ["gcc", "clang"] if cuda else [asked]
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not any(map(shutil.which, compilers)):
        return f"there is no compiler ({' or '.join(compilers)})"
    if not header.is_file():
        return f"Python's headers are not here ({header})"
    if cuda and find_spec("triton") is None:
        return "Triton is not installed"
    return ""


def _cpu_bf16() -> tuple[bool, str]:
    """Whether this CPU multiplies bf16 matrices in hardware, and what says so."""
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        has: Mapping[str, Any] = torch.cpu.get_capabilities()
        amx, avx = bool(has.get("amx_bf16")), bool(has.get("avx512_bf16"))
    else:  # torch before 2.13
        amx, avx = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    if amx or avx:
        return True, f"this CPU multiplies bf16 in hardware ({'AMX' if amx else 'AVX512-BF16'})"
    return False, "this CPU has neither AMX nor AVX512-BF16, and bf16 without them is slower than fp32"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "CPU"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def cpu_count() -> int:
    """CPUs this process may use: fewer than the machine has, inside a job or container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _host_memory_bytes() -> int:
    """Memory of the host, or the control group's limit where that is less."""
    total = int(psutil.virtual_memory().total)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total


def launch_facts(environ: Mapping[str, str], *, request: LaunchRequest | None = None) -> LaunchFacts:
    """The launch as `torchrun` and Accelerate's launcher describe it in the environment.

    `request`: what the launcher was asked for; by default it is looked up in the processes above this one.
    Raises `PlanError` for a launch that this toolkit can't follow (FSDP version 1, Megatron, ZeRO stage 0, …).
    Source: `accelerate/utils/launch.py` of accelerate 1.15, which sets every variable read here.
    """
    refuse_half_a_launch(environ)
    world = whole_number(environ, "WORLD_SIZE", 1)
    per_node = max(1, whole_number(environ, "LOCAL_WORLD_SIZE", world))
    nodes = whole_number(environ, "GROUP_WORLD_SIZE", 0) or max(1, world // per_node)
    problems = _foreign(environ)
    strategy, settings = "ddp" if world > 1 else "single", {}
    if _flag(environ, "ACCELERATE_USE_DEEPSPEED"):
        settings = _zero_settings(environ, problems)
        strategy = _zero_strategy(settings, problems)
        if _flag(environ, "ACCELERATE_USE_CPU"):
            what = "is set beside DeepSpeed: Accelerate would silently train plain DDP"
            problems.append(
                Problem("ACCELERATE_USE_CPU", what, "unset it; where there is no GPU, DeepSpeed finds the CPU")
            )
    elif _flag(environ, "ACCELERATE_USE_FSDP"):
        strategy = _fsdp_strategy(environ, problems)
    if problems:
        raise PlanError(*problems)
    request = request or launch_request.launch_request()
    return LaunchFacts(
        world_size=world,
        nodes=nodes,
        strategy=strategy,
        asked_world_size=request.asked_world_size if request else None,
        asked_by=request.asked_by if request else "",
        zero_settings=settings,
        use_cpu=launch_request.cpu_was_asked(environ),
        rank=whole_number(environ, "RANK", 0),
    )


def _flag(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _foreign(environ: Mapping[str, str]) -> list[Problem]:
    fix = "use one of configs/accelerate/"
    rows = f"{fix}; ranks share long rows by train.sequence_parallel in the run file"
    return [
        Problem("Accelerate config", f"asks for {what}, which this toolkit does not do", how)
        for name, what, how in (
            ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM", fix),
            ("ACCELERATE_USE_PARALLELISM_CONFIG", "tensor, context or sequence parallelism (parallelism_config)", rows),
        )
        if _flag(environ, name)
    ]


def _zero_settings(environ: Mapping[str, str], problems: list[Problem]) -> dict[str, Any]:
    """The DeepSpeed JSON as it stands in the file, or the same form built from Accelerate's own fields."""
    file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        try:
            settings = json.loads(_zero_text(file, environ))
        except (OSError, UnicodeDecodeError) as error:
            what = f"cannot be read: {getattr(error, 'strerror', None) or error}"
            problems.append(
                Problem(file, what, "a path counts from this folder, or from the one that holds the Accelerate config")
            )
            return {}
        except json.JSONDecodeError as error:
            problems.append(Problem(f"{file}:{error.lineno}", f"is not JSON: {error.msg}"))
            return {}
        except (ValueError, RecursionError) as error:  # a null character in the path; lists a thousand deep
            problems.append(Problem(repr(file), f"cannot be read: {error}"))
            return {}
        if isinstance(settings, dict) and isinstance(settings.get("zero_optimization"), dict):
            return settings
        problems.append(Problem(file, "has no section zero_optimization", "compare configs/deepspeed/zero3.json"))
        return {}
    zero: dict[str, Any] = {"stage": whole_number(environ, "ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)}
    for key, name in (("offload_optimizer", "OFFLOAD_OPTIMIZER_DEVICE"), ("offload_param", "OFFLOAD_PARAM_DEVICE")):
        device = environ.get(f"ACCELERATE_DEEPSPEED_{name}", "none")
        if device != "none":
            zero[key] = {"device": device}
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 0
    return {"zero_optimization": zero, "zero_allow_untested_optimizer": True}


def _zero_text(file: str, environ: Mapping[str, str]) -> str:
    """The file's text, from where the command runs or beside the Accelerate config. A shipped one is known by its name.

    Accelerate hands on the path as the config has it, and looks for it in the present folder alone.
    """
    path = Path(file)
    if not path.is_file() and not path.is_absolute():
        config = launch_request.config_of_launch(environ)
        beside = None if config is None else deepspeed_file_beside(config)
        path = path if beside is None else beside
    shipped = SHIPPED.get("/".join(path.parts[-3:]))
    return shipped if shipped is not None and not path.is_file() else path.read_text(encoding="utf-8")


def _zero_strategy(settings: Mapping[str, Any], problems: list[Problem]) -> str:
    """The strategy's name for a stage and its offload. A ZeRO-3 with either offload is `zero3_offload`."""
    zero = settings.get("zero_optimization")
    if zero is None:
        return "zero2"  # its problem is noted already
    stage = zero.get("stage", 0)
    offloads = {key: zero.get(f"offload_{key}") for key in ("optimizer", "param")}
    devices = {key: one.get("device", "none") if isinstance(one, dict) else "none" for key, one in offloads.items()}
    where = "DeepSpeed config: zero_optimization"
    if stage not in (1, 2, 3) or isinstance(stage, bool):
        fix = "use stage 1, 2 or 3, or configs/accelerate/ddp.yaml for none"
        problems.append(Problem(f"{where}.stage", f"is {stage!r}", fix))
        return "zero2"
    for key, device in devices.items():
        if device not in ("none", "cpu"):
            what = f"is {device!r}; only host memory is supported"
            problems.append(Problem(f"{where}.offload_{key}.device", what, "use cpu"))
    if devices["param"] != "none" and stage != 3:
        problems.append(Problem(f"{where}.offload_param", f"needs stage 3, and the stage is {stage}", "remove it"))
    offload = any(device != "none" for device in devices.values())
    if stage == 1 and offload:
        problems.append(Problem(where, "offload with stage 1 is not one of the strategies", "use zero2_offload.yaml"))
    return f"zero{stage}" + ("_offload" if offload and stage > 1 else "")


def _fsdp_strategy(environ: Mapping[str, str], problems: list[Problem]) -> str:
    version = environ.get("FSDP_VERSION", "1")
    if version != "2":
        what = f"is {version}: FSDP1 flattens frozen and trained weights together"
        problems.append(Problem("Accelerate config: fsdp_version", what, "use configs/accelerate/fsdp2.yaml"))
    return "fsdp2_offload" if _flag(environ, "FSDP_OFFLOAD_PARAMS") else "fsdp2"
