"""The sbatch script of a run: what the run file asks for, on the topology that the command line asks for.

Everything comes in as values and goes out as text; `phi3_dist.machine.slurm_cluster` talks to a real Slurm.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Literal

from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import PlanError, Problem, control_character, redacted
from phi3_dist.planning.sbatch_body import JOB_BODY

__all__ = ["RENDERED", "SlurmJob", "SlurmTopology", "parse_array", "parse_env", "render_sbatch", "slurm_time"]

RENDERED = "rendered by `phi3-dist slurm`"
"""In the second line of each script: a file with it may be rendered over."""

LEAST_SLACK_S = 60
"""A signal before the time limit was seen up to 8 s early and the limit enforced late; the save needs the rest."""


@dataclass(frozen=True)
class SlurmTopology:
    """Where a job runs. Only what is given becomes a directive; the rest is the cluster's default."""

    nodes: int = 1
    gpus_per_node: int = 0
    """GPUs and processes on each node; 0: a CPU job with `processes_per_node`."""
    processes_per_node: int | None = None
    """Processes on each node; by default one a GPU. Anything else than the GPUs is refused, unless there are none."""
    config: str = "configs/accelerate/ddp.yaml"
    """Accelerate config, from `workdir` or absolute."""
    workdir: str = "."
    """Folder the job runs in; on a file system that every node sees."""
    time: str | None = None
    """Time limit: `90m`, `4h`, `1d12h`, or Slurm's own forms."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_task: int | None = None
    """CPUs of the one task a node, which all processes of the node share."""
    mem: str | None = None
    """Memory a node, in Slurm's form (`64G`)."""
    exclusive: bool = False
    container_image: str | None = None
    """Image for the pyxis plugin of srun; the working folder is mounted at its own path."""
    container_mounts: tuple[str, ...] = ()
    """More mounts for pyxis, `from:to`."""
    env_file: str | None = None
    """Shell file that every node sources first: modules, activation of an environment."""
    env: tuple[tuple[str, str], ...] = ()
    """Variables to export, such as NCCL_SOCKET_IFNAME. None is set unless given."""
    directives: tuple[str, ...] = ()
    """More `#SBATCH` lines, each as `--name=value`."""
    master: str | None = None
    """Address of the first node; by default it is looked up."""
    slack_s: int = 180
    """Seconds before the time limit at which the ranks are asked to save and stop."""
    max_requeues: int = 3
    """How often a job that was stopped, preempted or lost a node may start again. Only with `--resume`."""

    @property
    def processes(self) -> int:
        """Processes on each node."""
        return self.processes_per_node or self.gpus_per_node

    def problems(self) -> Iterator[Problem]:
        """Everything about this topology that can't run."""
        if self.nodes < 1:
            yield Problem("--nodes", f"{self.nodes} is not a number of nodes", "1 or more")
        if self.gpus_per_node < 0 or self.processes < 1:
            yield Problem(
                "--gpus-per-node", "no process on a node", "give GPUs, or --processes-per-node with a CPU config"
            )
        if self.gpus_per_node and self.processes != self.gpus_per_node:
            what = f"{self.processes} processes for {self.gpus_per_node} GPUs a node"
            yield Problem("--processes-per-node", what, "one process a GPU: leave --processes-per-node out")
        if self.slack_s < LEAST_SLACK_S:
            what = f"{self.slack_s} s: Slurm sends the signal up to 8 s early and the ranks still have to save"
            yield Problem("--slack", what, f"{LEAST_SLACK_S} s or more")
        if self.max_requeues < 0:
            yield Problem("--max-requeues", f"{self.max_requeues} is negative", "0 or more")
        if self.time is not None:
            try:
                slurm_time(self.time)
            except PlanError as error:
                yield from error.problems
        for directive in self.directives:
            if not re.fullmatch(r"--?[A-Za-z][\w-]*(=\S.*| \S.*)?", directive):
                yield Problem("--directive", f"{directive!r} is not an sbatch option", "--name=value")
        for name, _ in self.env:
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                yield Problem("--env", f"{name!r} is not a variable's name", "NAME=VALUE")
        yield from _unfit(self._texts())

    def _texts(self) -> Iterator[tuple[str, str]]:
        """Every text of the user's that goes into the script, by the option it came with."""
        options = ("config", "time", "partition", "account", "qos", "constraint", "mem", "master", "env_file")
        for name in (*options, "container_image"):
            yield f"--{_OPTION_NAMES.get(name, name.replace('_', '-'))}", getattr(self, name) or ""
        yield "the working folder", self.workdir
        yield from (("--directive", directive) for directive in self.directives)
        for directive in self.directives:
            if re.search(rf"({_SECRET.pattern})\w*=", directive, re.IGNORECASE):
                yield "--directive", "https://x:y@"
        yield from (("--env", f"{name}={value}") for name, value in self.env)
        yield from (("container mounts", mount) for mount in self.container_mounts)


