"""The files of one option of the plan: Accelerate config, DeepSpeed config, launch command and job script."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from phi3_dist.config.load import load_run
from phi3_dist.errors import PlanError, Problem
from phi3_dist.planning.advice import Cluster, Option
from phi3_dist.planning.launch_configs import accelerate_yaml, deepspeed_json
from phi3_dist.planning.sbatch_script import SlurmJob, SlurmTopology, render_sbatch

__all__ = ["write_run"]

_MARK = "# Written by phi3-dist plan --write"


def write_run(
    folder: Path, option: Option, cluster: Cluster, run_file: Path, overrides: Sequence[str] = ()
) -> tuple[Path, ...]:
    """Write them below `folder`, with whole paths, so that they work from any folder. Raises PlanError."""
    folder = folder.resolve()
    run = run_file.resolve()
    values = [one for one in overrides if one.partition("=")[0].strip().lstrip("-") not in option.settled]
    values.append(f"model.quantization={option.quantization}")
    values += [f"{path}={str(value).lower()}" for path, value in option.settled.items()]
    config = folder / "accelerate.yaml"
    zero = folder / "deepspeed.json"
    files = {
        config: accelerate_yaml(
            option.strategy, num_processes=cluster.world, num_machines=cluster.nodes, deepspeed_file=str(zero)
        )
    }
    if option.strategy.startswith("zero"):
        files[zero] = deepspeed_json(option.strategy)
    files[folder / "launch.sh"] = _launch(config, run, values, cluster)
    job = SlurmJob.of(load_run(run_file, values), str(run), [*values, "--resume"])
    topology = SlurmTopology(nodes=cluster.nodes, gpus_per_node=cluster.gpus_per_node, config=str(config), time="1d")
    files[folder / "job.sbatch"] = render_sbatch(job, topology)
    _write(folder, files)
    return tuple(files)


def _write(folder: Path, files: Mapping[Path, str]) -> None:
    """All files, over those of an earlier plan; what somebody else has written is not replaced."""
    fix = "name another folder with --write"
    launch = folder / "launch.sh"
    new = [file for file in files if not os.path.lexists(file)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ours = launch.is_file() and _MARK in launch.read_bytes()[:1024].decode("utf-8", "replace")
        there = [file for file in files if file not in new and not ours]
        others = [file for file in there if not file.is_file() or file.read_bytes() != files[file].encode()]
        if others:
            what = "is there already, and is not of plan --write: nothing is replaced"
            raise PlanError(*(Problem(str(file), what, fix) for file in others))
        try:
            for file, content in files.items():
                file.write_text(content, encoding="utf-8")
            launch.chmod(0o755)
        except OSError:
            for file in new:
                file.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise PlanError(Problem(str(folder), f"cannot be written: {error.strerror or error}", fix)) from error


def _launch(config: Path, run: Path, values: Sequence[str], cluster: Cluster) -> str:
    command = ["phi3-dist", "launch", "--config_file", str(config)]
    lines = ["#!/usr/bin/env bash", f"{_MARK}."]
    if cluster.nodes > 1:
        lines.append("# On each node: MACHINE_RANK (0 to N - 1), and the first node's address and a free port on it.")
    lines.append("set -euo pipefail")
    start = shlex.join(command)
    if cluster.nodes > 1:
        start += ' --machine_rank "${MACHINE_RANK:?}" --main_process_ip "${MASTER_ADDR:?}"'
        start += ' --main_process_port "${MASTER_PORT:-29500}"'
    rest = shlex.join(["-m", "phi3_dist", "train", str(run), *values])
    return "\n".join([*lines, f'exec {start} {rest} "$@"']) + "\n"
