"""The text of sbatch scripts. What a script does is tried on a real Slurm in tests/slurm."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from phi3_dist.config.schema import DataConfig, ModelConfig, RunConfig
from phi3_dist.errors import MachineError, PlanError
from phi3_dist.machine.cluster import Check, Rendered, slurm_command, slurm_facts, submit_script
from phi3_dist.planning.job_script import JOB_BODY
from phi3_dist.planning.slurm import SlurmJob, SlurmTopology, parse_env, parse_sweep, render_sbatch, slurm_time

REPO = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"

JOB = SlurmJob("configs/run/mini.yaml", "mini", "runs/mini", ("optim.lr=1e-4", "--resume"))
PLAIN = SlurmTopology(nodes=2, gpus_per_node=8, time="4h", workdir="/home/me/phi3")
FULL = SlurmTopology(
    nodes=4, gpus_per_node=8, config="configs/accelerate/zero3_multinode.yaml", workdir="/home/me/my phi3",
    time="1d12h", partition="gpu", account="lab", qos="high", constraint="h100&ib", cpus_per_task=96, mem="0",
    exclusive=True,
    container_image="/images/phi3.sqsh", container_mounts=("/data:/data:ro",), env_file="/home/me/env.sh",
    env=(("NCCL_SOCKET_IFNAME", "ib0"), ("NOTE", "it's mine")), directives=("--mail-type=END",), master="10.0.0.7",
    slack_s=300, max_requeues=5,
)  # fmt: skip
SCRIPTS = {
    "slurm_plain": render_sbatch(SlurmJob("configs/run/mini.yaml", "mini", "runs/mini"), PLAIN),
    "slurm_full": render_sbatch(JOB, FULL),
    "slurm_sweep": render_sbatch(
        replace(JOB, sweep=parse_sweep(["lora.r=8,16", "lora.targets=[o_proj,qkv_proj]"])), PLAIN
    ),
    "slurm_link": render_sbatch(JOB.chained(), PLAIN),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_golden(name: str) -> None:
    """The part above the body, which is compared with launch/slurm/train.sbatch, where people read it."""
    head, body, rest = SCRIPTS[name].partition(JOB_BODY)
    assert (body, rest) == (JOB_BODY, "")
    assert head == (GOLDEN / f"{name}.sbatch").read_text()


def test_shipped_script_has_the_same_body() -> None:
    assert (REPO / "launch/slurm/train.sbatch").read_text().endswith("\n" + JOB_BODY)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_clean_shell(name: str) -> None:
    checks = [["bash", "-n"], ["shellcheck", "-"]] if shutil.which("shellcheck") else [["bash", "-n"]]
    for command in checks:
        done = subprocess.run(command, input=SCRIPTS[name], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_arguments_reach_bash_as_they_were() -> None:
    arguments = ("name=a b", "data.train=it's $HOME", "lora.targets=[a, b]", "--resume")
    script = render_sbatch(replace(JOB, arguments=arguments), replace(PLAIN, env=(("NOTE", '"quoted" $x'),)))
    head = script.partition(JOB_BODY)[0]
    done = subprocess.run(
        ["bash", "-c", head + 'printf "%s\\n" "${ARGS[@]}" "$NOTE"'], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [JOB.run_file, *arguments, '"quoted" $x']


def test_nothing_is_exported_unless_given() -> None:
    assert "export" not in SCRIPTS["slurm_plain"].partition(JOB_BODY)[0]
    assert "NCCL_" not in JOB_BODY
    assert "GLOO_" not in JOB_BODY


def test_job_of_a_run() -> None:
    run = RunConfig(model=ModelConfig(source="tiny-random"), data=DataConfig(train="rows.jsonl"))
    job = SlurmJob.of(run, "configs/run/mini.yaml", ["train.max_steps=3"])
    assert (job.name, job.folder, job.log_stem) == ("mini", "runs/mini", "runs/slurm/mini")
    assert (job.output, job.resumes) == ("runs/slurm/mini-%j.out", False)


@pytest.mark.parametrize(
    ("text", "slurm"),
    [("90m", "01:30:00"), ("4h", "04:00:00"), ("1d12h", "1-12:00:00"), ("25h", "1-01:00:00"), ("2d", "2-00:00:00"),
     ("30", "30"), ("1:30:00", "1:30:00"), ("2-12", "2-12"), ("2-00:30:00", "2-00:30:00")],
)  # fmt: skip
def test_time(text: str, slurm: str) -> None:
    assert slurm_time(text) == slurm


@pytest.mark.parametrize("text", ["", "0m", "0", "4 hours", "4h30", "-1h", "h"])
def test_time_refused(text: str) -> None:
    with pytest.raises(PlanError, match="is not a time limit"):
        slurm_time(text)


def test_sweep() -> None:
    assert parse_sweep([]) == ()
    assert parse_sweep(["optim.lr=1e-4, 2e-4", "lora.r=8,16"]) == (
        ("optim.lr=1e-4", "lora.r=8"), ("optim.lr=1e-4", "lora.r=16"),
        ("optim.lr=2e-4", "lora.r=8"), ("optim.lr=2e-4", "lora.r=16"),
    )  # fmt: skip
    assert parse_sweep(["lora.targets=[a,b],all-linear"]) == (("lora.targets=[a,b]",), ("lora.targets=all-linear",))
    assert parse_sweep(['name="a,b",c']) == (('name="a,b"',), ("name=c",))


def test_sweep_names_every_mistake() -> None:
    with pytest.raises(PlanError) as caught:
        parse_sweep(["optim.lr", "lora.r=", "train.seed=1,1", "lora.r=8,,16", "lora.r=8,"])
    assert [problem.what.split(" ", 1)[1] for problem in caught.value.problems] == [
        "is not key.path=value,value", "has an empty value", "has the same value twice",
        "has an empty value", "has an empty value",
    ]  # fmt: skip


def test_env_names_every_mistake() -> None:
    assert parse_env(["A=1", "B=x=y", "C="]) == (("A", "1"), ("B", "x=y"), ("C", ""))
    with pytest.raises(PlanError) as caught:
        parse_env(["A", "B=1", "C"])
    assert [problem.what for problem in caught.value.problems] == ["'A' has no value", "'C' has no value"]


def test_topology_names_every_mistake() -> None:
    bad = SlurmTopology(
        nodes=0, gpus_per_node=8, processes_per_node=4, time="soon", slack_s=5, max_requeues=-1,
        directives=("no dashes",), env=(("A B", "x"),),
    )  # fmt: skip
    with pytest.raises(PlanError) as caught:
        render_sbatch(JOB, bad)
    assert [problem.where for problem in caught.value.problems] == [
        "--nodes", "--processes-per-node", "--slack", "--max-requeues", "--time", "--directive", "--env",
    ]  # fmt: skip
    with pytest.raises(PlanError, match="no process on a node"):
        render_sbatch(JOB, SlurmTopology())


def test_command_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    result = slurm_command(JOB, replace(PLAIN, workdir=str(tmp_path)))
    assert result.scripts == (tmp_path / "runs/slurm/mini.sbatch",)
    assert (result.check.answer, result.job_ids) == ("no sbatch", ())
    assert result.scripts[0].read_text() == render_sbatch(JOB, replace(PLAIN, workdir=str(tmp_path)))
    with pytest.raises(MachineError, match="to a login node"):
        submit_script(result.scripts[0])
    with pytest.raises(PlanError, match="one chain for each value"):
        slurm_command(replace(JOB, sweep=(("lora.r=8",),)), replace(PLAIN, workdir=str(tmp_path)), chain=2)


def test_what_the_user_is_told() -> None:
    check = Check("fits", "ok")
    lines = Rendered((Path("a"), Path("a"), Path("b")), check, ("7", "8", "9"), "tail -F x").lines()
    assert lines == ["script  a", "script  b", "check   fits: ok", "job     7 → 8 → 9", "follow  tail -F x"]


def test_facts_of_a_job() -> None:
    assert slurm_facts({}) is None
    environ = {"SLURM_JOB_ID": "15", "SLURM_JOB_NODELIST": "node[1-2]", "SLURMD_NODENAME": "node1"}
    facts = slurm_facts(environ)
    assert facts is not None
    assert (facts.job_id, facts.nodes, facts.node, facts.restarts) == ("15", "node[1-2]", "node1", 0)
    task = slurm_facts({**environ, "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"})
    assert task is not None
    assert (task.job_id, task.restarts) == ("12_3", 2)
