"""`phi3-dist train RUN.yaml --dry-run`: could this run start? One table on rank 0, whatever each rank found.

It ends before weights are loaded, holds no lock and writes nothing in the run folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phi3_dist.config.load import flatten
from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import Phi3DistError
from phi3_dist.machine.findings import Finding, exit_code, merged, of_error
from phi3_dist.machine.nodes import clock_findings
from phi3_dist.machine.process_group import Ranks, joined
from phi3_dist.training.preflight.across_ranks import node_view, shared_folder_findings
from phi3_dist.training.preflight.dry_run_checks import Looked, look
from phi3_dist.training.run_folder import versions
from phi3_dist.training.same_on_all_ranks import differences

__all__ = ["DryRun", "dry_run"]


@dataclass(frozen=True)
class DryRun:
    """`findings` are all ranks', on rank 0 and on each rank that met nobody; elsewhere there is nothing to say."""

    findings: tuple[Finding, ...]
    code: int
    speaks: bool


def dry_run(cfg: RunConfig, *, overwrite: bool = False, resume: bool = False) -> DryRun:
    """Look at everything that a start needs. Every rank of a launch calls it."""
    looked = look(cfg, overwrite=overwrite, resume=resume)
    if looked.launch is None:
        return DryRun(looked.findings, exit_code(looked.findings), speaks=True)
    try:
        with joined() as ranks:
            found = _of_all(cfg, looked, ranks)
            return DryRun(found, exit_code(found), speaks=ranks.rank == 0)
    except Phi3DistError as error:
        found = (*looked.findings, *of_error("port", error))
        return DryRun(found, exit_code(found), speaks=True)


def _of_all(cfg: RunConfig, looked: Looked, ranks: Ranks) -> tuple[Finding, ...]:
    """The same on every rank. Collective."""
    found = merged(ranks.gather(looked.findings))
    if ranks.world == 1:
        return tuple(found)
    said = {**flatten(cfg.model_dump(mode="json")), **versions(), "device": looked.device}
    different = differences(ranks.gather({key: str(value) for key, value in said.items()}))
    found += [Finding("bad", f"{one.where}: {one.what}", one.fix, "ranks", 5) for one in different]
    if not different:
        found.append(Finding("ok", f"{ranks.world} ranks with one run file and the same versions", check="ranks"))
    folder = Path(cfg.save.folder)
    ranks.barrier()
    found += clock_findings(ranks.gather(node_view(Path("/"), ranks.node)))
    found += shared_folder_findings(ranks, folder)
    return tuple(ranks.gather(found)[0])