@dataclass(frozen=True)
class SlurmJob:
    """What a job trains: the run file as the job sees it, its overrides, and the run's name and folder."""

    run_file: str
    name: str
    folder: str
    arguments: tuple[str, ...] = ()
    """Overrides and flags for the verb, such as `optim.lr=1e-4` and `--resume`."""
    verb: Literal["train", "sweep"] = "train"
    """What every rank runs: `phi3-dist train`, or `phi3-dist sweep` of a sweep file."""
    array: tuple[tuple[str, ...], ...] = ()
    """Overrides of each task of an array job; each trains into a folder of its own."""
    at_limit: Literal["requeue", "next"] = "requeue"
    """When the time limit comes: requeue the same job, or leave the rest to the next job of a chain."""

    @classmethod
    def of(cls, run: RunConfig, run_file: str, arguments: Sequence[str] = ()) -> SlurmJob:
        """The job of a loaded run file (name and folder are the run's own)."""
        name = run.name or PurePosixPath(run_file).stem
        return cls(run_file, name, run.save.folder.replace("{name}", name), tuple(arguments))

    def problems(self) -> Iterator[Problem]:
        """What of this job can't stand in a script."""
        texts = [("the run file", self.run_file), ("name", self.name), ("save.folder", self.folder)]
        texts += [("override", argument) for argument in self.arguments]
        texts += [("--array", override) for task in self.array for override in task]
        yield from _unfit(texts)

    @property
    def resumes(self) -> bool:
        return "--resume" in self.arguments

    @property
    def log_stem(self) -> str:
        """Path of the job's logs without `-JOBID.out` and `-JOBID.ranks/`: beside the run folder, in `slurm/`."""
        return str(PurePosixPath(self.folder).parent / "slurm" / re.sub(r"[^\w.-]", "_", self.name))

    @property
    def output(self) -> str:
        """Pattern of the job's output file."""
        return f"{self.log_stem}-{'%A_%a' if self.array else '%j'}.out"

    def chained(self) -> SlurmJob:
        """The same job as a link of a chain that another one follows."""
        return replace(self, at_limit="next")


def slurm_time(text: str) -> str:
    """A time limit in Slurm's form: `90m` → `01:30:00`, `1d12h` → `1-12:00:00`. Slurm's own forms stay as they are.

    Raises PlanError for anything else, and for a limit of 0.
    """
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?", text)
    if match and text:
        days, hours, minutes = (int(part or 0) for part in match.groups())
        total = (days * 24 + hours) * 60 + minutes
        if total:
            days, rest = divmod(total, 24 * 60)
            clock = f"{rest // 60:02d}:{rest % 60:02d}:00"
            return f"{days}-{clock}" if days else clock
    elif re.fullmatch(r"\d+|(\d+:)?\d+:\d\d|\d+-\d+(:\d\d){0,2}", text) and re.search(r"[1-9]", text):
        return text
    raise PlanError(Problem("--time", f"{text!r} is not a time limit", "90m, 4h, 1d12h, or Slurm's D-HH:MM:SS"))


