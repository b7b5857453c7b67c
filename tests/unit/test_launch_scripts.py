"""The launchers, with stand-ins for python and accelerate that show what they were called with."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
CONFIGS = LAUNCH.parent / "configs" / "accelerate"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("slurm/*.sbatch")])
LAUNCHERS = [script for script in SCRIPTS if script.name != "environment.sh"]
LAUNCHER = ["python", "-m", "phi3_dist", "launch"]
NODE = ("--nodes", "2", "--node-rank", "1", "--processes-per-node", "4")


class Shell:
    """Runs a launcher with its programs replaced. `gpus` are those that nvidia-smi would list."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        # the run file is read before a launcher starts
        self.program("python", '[ "$3" = config ] || printf "%s\\n" python "$@"')
        self.gpus(0)

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (self.bin / name).chmod(0o755)

    def gpus(self, count: int) -> None:
        self.program("nvidia-smi", f'for i in $(seq {count}); do echo "GPU $i: Some GPU (UUID: x)"; done')

    def __call__(self, script: str, *arguments: str, **env: str) -> tuple[int, list[str], str]:
        """Exit code, lines of standard output, standard error."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "CONDA_", "CUDA_", "VIRTUAL_ENV"))}
        # an active environment, so that the repository's .venv doesn't come before the stand-ins
        clean.update(PATH=f"{self.bin}:/usr/bin:/bin:/usr/sbin:/sbin", VIRTUAL_ENV=str(self.bin.parent), **env)
        done = subprocess.run(
            ["bash", str(LAUNCH / script), *arguments], env=clean, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    # from the root, so that the `source=` directives are found
    done = subprocess.run(
        ["shellcheck", "-x", *map(str, SCRIPTS)], cwd=LAUNCH.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda path: path.name)
def test_help(shell: Shell, script: Path) -> None:
    code, lines, _ = shell(str(script.relative_to(LAUNCH)), "--help")
    assert code == 0
    assert lines[0].startswith("usage: ")
    assert script.name in lines[0]
    assert len(lines) > 3


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda path: path.name)
def test_no_run_file(shell: Shell, script: Path) -> None:
    arguments = NODE if script.name == "multinode.sh" else ()
    code, lines, error = shell(str(script.relative_to(LAUNCH)), *arguments)
    assert (code, lines) == (2, [])
    assert "no run file" in error


def test_arguments_pass_through(shell: Shell) -> None:
    arguments = ["run.yaml", "name=a b", "lora.targets=[a, b]", "--overwrite"]
    expected = ["-m", "phi3_dist", "train", *arguments]
    assert shell("single.sh", *arguments)[1] == ["python", *expected]
    assert shell("local.sh", "--processes", "3", *arguments)[1][-7:] == expected
    assert shell("multinode.sh", *NODE, "--master", "192.0.2.9", *arguments)[1][-7:] == expected
    assert shell("slurm/prepare.sbatch", *arguments)[1] == ["python", "-m", "phi3_dist", "prepare", *arguments]


@pytest.mark.parametrize("line", ["sweep:", '"sweep":', "sweep : {axes: {lora.r: [8, 16]}}"])
def test_a_sweep_file_is_swept(shell: Shell, tmp_path: Path, line: str) -> None:
    (tmp_path / "file.yaml").write_text(f"name: of a sweep\n{line}\n")
    (tmp_path / "run.yaml").write_text(f"name: x\n# {line}\ndata:\n  {line}\n")
    for name, verb in (("file.yaml", "sweep"), ("run.yaml", "train")):
        expected = ["-m", "phi3_dist", verb, str(tmp_path / name), "--resume"]
        for script, options in (
            ("single.sh", ()),
            ("local.sh", ()),
            ("local.sh", ("--processes", "3")),
            ("multinode.sh", (*NODE, "--master", "192.0.2.9")),
        ):
            assert shell(script, *options, *expected[3:])[1][-5:] == expected, (script, options)


@pytest.mark.parametrize("script", ["single.sh", "slurm/prepare.sbatch"])
def test_exit_codes_pass_through(shell: Shell, script: str) -> None:
    shell.program("python", "exit 7")
    assert shell(script, "run.yaml")[0] == 7


def test_exit_code_of_the_launcher_passes_through(shell: Shell) -> None:
    shell.program("python", '[ "$3" = config ] || exit 7')
    assert shell("local.sh", "--processes", "2", "run.yaml")[0] == 7
    assert shell("multinode.sh", *NODE, "--master", "192.0.2.9", "run.yaml")[0] == 7


def _option(lines: list[str], name: str) -> str | None:
    return lines[lines.index(name) + 1] if name in lines else None


@pytest.mark.parametrize(
    ("gpus", "options", "config", "processes"),
    [
        (4, [], "ddp", "4"),
        (4, ["--processes", "2"], "ddp", "2"),
        (4, ["--config", "zero3"], "zero3", "4"),
        (0, ["--config", "cpu_2"], "cpu_2", None),  # the config's own number
        (0, ["--processes", "3"], "cpu_2", "3"),
        (1, ["--config", "zero2"], "zero2", "1"),
    ],
)
def test_local(shell: Shell, gpus: int, options: list[str], config: str, processes: str | None) -> None:
    shell.gpus(gpus)
    code, lines, _ = shell("local.sh", *options, "run.yaml")
    assert (code, lines[:4]) == (0, LAUNCHER)
    assert _option(lines, "--config_file") == str(CONFIGS / f"{config}.yaml")
    assert _option(lines, "--num_processes") == processes


@pytest.mark.parametrize("gpus", [0, 1])
def test_local_with_one_process_needs_no_launcher(shell: Shell, gpus: int) -> None:
    shell.gpus(gpus)
    assert shell("local.sh", "run.yaml")[1] == ["python", "-m", "phi3_dist", "train", "run.yaml"]


def test_local_counts_visible_gpus(shell: Shell) -> None:
    shell.gpus(8)
    lines = shell("local.sh", "run.yaml", CUDA_VISIBLE_DEVICES="4,6,7")[1]
    assert _option(lines, "--num_processes") == "3"
    assert shell("local.sh", "run.yaml", CUDA_VISIBLE_DEVICES="")[1][0] == "python"


def test_multinode(shell: Shell) -> None:
    code, lines, _ = shell("multinode.sh", *NODE, "--master", "192.0.2.9", "--config", "zero3", "run.yaml")
    assert (code, lines[:4]) == (0, LAUNCHER)
    found = {name: _option(lines, f"--{name}") for name in ("num_machines", "machine_rank", "num_processes")}
    assert found == {"num_machines": "2", "machine_rank": "1", "num_processes": "8"}
    assert (_option(lines, "--main_process_ip"), _option(lines, "--main_process_port")) == ("192.0.2.9", "29500")
    assert _option(lines, "--deepspeed_multinode_launcher") == "standard"
    shell.gpus(3)
    lines = shell("multinode.sh", "--nodes", "2", "--node-rank", "0", "--master", "192.0.2.9", "run.yaml")[1]
    assert _option(lines, "--num_processes") == "6"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*NODE, "--master", "localhost"], "loopback"),
        ([*NODE, "--master", "127.0.1.1"], "loopback"),
        ([*NODE, "--master", "::1"], "loopback"),
        ([*NODE, "--master", "no-such-host.invalid"], "can't be resolved"),
        (NODE, "--master is needed"),
        (["--nodes", "2", "--node-rank", "2", "--master", "192.0.2.9"], "the last is 1"),
        (["--nodes", "two", "--node-rank", "0"], "--nodes must be a whole number from 1"),
        (["--nodes", "1", "--node-rank", "0"], "no GPU on this machine"),
        ([*NODE, "--config", "nothing"], "no Accelerate config 'nothing'"),
        (["--nodes"], "--nodes needs a value"),
    ],
)
def test_multinode_mistakes(shell: Shell, options: list[str], message: str) -> None:
    code, lines, error = shell("multinode.sh", *options, *([] if options[-1] == "--nodes" else ["run.yaml"]))
    assert (code, lines) == (2, [])
    assert message in error


def test_train_sbatch_outside_a_job(shell: Shell) -> None:
    code, _, error = shell("slurm/train.sbatch", "run.yaml")
    assert code == 2
    assert "submit it with sbatch" in error


def test_no_hyperparameters() -> None:
    """Topology and environment only: what a run computes stands in its run file."""
    for script in SCRIPTS:
        for word in ("optim.", "lora.", "micro_batch", "global_batch", "learning", "yq ", "yaml.load"):
            assert word not in script.read_text(), (script.name, word)


# --- restarts -----------------------------------------------------------------------------------------------------


def failing(shell: Shell, times: int, code: int = 1) -> None:
    """A launcher that fails so many times before it ends well, and shows each time what it was called with."""
    count = shell.bin / "count"
    count.write_text("0")
    body = f"""[ "$3" = launch ] || exit 0
