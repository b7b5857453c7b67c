"""Real training on a real Slurm: after any interruption it ends in an undisturbed run's adapter, bit for bit.

A run is caught by the step in its heartbeat. Where Slurm then needs longer than the run would, the ranks are held with
SIGSTOP meanwhile, which uses no CPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phi3_dist.machine.slurm_cluster import submit_script
from phi3_dist.report.logs import find_log
from phi3_dist.report.runs import list_runs, read_run
from tests.slurm.conftest import REPO, Desk
from tests.unit.test_sweep import run, sweep_of

# a run is started twice or three times, which takes half a minute each on two busy cores
pytestmark = [pytest.mark.slurm, pytest.mark.full, pytest.mark.timeout(600)]

RUN_FILE = str(REPO / "configs/run/debug.yaml")
CPU_2 = str(REPO / "configs/accelerate/cpu_2.yaml")
STEPS = 150
# no checkpoint but the one that the ranks agree on
OVERRIDES = (
    f"data.train={REPO}/configs/run/debug_chats.jsonl", "data.max_rows=24", "data.pack_length=512", "lora.dropout=0.1",
    "model.precision=fp32", f"train.max_steps={STEPS}", "train.micro_batch=1", "train.global_batch=2",
    "save.every=1000", "log.trackers=[]",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the same run on two processes, without Slurm and to the end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PET_"))}
    bin_folder = Path(sys.executable).parent
    clean |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": f"{bin_folder}:{clean['PATH']}"}
    done = subprocess.run(
        [bin_folder / "accelerate", "launch", "--config_file", CPU_2, "--main_process_port", "0", "-m", "phi3_dist",
         "train", RUN_FILE, *OVERRIDES, "save.folder=run"],
        cwd=folder, env=clean | {"XDG_CACHE_HOME": str(folder / "cache")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


@pytest.fixture
def trainer(desk: Desk) -> Desk:
    """A desk whose jobs train with --resume into runs/story."""
    desk.job = replace(desk.job, run_file=RUN_FILE, arguments=(*OVERRIDES, "save.folder=runs/story", "--resume"))
    return desk


def run_folder(desk: Desk) -> Path:
    return desk.folder / "runs/story"


def wait_until(desk: Desk, job_id: str, what: str, condition: Callable[[], bool], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited for {what}: {desk.states(job_id)}\n{desk.output(job_id)}"
        time.sleep(0.05)


def catch(desk: Desk, job_id: str, step: int) -> None:
    """Returns when the run has made `step` steps, and while it still has many to make."""
    heartbeat = run_folder(desk) / "heartbeat.json"
    wait_until(
        desk, job_id, f"step {step}",
        lambda: heartbeat.is_file() and json.loads(heartbeat.read_text())["step"] >= step,
    )  # fmt: skip


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "train"]


def same_run(ours: Path, theirs: Path) -> None:
    """Every step once, with the same loss and gradient, and the adapter's file byte for byte."""
    assert [row["step"] for row in rows(ours)] == list(range(1, STEPS + 1))
    for our, their in zip(rows(ours), rows(theirs), strict=True):
        assert (our["loss"], our["grad_norm"]) == (their["loss"], their["grad_norm"]), our["step"]
    name = "adapter/adapter_model.safetensors"
    assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def stops(desk: Desk, job_id: str, signal: str) -> list[int]:
    """The steps after which the run was stopped, each of which it went on from."""
    output = desk.output(job_id)
    found = re.findall(rf"stopped by {signal} after step (\d+)", output)
    assert re.findall(r"resumed after step (\d+) of", output) == found, output
    return [int(step) for step in found]


def hold(desk: Desk, job_id: str) -> None:
    desk.cluster.client("scancel", "--signal=STOP", job_id)


def test_time_limit(trainer: Desk, undisturbed: Path) -> None:
    """Asked to stop 75 s before a limit of 2 minutes; the second start has the time that it needs."""
    job_id = trainer.submit(processes_per_node=2, time="2m", slack_s=75)
    catch(trainer, job_id, 5)
    hold(trainer, job_id)
    trainer.wait_for_text(job_id, "time is up: asking the ranks to save and stop", seconds=90)
    trainer.cluster.client("scancel", "--signal=CONT", job_id)
    trainer.wait_for_text(job_id, "requeued (1 of 3)")
    trainer.cluster.client("scontrol", "update", f"JobId={job_id}", "TimeLimit=10")
    assert trainer.wait(job_id, seconds=200) == ["COMPLETED"], trainer.output(job_id)
    (step,) = stops(trainer, job_id, "SIGUSR1")
    assert 5 <= step < STEPS
    same_run(run_folder(trainer), undisturbed)


