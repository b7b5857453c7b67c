"""Free memory and disk against the plan: what is taken by others is not there for this run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import MachineError, Problem
from phi3_dist.family.variants import Shape
from phi3_dist.machine.findings import Finding
from phi3_dist.machine.free_room import free_device_gib, free_disk_bytes, free_host_gib, refuse_dead_meeting
from phi3_dist.planning.facts import LaunchFacts
from phi3_dist.planning.memory import total_gib
from phi3_dist.planning.plan import RunPlan
from phi3_dist.planning.workload import adapter_counts

__all__ = ["Room", "checkpoint_bytes", "disk_findings", "memory_findings", "refuse_no_room"]

GIB = 2**30
_SMALL_BYTES = 2**21
"""Of what lies beside the tensors: metrics, logs, trainer.json, the page."""


@dataclass(frozen=True)
class Room:
    """GiB that are free. `device_gib` is None on a CPU."""

    device_gib: float | None
    host_gib: float

    @classmethod
    def of(cls, plan: RunPlan, local_rank: int) -> Room:
        device = free_device_gib(local_rank) if plan.device == "cuda" else None
        return cls(device, free_host_gib())


def memory_findings(plan: RunPlan, launch: LaunchFacts, room: Room) -> Iterator[Finding]:
    """What is free on this rank's device and host, beside what the plan takes.

    Bad where weights, gradients and optimizer alone are more than a GPU has free, or its host for what is offloaded;
    where activations make it so it is a warning, since they are an estimate. So it is on a CPU, whose base is mapped.
    """
    if plan.memory is None:
        return
    terms, ranks = plan.memory, launch.ranks_per_node
    places = [("host", ranks, room.host_gib)]
    if room.device_gib is not None:
        places.insert(0, ("device", 1, room.device_gib))
    for place, times, free in places:
        certain = times * total_gib((one for one in terms if not one.estimated), place)
        whole = times * total_gib(terms, place)
        if not whole:
            continue
        of = f" of {ranks} ranks" if place == "host" and ranks > 1 else ""
        what = f"{free:.1f} GiB of the {place} are free, and the run{of} is planned with {whole:.2f} GiB"
        fix = "end what else runs there (nvidia-smi names it)" if place == "device" else "end what else runs there"
        if certain > free and plan.device != "cpu":
            yield Finding("bad", f"{what}, {certain:.1f} of them weights and optimizer", fix, f"{place} memory", 8)
        elif whole > free:
            yield Finding("warn", f"{what}: an estimate", fix, f"{place} memory")
        else:
            yield Finding("ok", what, check=f"{place} memory")


def checkpoint_bytes(cfg: RunConfig, shape: Shape) -> tuple[int, int]:
    """(adapter, one checkpoint): weights in float32, and moments in float32 or a byte each."""
    trainable, frozen = adapter_counts(cfg, shape)
    moments = 2 if "8bit" in cfg.optim.name else 8
    return 4 * (trainable + frozen), trainable * (4 + moments) + 4 * frozen


def disk_findings(cfg: RunConfig, shape: Shape, steps: int | None, free: int | None) -> Iterator[Finding]:
    """Room for the adapter and for the checkpoints that are there at once.

    Those of `save.keep`, the best and the one that a resumed run began from, and the one being written.
    """
    if free is None:
        return
    adapter, one = checkpoint_bytes(cfg, shape)
    kept = cfg.save.keep + 3 if cfg.save.every else 0
    if kept and steps is not None:
        kept = min(kept, -(-steps // cfg.save.every))
    needed = adapter + kept * one + _SMALL_BYTES
    counted = f"{kept} checkpoint{'s' * (kept != 1)}"
    what = f"{_size(free)} are free for {cfg.save.folder}; the adapter and {counted} take {_size(needed)}"
    if needed > free:
        fix = "make room there, save.folder on another disk, or a smaller save.keep"
        yield Finding("bad", what, fix, "disk", 8)
    else:
        yield Finding("ok", what, check="disk")


def _size(count: int) -> str:
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / 2**20:,.1f} MiB"


def refuse_no_room(
    cfg: RunConfig, plan: RunPlan, launch: LaunchFacts, environ: Mapping[str, str], shape: Shape, *, local_rank: int
) -> list[str]:
    """Raises MachineError for memory that is certainly not there, or a place of meeting that is dead.

    Returns what rank 0 should say and go on: a disk too small may be made larger in time.
    """
    refuse_dead_meeting(environ)
    bad: list[Finding] = []
    for wait_s in (0.0, 1.0, 2.0, 4.0):  # the run before may still be going
        time.sleep(wait_s)
        bad = [one for one in memory_findings(plan, launch, Room.of(plan, local_rank)) if one.level == "bad"]
        if not bad:
            break
    if bad:
        raise MachineError(*(Problem(one.check, one.what, one.fix) for one in bad))
    if launch.rank:
        return []
    disk = disk_findings(cfg, shape, cfg.train.max_steps, free_disk_bytes(Path(cfg.save.folder)))
    return [f"disk: {one.what}; {one.fix}" for one in disk if one.level == "bad"]
