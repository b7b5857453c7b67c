"""Jobs on a real Slurm, with a stand-in for training: what the script does with topology, failures and signals."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from phi3_dist.errors import PlanError
from phi3_dist.machine.slurm_cluster import check_script, slurm_command
from phi3_dist.planning.sbatch_script import parse_array
from tests.slurm.cluster import Cluster, own_address, why_not
from tests.slurm.conftest import REPO, Desk
from tests.slurm.test_slurm_smoke import WORLD

pytestmark = pytest.mark.slurm

# a rank that stops when it is asked to, and says so
PATIENT = """
exec "$REAL" - "$@" <<'PY'
import os, signal, sys, time
def stop(number, frame):
    print("saved after", signal.Signals(number).name, flush=True)
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
print(f"start {os.environ.get('SLURM_RESTART_COUNT', 0)}: {' '.join(sys.argv[1:])}", flush=True)
time.sleep(60)
PY
"""


@pytest.mark.full
def test_failure_of_a_far_rank(desk: Desk) -> None:
    desk.stand_in('[ "$RANK" = 0 ] && exec sleep 60; echo "the far rank fell"; exit 7')
    job_id = desk.submit(nodes=2)
    assert desk.wait(job_id) == ["FAILED"]
    assert "the far rank fell" in desk.output(job_id)


@pytest.mark.parametrize("master", ["127.0.0.1", "10.99.99.99", "no-such-host"])
def test_wrong_master_is_refused(desk: Desk, master: str) -> None:
    desk.stand_in("exit 0")
    job_id = desk.submit(nodes=2, master=master)
    assert desk.wait(job_id, seconds=30) == ["FAILED"]
    assert f"refused: master {master}" in desk.output(job_id)


def test_taken_port_is_passed_by(desk: Desk) -> None:
    desk.stand_in('echo "port $MASTER_PORT"')
    script = desk.script(nodes=1)
    job_id = desk.cluster.client("sbatch", "--parsable", "--hold", "--nodelist=node1", str(script))
    port = 20000 + int(job_id) % 10000
    listen = f"import socket as s; l = s.create_server(('', {port})); print('up', flush=True); l.accept(); l.accept()"
    command = desk.cluster.in_node("node1", "python3", "-c", listen + "; l.accept()")
    with subprocess.Popen(command, stdout=subprocess.PIPE) as listener:
        assert listener.stdout is not None
        listener.stdout.readline()
        desk.cluster.client("scontrol", "release", job_id)
        states = desk.wait(job_id)
        listener.kill()
    assert states == ["COMPLETED"], desk.output(job_id)
    assert f"master 127.0.0.1:{port + 1}" in desk.output(job_id)


def test_uneven_gpus_are_refused(desk: Desk) -> None:
    desk.stand_in("exit 0")
    # 3 GPUs over two nodes: 2 and 1
    job_id = desk.submit(nodes=2, processes_per_node=2, directives=("--gpus=3",))
    assert desk.wait(job_id) == ["FAILED"]
    assert re.search(r"refused: node\d has 1 GPUs in this job, the plan is 2 processes", desk.output(job_id))


def test_fewer_nodes_than_planned_are_refused(desk: Desk) -> None:
    desk.stand_in("exit 0")
    script = desk.script(nodes=2)
    job_id = desk.cluster.client("sbatch", "--parsable", "--nodes=1", str(script))
    assert desk.wait(job_id) == ["FAILED"]
    assert "refused: the job got 1 nodes, the plan is 2" in desk.output(job_id)


def test_array_sweep(desk: Desk) -> None:
    desk.stand_in('echo "train $*"')
    desk.job = replace(desk.job, array=parse_array(["optim.lr=1e-4,2e-4"]))
    result = slurm_command(desk.job, desk.topology, submit=True)
    (job_id,) = result.job_ids
    assert desk.wait(job_id) == ["COMPLETED", "COMPLETED"]
    for task, lr in enumerate(("1e-4", "2e-4")):
        log = desk.folder / "runs" / "slurm" / f"story-{job_id}_{task}.out"
        assert f"train run.yaml optim.lr={lr} save.folder=runs/story-optim.lr_{lr}" in log.read_text()
    assert result.follow == f"tail -F {desk.folder}/runs/slurm/story-{job_id}_0.out"


def test_chain_goes_on_and_breaks(desk: Desk) -> None:
    desk.stand_in('[ -e failing ] && exit 7; [ -e once ] && : >failing; : >once; echo "train $*"')
    desk.job = replace(desk.job, arguments=("--resume",))
    result = slurm_command(desk.job, desk.topology, submit=True, chain=4)
    first, second, third, fourth = result.job_ids
    assert [script.name for script in result.scripts] == ["story-link.sbatch"] * 3 + ["story.sbatch"]
    assert [desk.wait(i) for i in (first, second, third)] == [["COMPLETED"], ["COMPLETED"], ["FAILED"]]
    # not pending for ever
    assert desk.wait(fourth, seconds=30) == ["CANCELLED"]


def test_chain_without_resume_is_refused(desk: Desk) -> None:
    with pytest.raises(PlanError, match="add --resume"):
        slurm_command(desk.job, desk.topology, chain=2)


def test_check_knows_what_cannot_run(desk: Desk) -> None:
    assert check_script(desk.script("fits")).answer == "fits"
    assert check_script(desk.script("large", nodes=5)).answer == "impossible"
    assert check_script(desk.script("odd", directives=("--no-such-option=1",))).answer == "wrong"
    with pytest.raises(PlanError, match="sbatch --test-only"):
        slurm_command(desk.job, replace(desk.topology, nodes=5), submit=True)
    assert desk.cluster.client("squeue", "-h") == ""


def test_shipped_script(desk: Desk) -> None:
    desk.stand_in('echo "train $*"')
    job_id = desk.cluster.client(
        "sbatch", "--parsable", f"--chdir={desk.folder}", "--nodes=1", "--output=runs/slurm/%x-%j.out",
        str(REPO / "launch/slurm/train.sbatch"), "--processes-per-node", "1", "--env-file", "env.sh",
        "--config", str(REPO / "configs/accelerate/cpu_2.yaml"), "run.yaml", "name=a b", "--overwrite",
    )  # fmt: skip
    assert desk.wait(job_id) == ["COMPLETED"], desk.output(job_id)
    assert "train run.yaml name=a b --overwrite" in desk.output(job_id)


@pytest.mark.full
@pytest.mark.parametrize("to", ["--batch", "--full", ""])
def test_signal_requeues_up_to_the_cap(desk: Desk, to: str) -> None:
    """What the script does once ranks stop on request; that a run resumes exactly is the training tests' matter."""
    desk.stand_in(PATIENT)
    desk.job = replace(desk.job, arguments=("--resume",))
    job_id = desk.submit(max_requeues=1)
    desk.wait_for_text(job_id, "start 0: run.yaml --resume")
    desk.cluster.client("scancel", "--signal=USR1", *([to] if to else []), job_id)
    desk.wait_for_text(job_id, "start 1: run.yaml --resume")
    desk.cluster.client("scancel", "--signal=USR1", *([to] if to else []), job_id)
    assert desk.wait(job_id) == ["FAILED"]
    assert "requeued (1 of 1)" in desk.output(job_id)
    assert desk.output(job_id).count("saved") == 2
    assert "ExitCode=75:0" in desk.cluster.client("scontrol", "show", "job", job_id)