def test_preemption_by_a_higher_partition(trainer: Desk, undisturbed: Path) -> None:
    """Two nodes agree on the step. Slurm itself wakes what it preempts, and asks it to end with SIGTERM."""
    job_id = trainer.submit(nodes=2, exclusive=True)
    catch(trainer, job_id, 5)
    hold(trainer, job_id)
    higher = trainer.cluster.client("sbatch", "--parsable", "-p", "high", "--exclusive", "--nodelist=node1",
                                    "--output=/dev/null", "--wrap=sleep 1")  # fmt: skip
    trainer.wait_for_text(job_id, "requeued (1 of 3)")
    assert trainer.wait(higher) == ["COMPLETED"]
    assert trainer.wait(job_id, seconds=200) == ["COMPLETED"], trainer.output(job_id)
    (step,) = stops(trainer, job_id, "SIGTERM")
    assert 5 <= step < STEPS
    same_run(run_folder(trainer), undisturbed)


def test_signal_by_hand(trainer: Desk, undisturbed: Path) -> None:
    job_id = trainer.submit(processes_per_node=2)
    catch(trainer, job_id, 20)
    trainer.cluster.client("scancel", "--signal=USR1", job_id)
    trainer.wait_for_text(job_id, "requeued (1 of 3)")
    row = read_run(run_folder(trainer))
    (step,) = map(int, re.findall(r"stopped by SIGUSR1 after step (\d+)", trainer.output(job_id)))
    assert (row.state, row.step, row.checkpoint, row.job_id) == ("preempted", step, f"step_{step:06d}", job_id)
    assert trainer.wait(job_id, seconds=200) == ["COMPLETED"], trainer.output(job_id)
    assert stops(trainer, job_id, "SIGUSR1") == [step]
    assert read_run(run_folder(trainer)).state == "finished"
    assert f"step {STEPS}/{STEPS}" in find_log(run_folder(trainer)).read_text()
    same_run(run_folder(trainer), undisturbed)


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_node_powered_off(trainer: Desk, undisturbed: Path, node: str) -> None:
    """The first node, which holds the job's script and rank 0, or the other. The job goes on when the node is back."""
    if not trainer.cluster.namespaces:
        pytest.skip("this kernel forbids network namespaces: a node can't be powered off")
    trainer.job = replace(trainer.job, arguments=(*trainer.job.arguments, "save.every=10"))
    job_id = trainer.submit(nodes=2)
    catch(trainer, job_id, 25)
    trainer.cluster.power_off(node)
    wait_until(trainer, job_id, "the requeue", lambda: trainer.states(job_id) == ["PENDING"])
    trainer.cluster.power_on(node)
    assert trainer.wait(job_id, seconds=200) == ["COMPLETED"], trainer.output(job_id)
    (step,) = map(int, re.findall(r"resumed after step (\d+) of", trainer.output(job_id)))
    assert step >= 20
    assert step % 10 == 0
    same_run(run_folder(trainer), undisturbed)


def test_requeues_end_at_the_cap(trainer: Desk, undisturbed: Path) -> None:
    """The job says with 75 that the run is not done; submitted once more, the same script goes on."""
    job_id = trainer.submit(processes_per_node=2, max_requeues=1)
    catch(trainer, job_id, 20)
    trainer.cluster.client("scancel", "--signal=USR1", "--batch", job_id)
    trainer.wait_for_text(job_id, "resumed after step", seconds=90)
    trainer.cluster.client("scancel", "--signal=USR1", "--batch", job_id)
    assert trainer.wait(job_id) == ["FAILED"]
    assert "ExitCode=75:0" in trainer.cluster.client("scontrol", "show", "job", job_id)
    assert "requeued 1 times, which is the limit" in trainer.output(job_id)
    again = submit_script(trainer.folder / "job.sbatch")
    assert trainer.wait(again, seconds=200) == ["COMPLETED"], trainer.output(again)
    assert read_run(run_folder(trainer)).job_id == again
    same_run(run_folder(trainer), undisturbed)


