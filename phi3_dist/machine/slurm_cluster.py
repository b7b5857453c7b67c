"""Slurm as this machine knows it: the facts of the job we are in, and the commands that check and submit one."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from phi3_dist.config.shipped_files import shipped_of
from phi3_dist.errors import MachineError, PlanError, Problem, control_character
from phi3_dist.planning.sbatch_script import RENDERED, SlurmJob, SlurmTopology, render_sbatch

__all__ = ["Check", "Rendered", "SlurmFacts", "check_script", "slurm_command", "slurm_facts", "submit_script"]


@dataclass(frozen=True)
class SlurmFacts:
    """The job this process runs in."""

    job_id: str
    """`12`, or `12_3` for task 3 of an array: the id that names the job's logs."""
    nodes: str
    """Node list in Slurm's short form, `node[1-4]`."""
    node: str
    """Name of this node."""
    restarts: int
    """How often the job was requeued."""
    partition: str


def slurm_facts(environ: Mapping[str, str] = os.environ) -> SlurmFacts | None:
    """The facts of the Slurm job in `environ`, or None outside one."""
    job_id = environ.get("SLURM_JOB_ID")
    if job_id is None:
        return None
    if array := environ.get("SLURM_ARRAY_JOB_ID"):
        job_id = f"{array}_{environ.get('SLURM_ARRAY_TASK_ID', '0')}"
    return SlurmFacts(
        job_id=job_id,
        nodes=environ.get("SLURM_JOB_NODELIST", ""),
        node=environ.get("SLURMD_NODENAME", ""),
        restarts=int(environ.get("SLURM_RESTART_COUNT", "0")),
        partition=environ.get("SLURM_JOB_PARTITION", ""),
    )


@dataclass(frozen=True)
class Check:
    """What `sbatch --test-only` said: it fits, it can't ever run, the script is wrong, or nobody could be asked."""

    answer: Literal["fits", "impossible", "wrong", "not checked"]
    text: str


@dataclass(frozen=True)
class Rendered:
    """What `phi3-dist slurm` did."""

    scripts: tuple[Path, ...]
    """The script of each job; of a chain the links before the last share one."""
    check: Check
    job_ids: tuple[str, ...]
    """Empty without `--submit`."""
    follow: str
    """Command that follows the log of the first job."""

    def lines(self) -> list[str]:
        """What to tell the user."""
        out = [f"script  {script}" for script in dict.fromkeys(self.scripts)]
        out.append(f"check   {self.check.answer}" + (f": {self.check.text}" if self.check.text else ""))
        if self.job_ids:
            out.append(f"job     {' → '.join(self.job_ids)}")
            out.append(f"follow  {self.follow}")
        return out


def check_script(script: Path) -> Check:
    """Ask Slurm whether the script could run, without submitting it."""
    if shutil.which("sbatch") is None:
        return Check("not checked", "there is no sbatch on this machine")
    done = subprocess.run(["sbatch", "--test-only", str(script)], capture_output=True, text=True, check=False)
    text = " ".join((done.stdout + done.stderr).replace("sbatch: ", "").split())
    if done.returncode == 0:
        return Check("fits", text)
    if "configuration source" in text or "contact slurm controller" in text.lower():
        return Check("not checked", "sbatch is on this machine, but reaches no cluster")
    # measured: 1 for a request the cluster can't meet, 255 for a directive sbatch doesn't know
    return Check("impossible" if done.returncode == 1 else "wrong", text)


