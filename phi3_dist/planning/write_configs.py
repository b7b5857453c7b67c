"""`phi3-dist config accelerate`: an Accelerate config and the DeepSpeed config that belongs to it, as files."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from phi3_dist.errors import PlanError, Problem
from phi3_dist.planning.launch_configs import accelerate_yaml, deepspeed_json
from phi3_dist.planning.support import STRATEGIES

__all__ = ["WrittenConfigs", "write_configs"]


@dataclass(frozen=True)
class WrittenConfigs:
    """What was written, and how to start with it."""

    files: tuple[Path, ...]
    """The Accelerate config first."""
    command: str


def write_configs(
    strategy: str, *, processes: int, nodes: int = 1, cpu: bool = False, out: Path, overwrite: bool = False
) -> WrittenConfigs:
    """Write `out`/accelerate/NAME.yaml and, for ZeRO, `out`/deepspeed/STRATEGY.json, which the first names in full.

    `processes` counts all nodes' processes; 0 where nobody said how many. NAME is that of the repository's file of this
    kind. Files that hold something else are replaced only with `overwrite`. Raises PlanError.
    """
    _check(strategy, processes, nodes, cpu)
    out = out.absolute()
    name = f"cpu_{processes}" if cpu else "single_gpu" if strategy == "single" else strategy
    config = out / "accelerate" / f"{name}{'_multinode' if nodes > 1 else ''}.yaml"
    zero = out / "deepspeed" / f"{strategy}.json"
    text = accelerate_yaml(strategy, num_processes=processes, num_machines=nodes, cpu=cpu, deepspeed_file=str(zero))
    files = {config: text}
    if strategy.startswith("zero"):
        files[zero] = deepspeed_json(strategy)
    _write(files, overwrite)
    return WrittenConfigs(tuple(files), _command(config, nodes))


def _check(strategy: str, processes: int, nodes: int, cpu: bool) -> None:
    problems = []
    if strategy not in STRATEGIES:
        near = difflib.get_close_matches(strategy.lower(), STRATEGIES, n=1, cutoff=0.5)
        meant = f"did you mean {near[0]}? " if near else ""
        problems.append(Problem("STRATEGY", f"there is no {strategy!r}", f"{meant}There are {', '.join(STRATEGIES)}"))
    elif strategy == "single" and max(processes, nodes) > 1:
        what = f"single has one process on one node, not {processes} on {nodes}"
        raise PlanError(Problem("--processes", what, "ddp, or --processes 1 --nodes 1"))
    if not processes:
        problems.append(Problem("--processes", "no GPU is seen here that could be counted", "name it: --processes 8"))
    if processes % nodes:
        what = f"{processes} processes on all nodes together do not spread evenly over {nodes}"
        problems.append(Problem("--processes", what, f"--processes {nodes * max(1, processes // nodes)}"))
    if cpu and strategy not in ("single", "ddp") and strategy in STRATEGIES:
        what = "is for single and ddp: Accelerate would replace this strategy by plain DDP"
        problems.append(Problem("--cpu", what, "leave it out; where there is no GPU, ZeRO and FSDP2 find the CPU"))
    if problems:
        raise PlanError(*problems)


def _write(files: Mapping[Path, str], overwrite: bool) -> None:
    """All of them or none, as far as what lies there can be read before."""
    fix = "name another folder with --out"
    try:
        dangling = [file for file in files if file.is_symlink() and not file.exists()]
        if dangling:
            raise PlanError(*(Problem(str(file), "is a link to what is not there", fix) for file in dangling))
        changed = [file for file, text in files.items() if file.exists() and file.read_bytes() != text.encode()]
        if changed and not overwrite:
            what = "exists and holds something else"
            raise PlanError(*(Problem(str(file), what, f"{fix}, or replace it with --overwrite") for file in changed))
        for file, text in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        raise PlanError(Problem(str(error.filename or next(iter(files))), what, fix)) from error


def _command(config: Path, nodes: int) -> str:
    words = ["phi3-dist", "launch", "--config_file", str(config)]
    if nodes > 1:
        words += ["--machine_rank", "RANK", "--main_process_ip", "HEAD", "--main_process_port", "29500"]
    return f"{shlex.join(words)} -m phi3_dist train RUN.yaml"
