"""An environment that names a rank or a world, and is not a launch that can be followed: refused in one message.

Left over in a shell or an image, set by a scheduler, or MPI's, whose variables Accelerate reads and torch does not.
"""

from __future__ import annotations

from collections.abc import Mapping

from phi3_dist.errors import PlanError, Problem

__all__ = ["refuse_half_a_launch", "whole_number"]

_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
_HARMLESS: Mapping[str, str] = {"RANK": "0", "WORLD_SIZE": "1"}
"""Values of one process alone, which some images set."""
_OTHER_WORLDS: Mapping[str, str] = {
    "OMPI_COMM_WORLD_SIZE": "mpirun (Open MPI)",
    "PMI_SIZE": "mpirun or srun (PMI)",
    "MV2_COMM_WORLD_SIZE": "mpirun (MVAPICH)",
    "SLURM_STEP_NUM_TASKS": "srun",
}
_FIX = f"unset {' '.join((*_RANK, *_MEETING))}, or start with accelerate launch or torchrun"
_MOST = 10**7
"""Ranks, ports: nothing that is counted here is greater."""


def whole_number(environ: Mapping[str, str], name: str, default: int) -> int:
    """A count out of the environment. Raises PlanError for anything else."""
    text = environ.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(_MOST))):
        what = f"is {text[:60]!r}, not a whole number"
        raise PlanError(Problem(name, what, "unset it, or start with accelerate launch"))
    return int(text)


def refuse_half_a_launch(environ: Mapping[str, str]) -> None:
    """Raise PlanError unless the environment is that of one process alone, or a whole one of a launcher's rank.

    torch (2.13) meets by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; Accelerate (1.15) knows a rank by LOCAL_RANK.
    """
    present = {name: environ[name] for name in _RANK if environ.get(name)}
    if not present or all(_HARMLESS.get(name) == value for name, value in present.items()):
        _refuse_other_worlds(environ)
        return
    missing = [name for name in (*_RANK, *_MEETING) if not environ.get(name)]
    if missing:
        here = " and ".join(f"{name}={value[:20]}" for name, value in present.items())
        what = f"{here}, and {' and '.join(missing)} not: left over from another launch, or half of one"
        raise PlanError(Problem("environment", what, _FIX))
    rank, world = whole_number(environ, "RANK", 0), whole_number(environ, "WORLD_SIZE", 1)
    local, port = whole_number(environ, "LOCAL_RANK", 0), whole_number(environ, "MASTER_PORT", 1)
    if rank >= world or local > rank:
        what = f"is rank {rank} (on its node {local}) of a world of {world}, which cannot be"
        raise PlanError(Problem("environment", what, _FIX))
    if not 0 < port < 2**16:
        raise PlanError(Problem("MASTER_PORT", f"is {port}, and ports end at 65535", _FIX))


def _refuse_other_worlds(environ: Mapping[str, str]) -> None:
    for name, starter in _OTHER_WORLDS.items():
        size = environ.get(name, "")
        if size.isascii() and size.isdecimal() and len(size) <= len(str(_MOST)) and int(size) > 1:
            what = f"is {size}: {starter} has started this process {size} times, and each would train alone"
            fix = "let it start `accelerate launch` or `launch/multinode.sh` once for each node"
            raise PlanError(Problem(name, what, fix))
