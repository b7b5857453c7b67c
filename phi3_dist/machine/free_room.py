"""What is free now, for this process: memory of its device and host, room on a disk, a port."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

from phi3_dist.errors import MachineError, Problem
from phi3_dist.machine.incomplete_launch import whole_number

__all__ = ["free_device_gib", "free_disk_bytes", "free_host_gib", "locked_by", "nearest_folder", "refuse_dead_meeting"]

GIB = 2**30
_CONNECT_S = 3.0


def free_host_gib() -> float:
    """Memory of the host that can be had without swapping, within the control group's limit."""
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no control group, or one without a limit
        limit = int((group / "memory.max").read_text("ascii"))
        used = int((group / "memory.current").read_text("ascii"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text("ascii").splitlines())
        # file pages are given back when memory is wanted
        free = min(free, limit - used + int(statistics.get("inactive_file", "0")))
    return max(0, free) / GIB


def free_device_gib(local_rank: int) -> float:
    """Free memory of this rank's GPU."""
    import torch

    return float(torch.cuda.mem_get_info(local_rank)[0]) / GIB


def nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest above it that is there."""
    return next((one for one in (path, *path.absolute().parents) if one.is_dir()), Path("/"))


def free_disk_bytes(path: Path) -> int | None:
    """Bytes that this user may still write where `path` is or will be; None where the system doesn't say."""
    try:
        return shutil.disk_usage(nearest_folder(path)).free
    except OSError:
        return None


def locked_by(path: Path) -> int | None:
    """The process of this machine that holds a lock on a file or folder; None where none does, or nobody says.

    The system's own list is read (Linux): asking with a lock would hold one for that moment.
    """
    try:
        found = path.stat()
        lines = Path("/proc/locks").read_text("ascii").splitlines()
    except OSError:
        return None
    here = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    # 1: FLOCK ADVISORY WRITE 4321 08:01:1234 0 EOF
    held = (line.split() for line in lines)
    return next((int(words[4]) for words in held if len(words) > 5 and words[1] == "FLOCK" and words[5] == here), None)


def refuse_dead_meeting(environ: Mapping[str, str]) -> None:
    """Raises MachineError where the ranks could not meet: a port in use, or one that no launcher holds.

    torch's launcher holds MASTER_PORT itself and says so (TORCHELASTIC_USE_AGENT_STORE, torch 2.13); without it rank 0
    takes the port. Ranks would wait there for half an hour.
    """
    if whole_number(environ, "WORLD_SIZE", 1) == 1 or not environ.get("MASTER_ADDR"):
        return
    host, port = environ["MASTER_ADDR"], whole_number(environ, "MASTER_PORT", 1)
    where = f"{host}:{port}"
    if environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true":
        if environ.get("LOCAL_RANK", "0") != "0":  # one of a node asks for all
            return
        try:
            socket.create_connection((host, port), timeout=_CONNECT_S).close()
        except OSError as error:
            what = f"is where the ranks meet, and nobody answers there ({error.strerror or error})"
            fix = "unset what is left of an earlier launch, or open this port between the nodes"
            raise MachineError(Problem(where, what, fix)) from error
    elif environ.get("RANK") == "0":
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("", port))
            except OSError as error:
                what = f"is taken: {os.strerror(error.errno or 0)}"
                raise MachineError(Problem(f"MASTER_PORT={port}", what, "another port, or 0 for a free one")) from error
