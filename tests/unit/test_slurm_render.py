"""The text of sbatch scripts. What a script does is tried on a real Slurm in tests/slurm."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from phi3_dist.config.schema import DataConfig, ModelConfig, RunConfig
from phi3_dist.errors import MachineError, PlanError
from phi3_dist.machine.slurm_cluster import Check, Rendered, slurm_command, slurm_facts, submit_script
from phi3_dist.planning.sbatch_body import JOB_BODY
from phi3_dist.planning.sbatch_script import SlurmJob, SlurmTopology, parse_array, parse_env, render_sbatch, slurm_time

REPO = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
CONFIGS = REPO / "configs" / "accelerate"

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
    "slurm_array": render_sbatch(
        replace(JOB, array=parse_array(["lora.r=8,16", "lora.targets=[o_proj,qkv_proj]"])), PLAIN
    ),
    "slurm_link": render_sbatch(JOB.chained(), PLAIN),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_golden(name: str) -> None:
    """The part above the body, which is compared with launch/slurm/train.sbatch, where people read it."""
    head, body, rest = SCRIPTS[name].partition(JOB_BODY)
    assert (body, rest) == (JOB_BODY, "")
    assert head == (GOLDEN / f"{name}.sbatch").read_text()


def test_a_sweep_file_is_swept() -> None:
    plain, swept = (render_sbatch(replace(JOB, verb=verb), PLAIN) for verb in ("train", "sweep"))
    assert swept == plain.replace("\nVERB=train\n", "\nVERB=sweep\n") != plain


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


def test_array() -> None:
    assert parse_array([]) == ()
    assert parse_array(["optim.lr=1e-4, 2e-4", "lora.r=8,16"]) == (
        ("optim.lr=1e-4", "lora.r=8"), ("optim.lr=1e-4", "lora.r=16"),
        ("optim.lr=2e-4", "lora.r=8"), ("optim.lr=2e-4", "lora.r=16"),
    )  # fmt: skip
    assert parse_array(["lora.targets=[a,b],all-linear"]) == (("lora.targets=[a,b]",), ("lora.targets=all-linear",))
    assert parse_array(['name="a,b",c']) == (('name="a,b"',), ("name=c",))


def test_array_names_every_mistake() -> None:
    with pytest.raises(PlanError) as caught:
        parse_array(["optim.lr", "lora.r=", "train.seed=1,1", "lora.r=8,,16", "lora.r=8,"])
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
    here = replace(PLAIN, workdir=str(tmp_path), config=str(CONFIGS / "ddp.yaml"))
    result = slurm_command(JOB, here)
    assert result.scripts == (tmp_path / "runs/slurm/mini.sbatch",)
    assert (result.check.answer, result.job_ids) == ("not checked", ())
    assert result.scripts[0].read_text() == render_sbatch(JOB, here)
    assert slurm_command(JOB, here).scripts == result.scripts
    for name, text in (("notes.sh", "mine"), ("a\nb.sh", ""), ("there", None)):
        other = tmp_path / name
        other.mkdir() if text is None else other.write_text(text)
        with pytest.raises(PlanError, match="nothing is replaced" if "\n" not in name else "in its name"):
            slurm_command(JOB, here, script=other)
        assert text is None or other.read_text() == text
    with pytest.raises(PlanError, match=r"notes.sh.*: cannot be written"):
        slurm_command(JOB, here, script=tmp_path / "notes.sh" / "job.sbatch")
    with pytest.raises(MachineError, match="to a login node"):
        submit_script(result.scripts[0])
    with pytest.raises(PlanError, match="one chain for each value"):
        slurm_command(replace(JOB, array=(("lora.r=8",),)), replace(PLAIN, workdir=str(tmp_path)), chain=2)


def test_a_config_is_found_from_another_folder_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that names a file which the job would not find costs a place in the queue."""
    monkeypatch.setenv("PATH", "/nowhere")
    there = replace(PLAIN, workdir=str(tmp_path))
    script = slurm_command(JOB, there).scripts[0].read_text()
    assert f"CONFIG={shlex.quote(str(CONFIGS / 'ddp.yaml'))}\n" in script
    with pytest.raises(PlanError, match=r"mine\.yaml is not in"):
        slurm_command(JOB, replace(there, config="mine.yaml"))
    zero = slurm_command(JOB, replace(there, config="configs/accelerate/zero3.yaml")).scripts[0].read_text()
    assert (
        f"CONFIG={shlex.quote(str(CONFIGS / 'zero3.yaml'))}\n" in zero
    )  # each rank finds the DeepSpeed file beside it
    (tmp_path / "configs").symlink_to(CONFIGS.parent)
    script = slurm_command(JOB, replace(there, config="configs/accelerate/zero3.yaml")).scripts[0].read_text()
    assert "CONFIG=configs/accelerate/zero3.yaml\n" in script