n=$(($(cat {count}) + 1)); echo $n >{count}; printf "%s " "$@"; echo; [ $n -gt {times} ] || exit {code}"""
    shell.program("python", body)


def test_a_launcher_that_fails_is_started_again_with_resume(shell: Shell) -> None:
    failing(shell, 2)
    code, lines, error = shell("local.sh", "--config", "ddp", "--restarts", "3", "run.yaml", "optim.lr=1")
    assert code == 0
    assert len(lines) == 3
    assert all(line.endswith("train run.yaml optim.lr=1 --resume ") for line in lines)
    assert error.count("from the last checkpoint") == 2
    assert "restart 2 of 3" in error


def test_restarts_end_with_the_last_exit_code(shell: Shell) -> None:
    failing(shell, 9, code=137)
    arguments = ("--master", "192.0.2.9", "--port", "29700", "--restarts", "2", "run.yaml", "--resume")
    code, lines, _ = shell("multinode.sh", *NODE, *arguments)
    assert code == 137
    assert [_option(line.split(), "--main_process_port") for line in lines] == ["29700", "29701", "29702"]
    assert all(line.count("--resume") == 1 for line in lines)


@pytest.mark.parametrize("code", [2, 5, 9, 75, 130])
def test_what_would_end_the_same_way_is_not_started_again(shell: Shell, code: int) -> None:
    failing(shell, 9, code=code)
    found, lines, _ = shell("local.sh", "--config", "ddp", "--restarts", "3", "run.yaml")
    assert (found, len(lines)) == (code, 1)


def test_without_restarts_nothing_is_added(shell: Shell) -> None:
    failing(shell, 9)
    code, lines, _ = shell("local.sh", "--config", "ddp", "run.yaml")
    assert (code, len(lines)) == (1, 1)
    assert lines[0].endswith("train run.yaml ")


def test_a_mistake_in_the_run_file_starts_no_launcher(shell: Shell) -> None:
    shell.program("python", 'printf "%s\\n" "$@" >&2; exit 2')
    for script, options in (("local.sh", ("--config", "ddp")), ("multinode.sh", (*NODE, "--master", "192.0.2.9"))):
        code, lines, error = shell(script, *options, "--restarts", "2", "run.yaml", "optim.lr=x", "--overwrite")
        assert (code, lines) == (2, [])
        assert error.split() == ["-m", "phi3_dist", "config", "show", "run.yaml", "optim.lr=x"]


@pytest.mark.parametrize(("number", "handed_on"), [("TERM", "TERM"), ("HUP", "TERM"), ("USR1", "USR1"), ("INT", "INT")])
def test_a_signal_ends_the_restarts(shell: Shell, tmp_path: Path, number: str, handed_on: str) -> None:
    wait = f"""trap "exit 75" {handed_on}; : >{tmp_path}/up; while :; do sleep 0.05; done"""
    shell.program("python", f'[ "$3" = launch ] || exit 0; {wait}')
    with started(shell, tmp_path, "--restarts", "5") as process:
        await_up(process, tmp_path)
        process.send_signal(getattr(signal, f"SIG{number}"))
        assert process.wait(timeout=20) == 75
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.parametrize(("number", "code"), [("TERM", 75), ("HUP", 75), ("USR1", 75), ("INT", 130)])
def test_a_signal_while_the_run_file_is_read_starts_nothing(
    shell: Shell, tmp_path: Path, number: str, code: int
) -> None:
    shell.program("python", f'[ "$3" = config ] || exit 1; : >{tmp_path}/up; sleep 0.5')
    with started(shell, tmp_path) as process:
        await_up(process, tmp_path)
        process.send_signal(getattr(signal, f"SIG{number}"))
        assert process.wait(timeout=20) == code


def started(shell: Shell, folder: Path, *options: str) -> subprocess.Popen[str]:
    env = {"PATH": f"{shell.bin}:/usr/bin:/bin", "VIRTUAL_ENV": str(folder), "HOME": str(folder)}
    command = ["bash", str(LAUNCH / "local.sh"), "--config", "ddp", *options, "run.yaml"]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def await_up(process: subprocess.Popen[str], folder: Path) -> None:
    while not (folder / "up").exists():
        assert process.poll() is None
        time.sleep(0.02)