@pytest.mark.full
def test_signal_to_one_task_of_an_array(desk: Desk) -> None:
    """The last task's own job id is the array's too: a script that used it would stop and requeue every task."""
    desk.stand_in(PATIENT)
    array = parse_array(["optim.lr=1,2"])
    desk.job = replace(desk.job, arguments=("--resume",), array=array)
    job_id = desk.submit(directives=("--requeue",))
    for task in (0, 1):
        desk.wait_for_text(f"{job_id}_{task}", "start 0: run.yaml --resume")
    desk.cluster.client("scancel", "--signal=USR1", "--batch", f"{job_id}_1")
    desk.wait_for_text(f"{job_id}_1", "start 1: run.yaml --resume")
    assert "requeued (1 of 3)" in desk.output(f"{job_id}_1")
    assert "saved" not in desk.output(f"{job_id}_0")
    assert desk.states(f"{job_id}_0") == ["RUNNING"]


# hears no signal for its first seconds, as a rank that still imports and loads
DEAF = PATIENT.replace("signal.signal(signal.SIGUSR1", "time.sleep(6)\nsignal.signal(signal.SIGUSR1")


@pytest.mark.full
def test_signal_while_the_ranks_start(desk: Desk) -> None:
    desk.stand_in('echo "born"' + DEAF)
    desk.job = replace(desk.job, arguments=("--resume",))
    job_id = desk.submit(max_requeues=1)
    desk.wait_for_text(job_id, "born")
    desk.cluster.client("scancel", "--signal=USR1", job_id)
    desk.wait_for_text(job_id, "requeued (1 of 1)")
    assert "saved after SIGUSR1" in desk.output(job_id)


# takes its time to save, and says how often it was asked to
SLOW = """
exec "$REAL" - "$@" <<'PY'
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: print("asked", flush=True))
print(f"start {os.environ.get('SLURM_RESTART_COUNT', 0)}", flush=True)
signal.pause()
end = time.monotonic() + 3
while time.monotonic() < end:
    time.sleep(0.1)
sys.exit(75)
PY
"""


