"""Nodes beside each other: the one that differs is named, with what it has and what the others have."""

from __future__ import annotations

import locale
import platform
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from phi3_dist.errors import MachineError
from phi3_dist.machine.findings import Finding, Level
from phi3_dist.machine.process_group import Ranks
from phi3_dist.machine.storage import cache_folder
from phi3_dist.planning.facts import MachineFacts
from phi3_dist.version import __version__

__all__ = ["NodeFacts", "NodeView", "clock_findings", "differing", "node_facts"]

SKEW_S = 5.0
"""More than that, and times of files, heartbeats and logs of two nodes can't be compared."""
_FIX_CLOCK = "let the nodes keep time by one server (chronyd, systemd-timesyncd)"
_FIX = "make the nodes equal"
_REFUSED = ("python", "phi3_dist", "package")
"""In these, ranks of one run may not differ: the run would be refused."""


@dataclass(frozen=True)
class NodeView:
    """One rank's node, its time in seconds since the epoch, and whether it sees what rank 0 has written."""

    node: int
    host: str
    time_s: float
    sees: bool = True


@dataclass(frozen=True)
class NodeFacts:
    """What a rank says of its node, as texts to compare."""

    rank: int
    node: int
    host: str
    values: Mapping[str, str]


def node_facts(machine: MachineFacts, ranks: Ranks) -> NodeFacts:
    """Versions, driver, cards, memory, locale and file systems of this rank's node."""
    values = {
        "python": platform.python_version(),
        "phi3_dist": __version__,
        **{f"package {name}": version for name, version in machine.packages.items()},
        "device": machine.device_name,
        "devices": str(machine.devices_per_node),
        "device memory": f"{machine.device_memory_gib:.0f} GiB",
        "host memory": f"{machine.host_memory_gib:.0f} GiB",
        "CPUs": str(machine.cpu_count),
        "driver": _driver(),
        "CUDA of torch": _cuda_of_torch(),
        "locale": f"{locale.setlocale(locale.LC_CTYPE)}, {sys.getfilesystemencoding()}",
        "file system of the present folder": _file_system(Path.cwd()),
        "file system of the cache": _cache_file_system(),
        "time zone": time.strftime("%Z"),
    }
    return NodeFacts(ranks.rank, ranks.node, socket.gethostname(), values)


def _driver() -> str:
    try:
        first = Path("/proc/driver/nvidia/version").read_text("utf-8").splitlines()[0]
    except (OSError, IndexError):
        return "none"
    words = first.split()
    return next((word for word in words if word[:1].isdigit() and "." in word), first)


def _cuda_of_torch() -> str:
    import torch

    return str(torch.version.cuda or "none")


def _cache_file_system() -> str:
    try:
        return _file_system(cache_folder())
    except MachineError:
        return "none"


def _file_system(path: Path) -> str:
    """The kind of file system that holds the path: nfs4, ext4, lustre."""
    try:
        mounts = psutil.disk_partitions(all=True)
    except (OSError, psutil.Error):
        return "not known"
    above = {str(one) for one in (path, *path.parents)}
    holds = [one for one in mounts if one.mountpoint in above]
    return max(holds, key=lambda one: len(one.mountpoint)).fstype if holds else "not known"


def differing(every: Sequence[NodeFacts]) -> Iterator[Finding]:
    """A finding for each value of a node that differs from what most have; of two equal parts, from rank 0's."""
    keys = dict.fromkeys(key for one in every for key in one.values)
    nodes = len({one.node for one in every})
    equal = True
    for key in keys:
        values = [one.values.get(key, "not there") for one in every]
        counts = Counter(values)
        first, most = values[0], max(counts.values())
        usual = first if counts[first] == most else next(value for value in values if counts[value] == most)
        others: dict[tuple[str, str], list[int]] = {}
        for one, value in zip(every, values, strict=True):
            if value != usual:
                others.setdefault((f"node {one.node} ({one.host})", value), []).append(one.rank)
        for (node, value), ranks in others.items():
            equal = False
            level: Level = "bad" if key.startswith(_REFUSED) else "warn"
            who = f"{node}, rank {', '.join(map(str, ranks[:8]))}"
            what = f"{who}: {key} is {value}, and on the others {usual}"
            yield Finding(level, what, _FIX, "nodes", MachineError.exit_code)
    if equal:
        what = f"{len(every)} ranks on {nodes} node{'s' * (nodes > 1)}: the same {len(keys)} facts"
        yield Finding("ok", what, check="nodes")


def clock_findings(views: Sequence[NodeView]) -> Iterator[Finding]:
    """Each node's clock beside that of rank 0's node. The ranks' own delays count too: milliseconds."""
    first = views[0]
    others = {view.node: view for view in reversed(views) if view.node != first.node}
    late = [one for one in others.values() if abs(one.time_s - first.time_s) > SKEW_S]
    for view in sorted(late, key=lambda one: one.node):
        apart = view.time_s - first.time_s
        way = "ahead of" if apart > 0 else "behind"
        what = f"node {view.node} ({view.host}) is {abs(apart):,.0f} s {way} rank 0's ({first.host})"
        yield Finding("warn", what, _FIX_CLOCK, "clocks")
    if not late and others:
        most = max(abs(one.time_s - first.time_s) for one in others.values())
        yield Finding("ok", f"{len(others) + 1} nodes within {most:.2f} s", check="clocks")
