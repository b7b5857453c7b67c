"""What only several ranks can tell: whether their clocks agree, and whether they see one file system."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from phi3_dist.errors import MachineError, Problem
from phi3_dist.machine.findings import Finding
from phi3_dist.machine.free_room import nearest_folder
from phi3_dist.machine.nodes import NodeView, clock_findings
from phi3_dist.machine.process_group import Ranks

__all__ = ["node_view", "seen_from_all_nodes", "shared_folder_findings"]

_SEEN_WITHIN_S = 3.0
"""A network file system may remember for a moment that a file is not there."""


def node_view(path: Path, node: int) -> NodeView:
    """Taken right after a barrier: all ranks take it at one time."""
    now = time.time()
    return NodeView(node, socket.gethostname(), now, os.path.lexists(path) or _seen(path))


def _seen(path: Path) -> bool:
    """Whether the path comes to be seen within a moment."""
    until = time.monotonic() + _SEEN_WITHIN_S
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if path in path.parent.iterdir():  # asks the server, where a look at the name may not
                return True
        time.sleep(0.2)
    return False


def seen_from_all_nodes(views: Sequence[NodeView], folder: Path) -> Iterator[Finding]:
    """Clock and run folder, of every node beside rank 0's."""
    yield from clock_findings(views)
    blind = sorted({view.host for view in views if not view.sees})
    if blind:
        yield _blind(folder, blind, "warn")


def _blind(folder: Path, hosts: Sequence[str], level: str) -> Finding:
    what = f"{folder}, as rank 0 sees it, is not seen on {', '.join(hosts)}"
    fix = "put save.folder on a file system that all nodes share: --resume reads checkpoints on every node"
    return Finding("bad" if level == "bad" else "warn", what, fix, "shared folder", 8)


def shared_folder_findings(ranks: Ranks, folder: Path) -> list[Finding]:
    """Rank 0 writes a file above the run folder, and every node looks for it; it is gone afterwards. Collective.

    Nothing is written inside of the run folder. On one node nothing is written at all.
    """
    if ranks.nodes == 1:
        return []
    above = nearest_folder(folder.absolute().parent)
    probe = above / f".phi3-dist-seen-{uuid.uuid4().hex[:12]}"
    wrong: MachineError | None = None
    if ranks.rank == 0:
        try:
            probe.touch()
        except OSError as error:
            wrong = MachineError(Problem(str(above), f"cannot be written: {error.strerror}", "another save.folder"))
    name, failed = ranks.gather((probe, wrong is not None))[0]
    views: list[NodeView] = ranks.gather(node_view(name, ranks.node)) if not failed else []
    if ranks.rank == 0:
        probe.unlink(missing_ok=True)
    if wrong is not None:
        return [Finding("bad", str(wrong), "", "shared folder", wrong.exit_code)]
    blind = sorted({view.host for view in views if not view.sees})
    if blind:
        return [_blind(above, blind, "bad")]
    return [Finding("ok", f"{above} is seen from all {ranks.nodes} nodes", check="shared folder")] if views else []