def phi3_dist_slurm(
    desk: Desk, *arguments: str, file: str = RUN_FILE, overrides: tuple[str, ...] = OVERRIDES
) -> list[str]:
    """`phi3-dist slurm … --submit` as it is typed, and the ids of the jobs that it names."""
    common = ("--time", "10m", "--env-file", str(desk.folder / "env.sh"), "--env", "OMP_NUM_THREADS=1")
    command = [sys.executable, "-m", "phi3_dist", "slurm", file, *overrides, *arguments, *common, "--submit"]
    done = subprocess.run(command, cwd=desk.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (jobs,) = re.findall(r"^job +(.*)$", done.stdout, flags=re.MULTILINE)
    return list(jobs.split(" → "))


def test_chain(desk: Desk, undisturbed: Path) -> None:
    """The first job ends well when its time is up, without a requeue, and the second trains on."""
    first, second = phi3_dist_slurm(
        desk, "save.folder=runs/story", "--resume", "--chain", "2", "--processes-per-node", "2", "--config_file", CPU_2
    )
    catch(desk, first, 20)
    # what Slurm sends to the script before the time limit
    desk.cluster.client("scancel", "--signal=USR1", "--batch", first)
    assert desk.wait(first) == ["COMPLETED"], desk.output(first)
    assert "the next job of the chain continues" in desk.output(first)
    assert desk.wait(second, seconds=200) == ["COMPLETED"], desk.output(second)
    (step,) = re.findall(r"stopped by SIGUSR1 after step (\d+)", desk.output(first))
    assert f"resumed after step {step} of {STEPS}" in desk.output(second)
    same_run(run_folder(desk), undisturbed)


def test_a_sweep_cut_by_a_time_limit_continues_in_the_next_job(desk: Desk) -> None:
    """Two nodes, one command with `--chain 2` of a sweep file: every candidate ends with an uncut sweep's numbers."""
    section = {"axes": {"optim.lr": [1e-2, 1e-3]}, "early": {"rule": "halving", "first": 1}}
    sweep = sweep_of(desk.folder, section, train={"max_steps": 40, "eval_every": 30}, save={"every": 1000})
    first, second = phi3_dist_slurm(
        desk, "save.folder=runs/story", "--resume", "--chain", "2", "--nodes", "2", "--processes-per-node", "1",
        "--config_file", CPU_2, file=str(desk.folder / "sweep.yaml"), overrides=(),
    )  # fmt: skip
    beat = run_folder(desk) / "lr=0.001" / "heartbeat.json"
    wait_until(desk, first, "step 5", lambda: beat.is_file() and json.loads(beat.read_text())["step"] >= 5)
    desk.cluster.client("scancel", "--signal=USR1", "--batch", first)
    assert desk.wait(first) == ["COMPLETED"], desk.output(first)
    assert "the next job of the chain continues" in desk.output(first)
    said = [json.loads((run_folder(desk) / "sweep.json").read_text())["candidates"]]
    assert {one["state"] for one in said[0]} == {"preempted"}
    assert all(5 <= one["step"] < 30 for one in said[0])
    run(sweep)
    assert desk.wait(second, seconds=200) == ["COMPLETED"], desk.output(second)
    assert find_log(run_folder(desk)).read_text() == desk.output(second)
    said.append(json.loads((run_folder(desk) / "sweep.json").read_text())["candidates"])
    assert [(one["name"], one["state"]) for one in said[1]] == [("lr=0.01", "finished"), ("lr=0.001", "ended early")]
    for one in sweep.candidates:
        ours, theirs = rows(run_folder(desk) / one.name), rows(Path(one.cfg.save.folder))
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for our, their in zip(ours, theirs, strict=True):
            assert our["loss"] == pytest.approx(their["loss"], rel=1e-5), (one.name, our["step"])


def test_array(desk: Desk) -> None:
    """Each value trains into a folder of its own, and `runs` and `logs` find every one."""
    (job_id,) = phi3_dist_slurm(
        desk, "train.max_steps=3", "save.folder=runs/sweep", "--array", "optim.lr=1e-2,1e-3",
        "--processes-per-node", "1", "--config_file", CPU_2,
    )  # fmt: skip
    assert desk.wait(job_id, seconds=200) == ["COMPLETED", "COMPLETED"], desk.output(job_id)
    found = sorted(list_runs(desk.folder / "runs"), key=lambda row: row.folder.name)
    assert [(row.folder.name, row.state, row.step) for row in found] == [
        ("sweep-optim.lr_1e-2", "finished", 3), ("sweep-optim.lr_1e-3", "finished", 3),
    ]  # fmt: skip
    assert [row.job_id for row in found] == [f"{job_id}_0", f"{job_id}_1"]
    assert max(row["lr"] for row in rows(found[0].folder)) == 10 * max(row["lr"] for row in rows(found[1].folder))
    for row in found:
        assert "step 3/3" in find_log(row.folder).read_text()
        assert (row.folder / "adapter/adapter_model.safetensors").is_file()