@pytest.mark.full
def test_the_launcher_leaves_time_to_save(desk: Desk) -> None:
    """A launcher that took the TERM itself would send it to its ranks again, and kill them 30 s later."""
    desk.stand_in(SLOW)
    desk.job = replace(desk.job, arguments=("--resume",))
    job_id = desk.submit(nodes=2, max_requeues=1)
    desk.wait_for_text(job_id, "start 0")
    desk.cluster.client("scancel", "--signal=TERM", job_id)
    desk.wait_for_text(job_id, "requeued (1 of 1)")
    assert desk.output(job_id).count("asked") == 1, desk.output(job_id)


@pytest.mark.full
def test_time_limit_requeues(desk: Desk) -> None:
    desk.stand_in(PATIENT)
    desk.job = replace(desk.job, arguments=("--resume",))
    job_id = desk.submit(time="2m", slack_s=100)
    desk.wait_for_text(job_id, "start 1: run.yaml --resume")
    assert "saved after SIGUSR1" in desk.output(job_id)
    assert "requeued (1 of 3)" in desk.output(job_id)


@pytest.mark.full
def test_time_limit_hands_over_in_a_chain(desk: Desk) -> None:
    desk.stand_in(PATIENT)
    desk.job = replace(desk.job, arguments=("--resume",))
    result = slurm_command(desk.job, replace(desk.topology, time="2m", slack_s=100), submit=True, chain=2)
    assert desk.wait(result.job_ids[0], seconds=60) == ["COMPLETED"]
    assert "the next job of the chain continues" in desk.output(result.job_ids[0])
    desk.wait_for_text(result.job_ids[1], "start 0: run.yaml --resume")


@pytest.mark.full
def test_preempted_job_goes_on_by_itself(desk: Desk) -> None:
    desk.stand_in(PATIENT)
    desk.job = replace(desk.job, arguments=("--resume",))
    job_id = desk.submit(nodes=1, directives=("--exclusive", "--nodelist=node1"))
    desk.wait_for_text(job_id, "start 0: run.yaml --resume")
    higher = desk.cluster.client("sbatch", "--parsable", "-p", "high", "--exclusive", "--nodelist=node1",
                                 "--output=/dev/null", "--wrap=sleep 2")  # fmt: skip
    desk.wait_for_text(job_id, "start 1: run.yaml --resume")
    assert desk.wait(higher) == ["COMPLETED"]
    assert "requeued (1 of 3)" in desk.output(job_id)


@pytest.mark.full
def test_cancelled_job_stays_cancelled(desk: Desk) -> None:
    desk.stand_in(PATIENT)
    desk.job = replace(desk.job, arguments=("--resume",))
    job_id = desk.submit()
    desk.wait_for_text(job_id, "start 0: run.yaml --resume")
    desk.cluster.client("scancel", job_id)
    assert desk.wait(job_id) == ["CANCELLED"]
    assert "requeued" not in desk.output(job_id)


@pytest.mark.full
def test_stop_without_resume_is_not_a_success(desk: Desk) -> None:
    desk.stand_in(PATIENT)
    job_id = desk.submit()
    desk.wait_for_text(job_id, "start 0: run.yaml")
    desk.cluster.client("scancel", "--signal=USR1", "--batch", job_id)
    assert desk.wait(job_id) == ["FAILED"]
    assert "not requeued, since the run has no --resume" in desk.output(job_id)


@pytest.mark.full
def test_without_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a kernel forbids namespaces the nodes share this machine's address, and two of them still train."""
    if reason := why_not():
        pytest.skip(f"no Slurm cluster: {reason}")
    if own_address().startswith("127."):
        pytest.skip("this machine has no address but loopback, which jobs of two nodes refuse")
    with (
        tempfile.TemporaryDirectory(prefix="phi3-slurm-", dir="/tmp") as folder,
        Cluster(Path(folder), namespaces=False) as cluster,
    ):
        monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
        desk = Desk(cluster, tmp_path)
        desk.stand_in(WORLD)
        job_id = desk.submit(nodes=2)
        assert desk.wait(job_id) == ["COMPLETED"], desk.output(job_id)
        assert "rank 0 of 2 sum 3" in desk.output(job_id)


@pytest.mark.full
def test_power_failure(desk: Desk) -> None:
    """A node that dies takes a job without --resume with it; one with --resume starts again when the node is back."""
    if not desk.cluster.namespaces:
        pytest.skip("this kernel forbids network namespaces: a node can't be powered off")
    desk.stand_in(PATIENT)
    lost = desk.submit(directives=("--nodelist=node2",))
    desk.job = replace(desk.job, arguments=("--resume",))
    kept = desk.submit(directives=("--nodelist=node2",))
    for job_id in (lost, kept):
        desk.wait_for_text(job_id, "start 0: run.yaml")
    desk.cluster.power_off("node2")
    assert desk.wait(lost) == ["NODE_FAIL"]
    desk.cluster.power_on("node2")
    desk.wait_for_text(kept, "start 1: run.yaml --resume", seconds=60)