def parse_array(specs: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """The overrides of each task: `["optim.lr=1e-4,2e-4", "lora.r=8,16"]` → four tasks of two overrides.

    A comma inside brackets or quotes belongs to its value. Raises PlanError naming every bad spec.
    """
    axes: list[list[str]] = []
    problems: list[Problem] = []
    for spec in specs:
        key, equals, values = spec.partition("=")
        words = [part.strip() for part in re.findall(r"(?:\[[^\]]*\]|\"[^\"]*\"|'[^']*'|[^,])+|(?<=,)(?=,|$)", values)]
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
            problems.append(Problem("--array", f"{spec!r} is not key.path=value,value", "optim.lr=1e-4,2e-4"))
        elif not words or not all(words):
            problems.append(Problem("--array", f"{spec!r} has an empty value", "optim.lr=1e-4,2e-4"))
        elif len(set(words)) != len(words):
            problems.append(Problem("--array", f"{spec!r} has the same value twice", "name each value once"))
        else:
            axes.append([f"{key}={part}" for part in words])
    if problems:
        raise PlanError(*problems)
    return tuple(itertools.product(*axes)) if axes else ()


_SECRET = re.compile(r"TOKEN|API_?KEY|SECRET|PASSW|CREDENTIAL|PRIVATE_?KEY|ACCESS_?KEY", re.IGNORECASE)


def parse_env(specs: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Pairs for `SlurmTopology.env`: `["GLOO_SOCKET_IFNAME=ib0"]`.

    Raises PlanError naming every spec without a `=`, and every one that looks like a secret: scripts are shown around.
    """
    pairs = [(spec, *spec.partition("=")) for spec in specs]
    problems = [Problem("--env", f"{spec!r} has no value", "NAME=VALUE") for spec, _, equals, _ in pairs if not equals]
    problems += [
        Problem("--env", f"{name} {_READ_BY_ALL}", "put it into a file for --env-file")
        for _, name, equals, _ in pairs
        if equals and _SECRET.search(name)
    ]
    if problems:
        raise PlanError(*problems)
    return tuple((name, value) for _, name, _, value in pairs)


_OPTION_NAMES = {"config": "config_file"}
_READ_BY_ALL = "would be written into the script for all to read"


def _unfit(texts: Iterable[tuple[str, str]]) -> Iterator[Problem]:
    """What may not stand in a script: a second line, which would be a directive or a command; a secret."""
    for where, text in texts:
        if control := control_character(text):
            yield Problem(where, f"{text!r} holds the control character {control}", "write it without")
        if redacted(text) != text:
            yield Problem(where, f"a token or a password {_READ_BY_ALL}", "put it into a file for --env-file")


def render_sbatch(job: SlurmJob, topology: SlurmTopology) -> str:
    """The whole script. Raises PlanError with everything about the topology that can't run."""
    problems = [*job.problems(), *topology.problems()]
    if problems:
        raise PlanError(*problems)
    lines = ["#!/bin/bash", f"# {_comment(job)}: {RENDERED}; render again rather than edit."]
    lines += [f"#SBATCH {line}" for line in _directives(job, topology)]
    lines += ["", *_settings(job, topology)]
    return "\n".join(lines) + "\n" + JOB_BODY


def _comment(job: SlurmJob) -> str:
    return " ".join([job.run_file, *job.arguments])


def _directives(job: SlurmJob, topology: SlurmTopology) -> Iterator[str]:
    yield f"--job-name={_word(job.name)}"
    yield f"--nodes={topology.nodes}"
    yield "--ntasks-per-node=1"
    if topology.gpus_per_node:
        yield f"--gpus-per-node={topology.gpus_per_node}"
    for option, value in (
        ("time", topology.time and slurm_time(topology.time)),
        ("partition", topology.partition),
        ("account", topology.account),
        ("qos", topology.qos),
        ("constraint", topology.constraint),
        ("cpus-per-task", topology.cpus_per_task),
        ("mem", topology.mem),
    ):
        if value is not None:
            yield f"--{option}={_word(str(value))}"
    if topology.exclusive:
        yield "--exclusive"
    yield f"--chdir={_word(topology.workdir)}"
    yield f"--output={_word(job.output)}"
    # a requeued job goes on in the same log
    yield "--open-mode=append"
    yield f"--signal=B:USR1@{topology.slack_s}"
    # without --resume a second start would only find the first one's folder
    yield "--requeue" if job.resumes and topology.max_requeues else "--no-requeue"
    if job.array:
        yield f"--array=0-{len(job.array) - 1}"
    yield from topology.directives


def _word(text: str) -> str:
    """A directive's value as sbatch reads it: quoted only where it has to be."""
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return text if re.fullmatch(r"[\w.,:/@%+&|!*\[\]()-]+", text) else f'"{quoted}"'


def _settings(job: SlurmJob, topology: SlurmTopology) -> Iterator[str]:
    for name, value in topology.env:
        yield f"export {name}={shlex.quote(value)}"
    yield f"VERB={job.verb}"
    yield f"CONFIG={shlex.quote(topology.config)}"
    yield f"NODES={topology.nodes}"
    yield f"PROCESSES={topology.processes}"
    yield f"MASTER={shlex.quote(topology.master) if topology.master else ''}"
    yield f"MAX_REQUEUES={topology.max_requeues}"
    yield f"AT_LIMIT={job.at_limit}"
    yield f"ENV_FILE={shlex.quote(topology.env_file) if topology.env_file else ''}"
    yield f"LOG_STEM={shlex.quote(job.log_stem)}"
    yield f"SRUN_FLAGS=({shlex.join(_container(topology))})"
    yield f"ARGS=({shlex.join([job.run_file, *job.arguments])})"
    if job.array:
        yield "case $SLURM_ARRAY_TASK_ID in"
        for task, overrides in enumerate(job.array):
            folder = f"save.folder={job.folder}-{_label(overrides)}"
            yield f"    {task}) ARGS+=({shlex.join([*overrides, folder])}) ;;"
        yield "esac"


def _container(topology: SlurmTopology) -> list[str]:
    if not topology.container_image:
        return []
    mounts = ",".join([f"{topology.workdir}:{topology.workdir}", *topology.container_mounts])
    return [
        f"--container-image={topology.container_image}",
        f"--container-mounts={mounts}",
        f"--container-workdir={topology.workdir}",
    ]


def _label(overrides: Sequence[str]) -> str:
    """`("optim.lr=1e-4", "lora.r=8")` → `optim.lr_1e-4-lora.r_8`, for a folder's name."""
    return "-".join(re.sub(r"[^\w.+-]+", "_", override).strip("_") for override in overrides)