def submit_script(script: Path, *, after: str | None = None) -> str:
    """Submit a script and return the job id; with `after`, it starts once that job ended well.

    A link whose predecessor failed is cancelled: without --kill-on-invalid-dep it would pend for ever.
    Raises MachineError with sbatch's own words.
    """
    if shutil.which("sbatch") is None:
        raise MachineError(Problem("sbatch", "not found on this machine", f"copy {script} to a login node"))
    dependency = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    command = ["sbatch", "--parsable", *dependency, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MachineError(Problem(shlex.join(command), done.stderr.strip() or f"exit code {done.returncode}"))
    # with several clusters: id;cluster
    return done.stdout.strip().split(";")[0]


def slurm_command(
    job: SlurmJob,
    topology: SlurmTopology,
    *,
    script: Path | None = None,
    submit: bool = False,
    chain: int = 1,
    print_line: Callable[[str], None] = lambda line: None,
) -> Rendered:
    """The verb `phi3-dist slurm`: write the script, check it, and with `submit` submit it to Slurm, `chain` times.

    The script goes beside the job's logs unless `script` says where. `print_line` gets each job's id at once: no end of
    this process leaves a job that nobody knows of. Raises PlanError for a topology that can't run or that Slurm
    refuses, MachineError where submitting fails.
    """
    workdir = Path(topology.workdir).resolve()
    problems = list(_chain_problems(job, chain))
    config, config_problems = _config_from(workdir, topology.config)
    problems += config_problems
    topology = replace(topology, workdir=str(workdir), config=config)
    texts = [render_sbatch(job, topology)] if chain == 1 else _links(job, topology, chain)
    if problems:
        raise PlanError(*problems)
    script = script or workdir / f"{job.log_stem}.sbatch"
    try:
        # Slurm doesn't create the folder of --output, and a job without it fails without a word
        for folder in {script.parent, (workdir / job.log_stem).parent}:
            folder.mkdir(parents=True, exist_ok=True)
        scripts = _write(script, texts)
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        raise PlanError(Problem(str(error.filename or script), what, "name another file with --script")) from error
    check = check_script(scripts[-1])
    if check.answer in ("impossible", "wrong"):
        raise PlanError(Problem("sbatch --test-only", check.text, f"change the options; the script is {scripts[-1]}"))
    job_ids = _submit(scripts, print_line) if submit else []
    first = job_ids[0] if job_ids else "JOBID"
    output = job.output.replace("%A_%a", f"{first}_0").replace("%j", first)
    return Rendered(tuple(scripts), check, tuple(job_ids), f"tail -F {shlex.quote(str(workdir / output))}")


def _submit(scripts: Sequence[Path], print_line: Callable[[str], None]) -> list[str]:
    job_ids: list[str] = []
    for link in scripts:
        try:
            job_ids.append(submit_script(link, after=job_ids[-1] if job_ids else None))
        except MachineError as error:
            if not job_ids:
                raise
            what = f"{len(job_ids)} of {len(scripts)} jobs are submitted, each continuing the one before"
            fix = f"let them run, or scancel {' '.join(job_ids)}"
            raise MachineError(*error.problems, Problem("--chain", what, fix)) from error
        if len(scripts) > 1:
            print_line(f"submitted {len(job_ids)} of {len(scripts)}: job {job_ids[-1]}")
    return job_ids


def _config_from(workdir: Path, config: str) -> tuple[str, list[Problem]]:
    """The Accelerate config as the job finds it, from its folder or in full; what of it the job would not find.

    A shipped config is found from anywhere; each rank finds the DeepSpeed file beside it.
    """
    if (workdir / config).is_file():
        return config, []
    shipped = shipped_of(Path(config))
    if shipped is None:
        what = f"{config} is not in {workdir}, where the job runs"
        return config, [Problem("--config_file", what, "name it from there, or in full")]
    return str(shipped.resolve()), []


def _chain_problems(job: SlurmJob, chain: int) -> Sequence[Problem]:
    if chain == 1:
        return []
    problems = []
    if chain < 1:
        problems.append(Problem("--chain", f"{chain} is not a number of jobs", "1 or more"))
    if not job.resumes:
        problems.append(Problem("--chain", "the second job of a chain continues the first", "add --resume"))
    if job.array:
        problems.append(Problem("--chain", "not together with --array", "one chain for each value"))
    return problems


def _links(job: SlurmJob, topology: SlurmTopology, chain: int) -> list[str]:
    # the last job has none behind it that could go on, so it requeues like a single one
    return [render_sbatch(job.chained(), topology)] * (chain - 1) + [render_sbatch(job, topology)]


def _refuse_others(script: Path) -> None:
    """Raises PlanError for a file that this verb has not rendered."""
    fix = "name another file with --script"
    if found := control_character(script.name):
        raise PlanError(Problem(str(script), f"has {found} in its name", fix))
    if script.is_symlink() and not script.exists():
        raise PlanError(Problem(str(script), "is a link to what is not there", fix))
    head = script.read_bytes()[:4096] if script.is_file() else b""
    if script.exists() and (not script.is_file() or (head and RENDERED.encode() not in head)):
        what = "is there already, and is not a script of phi3-dist slurm: nothing is replaced"
        raise PlanError(Problem(str(script), what, fix))


def _write(script: Path, texts: Sequence[str]) -> list[Path]:
    """One file a different text; what comes before the last gets `-link` in its name."""
    paths = []
    for text in texts:
        name = script if text == texts[-1] else script.with_name(re.sub(r"(\.\w+)?$", r"-link\1", script.name, count=1))
        _refuse_others(name)
        name.write_text(text)
        paths.append(name)
    return paths
