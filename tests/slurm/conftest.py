"""The cluster, once a session, and a desk to send jobs from: run file, configs and a stand-in for the training verb."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from phi3_dist.machine.slurm_cluster import submit_script
from phi3_dist.planning.sbatch_script import SlurmJob, SlurmTopology, render_sbatch
from tests.slurm.cluster import Cluster, why_not

REPO = Path(__file__).resolve().parents[2]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(f"no Slurm cluster: {reason}")
    # not below pytest's own folder: a socket's path holds 107 characters at most
    with tempfile.TemporaryDirectory(prefix="phi3-slurm-", dir="/tmp") as folder, Cluster(Path(folder)) as cluster:
        yield cluster


class Desk:
    """Renders, submits and waits. `stand_in` replaces `python -m phi3_dist train …` by a shell snippet."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.job = SlurmJob("run.yaml", "story", "runs/story")
        self.topology = SlurmTopology(
            processes_per_node=1, config=str(REPO / "configs/accelerate/cpu_2.yaml"), workdir=str(folder), time="10m",
            env=(("OMP_NUM_THREADS", "1"), ("HF_HUB_OFFLINE", "1"), ("XDG_CACHE_HOME", str(folder / "cache"))),
            env_file=str(folder / "env.sh"),
        )  # fmt: skip
        (folder / "runs" / "slurm").mkdir(parents=True)
        self._env_file(f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH")

    def _env_file(self, text: str) -> None:
        (self.folder / "env.sh").write_text(text + "\n")

    def stand_in(self, snippet: str) -> None:
        """`snippet` is what every rank runs; `$@` are the arguments of `train`, after `-m phi3_dist train`."""
        bin_folder = self.folder / "bin"
        bin_folder.mkdir()
        program = bin_folder / "python"
        # accelerate itself has its interpreter's full path in its first line, so it doesn't come by here
        program.write_text(f"#!/bin/bash\nREAL={shlex.quote(sys.executable)}\nshift 3\n{snippet}\n")
        program.chmod(0o755)
        self._env_file(f"PATH={bin_folder}:{shlex.quote(str(Path(sys.executable).parent))}:$PATH")

    def script(self, name: str = "job", **topology: object) -> Path:
        path = self.folder / f"{name}.sbatch"
        path.write_text(render_sbatch(self.job, replace(self.topology, **topology)))  # type: ignore[arg-type]
        return path

    def submit(self, **topology: object) -> str:
        return submit_script(self.script(**topology))

    def states(self, job_id: str) -> list[str]:
        """State of a job, or of each task of an array."""
        return self.cluster.client("squeue", "-h", "-r", "-t", "all", "-j", job_id, "-o", "%T").splitlines()

    def wait(self, job_id: str, states: set[str] = ENDED, seconds: float = 90) -> list[str]:
        """The states of a job once all of them are in `states`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.states(job_id)
            if found and set(found) <= states:
                return found
            time.sleep(0.2)
        raise AssertionError(f"job {job_id} is {self.states(job_id)} after {seconds} s\n{self.output(job_id)}")

    def output(self, job_id: str) -> str:
        logs = sorted((self.folder / "runs" / "slurm").glob(f"*-{job_id}*.out"))
        return "\n".join(log.read_text() for log in logs)

    def wait_for_text(self, job_id: str, text: str, seconds: float = 40) -> None:
        """Returns once `text` stands in the output of a job."""
        end = time.monotonic() + seconds
        while text not in self.output(job_id):
            assert time.monotonic() < end, f"no {text!r} of job {job_id}, {self.states(job_id)}\n{self.output(job_id)}"
            time.sleep(0.1)

    def rank_logs(self, job_id: str) -> dict[str, str]:
        folder = self.folder / "runs" / "slurm" / f"{self.job.name}-{job_id}.ranks"
        return {log.name: log.read_text() for log in sorted(folder.glob("rank_*"))}


@pytest.fixture
def desk(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
    yield Desk(cluster, tmp_path)
    cluster.client("scancel", "--user=root", check=False)
    cluster.wait_for("the end of all jobs", lambda: not cluster.client("squeue", "-h", "-t", "PD,R,CG,S"))
