"""What is wrong with this machine, each finding with its fix. Nothing is imported that could fail or be slow but torch.

`phi3-dist doctor` prints the findings (doctor_on_ranks.py: of every rank of a launch); the runtime asks
`stale_extension_locks` before it starts DeepSpeed.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from phi3_dist.errors import MachineError, PlanError, redacted
from phi3_dist.machine import launch_request
from phi3_dist.machine.findings import Finding, named, of_error
from phi3_dist.machine.own_cards import own_cards
from phi3_dist.machine.probe import launch_facts, package_versions, probe
from phi3_dist.machine.storage import CACHE_FIX, cache_folder, shared_memory_bytes
from phi3_dist.planning.attention_choice import backends, choose_backend
from phi3_dist.planning.facts import MachineFacts

__all__ = ["diagnose", "extensions_root", "stale_extension_locks"]

COMPILERS = ("ninja", "nvcc", "cicc", "ptxas", "c++", "g++", "gcc", "cc1plus", "clang", "clang++", "as", "ld")
_ROOMY_SHM_BYTES = 2**29
"""Docker's default is an eighth of it."""
_YOUNG_S = 60.0
"""A lock younger than this may belong to a build whose ninja hasn't started yet."""


def diagnose() -> list[Finding]:
    """Everything there is to say about this machine, in the order a reader needs it."""
    found = [*named("python", _python()), *named("launch", _launch(os.environ))]
    try:
        machine = probe()
    except (ImportError, OSError) as error:  # absent, or without a library that it was built for
        fix = "pip install torch, in the build for this machine's driver"
        found += named("packages", _packages(package_versions()))
        return [*found, Finding("bad", f"torch cannot be imported: {error}", fix, "torch", MachineError.exit_code)]
    checks: tuple[tuple[str, Iterator[Finding]], ...] = (
        ("packages", _packages(machine.packages)),
        ("device", _device(machine)),
        ("attention", _flash(machine)),
        ("deepspeed", _deepspeed(machine)),
        ("locks", _locks()),
        ("cache", _cache()),
        ("shared memory", _shared_memory(machine)),
        ("tokenizer", _tokenizer(machine.packages)),
        ("hub", _hub(os.environ)),
    )
    found += [one for check, findings in checks for one in named(check, findings)]
    return [replace(one, code=MachineError.exit_code) if one.level == "bad" and one.code == 1 else one for one in found]


def _python() -> Iterator[Finding]:
    yield Finding("ok", f"Python {sys.version.split()[0]} at {sys.executable}")


def _launch(environ: Mapping[str, str]) -> Iterator[Finding]:
    """What a launcher set, or left behind."""
    try:
        launch = launch_facts(environ)
    except PlanError as error:
        yield from of_error("launch", error)
        return
    nodes = f"{launch.nodes} node{'s' * (launch.nodes > 1)}"
    ranks = "one process" if launch.world_size == 1 else f"{launch.world_size} ranks on {nodes}"
    yield Finding("ok", f"{ranks}; nothing is left of another launch")


def _packages(versions: Mapping[str, str]) -> Iterator[Finding]:
    """Each required distribution against the range in this package's own metadata."""
    for line in _wanted():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding("bad", f"{requirement.name} is not installed", f"pip install '{requirement}'")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            what = f"{requirement.name} {version}; {requirement.specifier} is needed"
            yield Finding("bad", what, f"pip install '{requirement.name}{requirement.specifier}'")
    main = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield Finding("ok", main)
    if "bitsandbytes" not in versions:
        fix = "pip install 'phi3-dist[qlora]'"
        yield Finding("warn", "bitsandbytes is not installed: no nf4, int8 or paged optimizer", fix)


def _wanted() -> list[str]:
    """The distributions that this package requires; of a checkout on the path, from its pyproject.toml.

    A folder that was copied without that file has no list; what is missing then is told by the import that needs it.
    """
    try:
        return metadata.requires("phi3-dist") or []
    except metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    try:
        return list(tomllib.loads(project.read_text("utf-8"))["project"]["dependencies"])
    except (OSError, KeyError, ValueError):
        return []


