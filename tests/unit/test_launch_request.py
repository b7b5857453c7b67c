"""What a launcher was asked for, from its command line: parsed, and found above a real process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from phi3_dist.machine import launch_request as module
from phi3_dist.machine.launch_request import LaunchRequest, cpu_was_asked, launch_request, read_command_line

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("accelerate launch --num_processes 2 -m phi3_dist train run.yaml", 2),
        ("/v/bin/python3 /v/bin/accelerate launch --cpu --num-processes=4 -m phi3_dist train run.yaml", 4),
        ("accelerate-launch --num_processes 3 train.py", 3),
        ("python -m accelerate.commands.launch --num_processes 2 train.py", 2),
        ("python -m accelerate.commands.accelerate_cli launch --num_processes 2 train.py", 2),
        ("torchrun --nproc_per_node 2 -m phi3_dist train run.yaml", 2),
        ("torchrun --nproc-per-node=4 --nnodes=2 train.py", 8),
        ("/v/bin/python /v/bin/torchrun train.py", 1),
        ("python -m torch.distributed.run --nproc_per_node 2 train.py", 2),
        ("python3.11 -u /v/bin/accelerate launch --num_processes 2 train.py", 2),
        ("python -m phi3_dist launch --num_processes 2 -m phi3_dist train run.yaml", 2),
        ("/v/bin/python3 /v/bin/phi3-dist launch --num_processes=3 -m phi3_dist train run.yaml", 3),
        ("phi3-dist launch -m phi3_dist train run.yaml", None),
        # no launcher, or one that doesn't say
        ("python -m phi3_dist train run.yaml", None),
        ("python train.py accelerate launch --num_processes 2", None),
        ("vim accelerate launch.py", None),
        ("accelerate config", None),
        ("accelerate launch -m phi3_dist train --num_processes 9", None),
        ("accelerate launch train.py --num_processes 9", None),
        ("accelerate launch --num_processes", None),
        ("torchrun --nproc_per_node gpu train.py", None),
        ("torchrun --nnodes 1:4 --nproc_per_node 2 train.py", None),
        ("python -m", None),
        ("", None),
    ],
)
def test_command_lines(line: str, asked: int | None, tmp_path: Path) -> None:
    request = read_command_line(line.split(), tmp_path, {"HF_HOME": str(tmp_path)})
    assert (request and request.asked_world_size) == asked


def test_config_files(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    (tmp_path / "one.yaml").write_text("distributed_type: 'NO'\n")
    (tmp_path / "odd.yaml").write_text("num_processes: many\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")

    def asked(*words: str) -> LaunchRequest | None:
        return read_command_line(["accelerate", "launch", *words, "x.py"], tmp_path, {"HF_HOME": str(tmp_path)})

    two = asked("--config_file", "two.yaml")
    assert two is not None
    assert two.asked_world_size == 2
    assert two.asked_by.endswith("two.yaml: num_processes")
    assert asked("--config_file=two.yaml", "--num_processes", "4") == (4, "accelerate launch --num_processes 4")
    one = asked("--config_file", "one.yaml")
    assert one is not None
    assert one.asked_world_size == 1
    for name in ("odd.yaml", "broken.yaml", "absent.yaml"):
        assert asked("--config_file", name) is None


def test_default_config_counts_unless_cpu_is_asked(tmp_path: Path) -> None:
    folder = tmp_path / "accelerate"
    folder.mkdir()
    (folder / "default_config.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 3\n")
    environ = {"HF_HOME": str(tmp_path)}
    request = read_command_line(["accelerate", "launch", "x.py"], tmp_path, environ)
    assert request is not None
    assert request.asked_world_size == 3
    assert read_command_line(["accelerate", "launch", "--cpu", "x.py"], tmp_path, environ) is None


LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, "child.py"]).returncode)
"""
CHILD = """
import json, os
from phi3_dist.machine.launch_request import cpu_was_asked, launch_request
print(json.dumps([launch_request(), cpu_was_asked({})]))
"""


@pytest.mark.parametrize(
    ("options", "asked", "cpu"),
    [
        (["--cpu", "--num_processes", "2"], [2, "accelerate launch --num_processes 2"], True),
        (["--config_file", "two.yaml"], [2, "two.yaml: num_processes"], True),
        (["--num_processes", "5"], [5, "accelerate launch --num_processes 5"], False),
    ],
)
def test_found_above_a_real_process(tmp_path: Path, options: list[str], asked: list[object], cpu: bool) -> None:
    """A stand-in by the name of `accelerate`, which starts one child whatever it was asked for."""
    (tmp_path / "accelerate").write_text(LAUNCHER)
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "two.yaml").write_text("distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\n")
    command = [sys.executable, "accelerate", "launch", *options, "-m", "phi3_dist"]
    environ = {**os.environ, "PYTHONPATH": str(REPO), "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environ, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == [asked, cpu]


def test_cpu_variable() -> None:
    assert cpu_was_asked({"ACCELERATE_USE_CPU": "True"})


class Gone:
    """A process that vanishes while it is looked at, or that another user owns."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def cmdline(self) -> list[str]:
        raise self.error


@pytest.mark.parametrize(
    "error", [psutil.NoSuchProcess(1), psutil.AccessDenied(1), psutil.ZombieProcess(1), FileNotFoundError(), OSError()]
)
def test_processes_that_cannot_be_read_are_passed_over(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class Here:
        def parents(self) -> list[Gone]:
            return [Gone(error)]

    class Nowhere:
        def parents(self) -> list[Gone]:
            raise error

    monkeypatch.setattr(module.psutil, "Process", Here)
    assert launch_request() is None
    assert cpu_was_asked({}) is False
    monkeypatch.setattr(module.psutil, "Process", Nowhere)
    assert launch_request() is None