CONTROL = ("\n#SBATCH --uid=0", "\n touch /tmp/x #", "\r", "\x1b[31m", "\x00", "\u2028", "\u202e")


@pytest.mark.parametrize("text", CONTROL, ids=ascii)
def test_no_value_becomes_a_line_of_its_own(text: str) -> None:
    """A directive or a command of whoever wrote the value."""
    values = dict.fromkeys(("config", "partition", "account", "qos", "constraint", "mem", "master"), f"x{text}")
    values |= dict.fromkeys(("workdir", "env_file", "container_image"), f"x{text}")
    topology = replace(
        PLAIN, **values, container_mounts=(f"/a:{text}",), env=(("A", text),), directives=(f"--comment={text}",)
    )
    job = SlurmJob(f"run{text}.yaml", f"n{text}", f"runs{text}", (f"name={text}",), array=((f"lora.r=8{text}",),))
    with pytest.raises(PlanError) as raised:
        render_sbatch(job, topology)
    named = {problem.where for problem in raised.value.problems if "control character" in problem.what}
    options = "config_file partition account qos constraint mem master env-file container-image directive env array"
    assert named == {f"--{option}" for option in options.split()} | {
        "the run file", "name", "save.folder", "override", "the working folder", "container mounts",
    }  # fmt: skip
    assert text not in str(raised.value)


def test_a_value_ends_no_quotes_of_its_directive() -> None:
    script = render_sbatch(JOB, replace(PLAIN, partition='a" --uid=0 "\\'))
    assert '#SBATCH --partition="a\\" --uid=0 \\"\\\\"\n' in script


@pytest.mark.parametrize(
    "env", ["MY=hf_abcdefghijKLMNOP1234", "MIRROR=https://me:secret@host/x", "PAT=ghp_0123456789abcdefghij"]
)
def test_a_secret_is_known_by_its_value_too(env: str) -> None:
    with pytest.raises(PlanError, match="--env-file") as raised:
        render_sbatch(JOB, replace(PLAIN, env=parse_env([env])))
    assert env.partition("=")[2] not in str(raised.value)
    with pytest.raises(PlanError, match="for all to read"):
        render_sbatch(JOB, replace(PLAIN, directives=("--export=ALL,HF_TOKEN=mine",)))
    with pytest.raises(PlanError, match="for all to read"):
        render_sbatch(replace(JOB, arguments=(f"name={env.partition('=')[2]}",)), PLAIN)


def sbatch(folder: Path, accepts: int) -> None:
    """A stand-in that takes so many jobs and refuses the next."""
    (folder / "count").write_text("0")
    body = f"""case " $* " in *--test-only*) exit 0 ;; esac
n=$(($(cat {folder}/count) + 1)); echo $n >{folder}/count
[ $n -le {accepts} ] || {{ echo 'sbatch: error: no' >&2; exit 1; }}
echo 7$n"""
    (folder / "sbatch").write_text(f"#!/bin/bash\n{body}\n")
    (folder / "sbatch").chmod(0o755)


def test_a_chain_that_ends_early_tells_the_jobs_it_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    sbatch(tmp_path, accepts=2)
    there, told = replace(PLAIN, workdir=str(tmp_path)), list[str]()
    with pytest.raises(MachineError, match="scancel 71 72") as raised:
        slurm_command(JOB, there, submit=True, chain=4, print_line=told.append)
    assert "2 of 4 jobs are submitted" in str(raised.value)
    assert told == ["submitted 1 of 4: job 71", "submitted 2 of 4: job 72"]
    sbatch(tmp_path, accepts=0)
    with pytest.raises(MachineError, match=r"no$"):
        slurm_command(JOB, there, submit=True, chain=4)


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