def _device(machine: MachineFacts) -> Iterator[Finding]:
    cores = f"{machine.cpu_count} CPUs, {machine.host_memory_gib:.1f} GiB host memory"
    if machine.device == "cuda":
        many, each = machine.devices_per_node, machine.device_memory_gib
        yield Finding("ok", f"{many} × {machine.device_name}, {each:.1f} GiB each; {cores}")
    else:
        yield Finding("warn", f"no CUDA device; training runs on {machine.device_name} ({cores})")
        cards = () if launch_request.cpu_was_asked(os.environ) else own_cards()
        if cards:
            what = f"the driver lists {len(cards)} × {cards[0][0]}, and torch {machine.packages.get('torch')} sees none"
            fix = "pip install torch in its build with CUDA, no newer than the driver; unset CUDA_VISIBLE_DEVICES"
            yield Finding("warn", what, fix)
    level: Literal["ok", "warn"] = "ok" if machine.fast_bf16 else "warn"
    yield Finding(level, f"precision auto is {'bf16' if machine.fast_bf16 else 'fp32'}: {machine.fast_bf16_reason}")


def _flash(machine: MachineFacts) -> Iterator[Finding]:
    """What `attention: auto` would be for Phi-3-mini, whose head size is 96."""
    dtype = "bf16" if machine.fast_bf16 else "fp32"
    found = backends(machine.device, 96, dtype, None, machine.packages, capability=machine.capability)
    chosen = choose_backend("auto", found)
    slower = machine.device == "cuda" and machine.fast_bf16 and chosen.name == "sdpa"
    fix = next(one.fix for one in found if one.name == "flash_attention_2") if slower else ""
    yield Finding("warn" if slower else "ok", f"attention auto is {chosen.name}: {chosen.reason}", fix)


def _deepspeed(machine: MachineFacts) -> Iterator[Finding]:
    """DeepSpeed compiles operators when first used: its CPU communication on a CPU, its CPU Adam with offload."""
    if "deepspeed" not in machine.packages:
        fix = "pip install 'phi3-dist[deepspeed]'"
        yield Finding("warn", "deepspeed is not installed: zero1, zero2 and zero3 can't run", fix)
        return
    tools = {
        "g++": (shutil.which("g++") or shutil.which("c++"), "apt install g++"),
        "ninja": (shutil.which("ninja") or _beside_python("ninja"), "pip install ninja"),
        "Python's headers (Python.h)": (_python_header(), "apt install python3-dev"),
    }
    missing = [name for name, (found, _) in tools.items() if not found]
    level: Literal["warn", "bad"] = "bad" if machine.device == "cpu" else "warn"
    for name in missing:
        yield Finding(level, f"{name} is missing, and DeepSpeed compiles operators with it", tools[name][1])
    if not missing:
        version = machine.packages["deepspeed"]
        yield Finding(
            "ok", f"deepspeed {version} can compile its operators (g++, ninja, Python.h); minutes the first time"
        )


def _beside_python(name: str) -> str | None:
    program = Path(sys.executable).with_name(name)
    return str(program) if program.is_file() else None


def _python_header() -> str | None:
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return str(header) if header.is_file() else None


def extensions_root(environ: Mapping[str, str]) -> Path:
    """Where torch keeps compiled extensions: `TORCH_EXTENSIONS_DIR`, else the user's cache (torch 2.13, read)."""
    named = environ.get("TORCH_EXTENSIONS_DIR") or f"{environ.get('XDG_CACHE_HOME') or '~/.cache'}/torch_extensions"
    try:
        return Path(named).expanduser()
    except RuntimeError:  # no home folder: torch leaves the ~ as it is
        return Path(named)


def stale_extension_locks(root: Path | None = None, *, now: float | None = None) -> list[Path]:
    """`lock` files in the extension cache that no build holds; a run that meets one waits for ever, silently.

    A lock is stale when it is older than a minute and no ninja or compiler works in or below its folder. `now` is in
    seconds since the epoch.
    """
    root = extensions_root(os.environ) if root is None else root
    now = time.time() if now is None else now
    locks = []
    for pattern in ("*/lock", "*/*/lock"):
        for lock in root.glob(pattern):
            try:
                if lock.is_file() and now - lock.stat().st_mtime >= _YOUNG_S:
                    locks.append(lock)
            except OSError:  # its build has just finished
                continue
    if not locks:
        return []
    busy = _build_folders()
    return sorted(lock for lock in locks if not any(_within(folder, lock.parent) for folder in busy))


def _build_folders() -> list[Path]:
    """Working folders of the live ninjas and compilers, of those whose folder this user may read."""
    folders = []
    for process in psutil.process_iter():
        try:
            if process.name() in COMPILERS and process.status() != psutil.STATUS_ZOMBIE:
                folders.append(Path(process.cwd()))
        except (psutil.Error, OSError):
            continue
    return folders


def _within(folder: Path, parent: Path) -> bool:
    return folder.resolve().is_relative_to(parent.resolve())


def _locks() -> Iterator[Finding]:
    stale = stale_extension_locks()
    for lock in stale:
        what = f"a lock that no build holds, and every DeepSpeed run would wait for it: {lock}"
        yield Finding("bad", what, f"rm '{lock}'")
    if not stale:
        yield Finding("ok", f"no stale lock in {extensions_root(os.environ)}")


def _cache() -> Iterator[Finding]:
    """Whether tokens and hashes can be kept. The folder is made by the first run: what counts is the nearest above."""
    try:
        folder = cache_folder()
    except MachineError as error:
        yield Finding("bad", error.problems[0].what, error.problems[0].fix)
        return
    try:
        above = next(path for path in (folder, *folder.parents) if path.exists())
        writable = above.is_dir() and os.access(above, os.W_OK | os.X_OK)
    except OSError:  # a folder above that may not be looked into
        writable = False
    if writable:
        yield Finding("ok", f"tokens and hashes are kept in {folder}")
    else:
        yield Finding("bad", f"{folder} may not be written by this user: prepared data can't be kept", CACHE_FIX)


def _shared_memory(machine: MachineFacts) -> Iterator[Finding]:
    size = shared_memory_bytes()
    if size is None or size >= _ROOMY_SHM_BYTES:
        return
    who = "NCCL" if machine.device == "cuda" else "DeepSpeed"
    what = f"/dev/shm has {size / 2**20:.0f} MiB, which is little for {who}'s ranks of one node"
    yield Finding("warn", what, "start the container with --shm-size=1g or --ipc=host")


def _tokenizer(versions: Mapping[str, str]) -> Iterator[Finding]:
    version = versions.get("transformers", "0")
    if int(version.split(".")[0]) >= 5:
        what = (
            f"AutoTokenizer of transformers {version} tokenizes Phi-3's published files wrongly "
            "(the word after each special token); this toolkit loads them itself"
        )
        yield Finding("ok", what, "in your own code use `from phi3_dist import load_tokenizer`")


def _hub(environ: Mapping[str, str]) -> Iterator[Finding]:
    """The variables that decide where models come from. A token is named, never shown."""
    offline = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE") if environ.get(name)]
    on = [name for name in offline if environ[name].lower() in ("1", "true", "yes", "on")]
    if on:
        yield Finding("warn", f"{', '.join(on)} is set: models come from local folders and the cache only", "")
    if environ.get("HF_ENDPOINT"):
        yield Finding("ok", f"models come from the mirror HF_ENDPOINT={redacted(environ['HF_ENDPOINT'])}")
    if not on:
        token = "is set" if environ.get("HF_TOKEN") else "is not set; gated models need it"
        yield Finding("ok", f"HF_TOKEN {token}")
    if environ.get("ACCELERATE_USE_CPU"):
        what = f"ACCELERATE_USE_CPU={environ['ACCELERATE_USE_CPU']}: no GPU is used, and DeepSpeed is refused"
        yield Finding("warn", what, "unset it, unless that is meant")
