"""The commands of docs/slurm.md, as they are written there, on a real Slurm."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_dist.report.runs import list_runs
from tests.pages import blocks
from tests.slurm.conftest import REPO, Desk

pytestmark = [pytest.mark.slurm, pytest.mark.full, pytest.mark.timeout(600)]


def commands() -> list[str]:
    shown = [block for block in blocks("docs/slurm.md") if block.language == "bash" and block.mark != "needs a GPU"]
    return [command for block in shown for command in block.commands if "mine.yaml" not in command]  # a reader's own


def test_the_commands_of_the_page(desk: Desk) -> None:
    """From a folder with a clone's configs and .venv; each submitted job ends before the next command."""
    for name in ("configs", "launch"):
        (desk.folder / name).symlink_to(REPO / name)
    (desk.folder / ".venv").symlink_to(sys.prefix)
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(desk.folder / "cache"),
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    said = ""
    for command in commands():
        done = subprocess.run(
            shlex.split(command), cwd=desk.folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
        said += done.stdout
        for line in re.findall(r"^job +(.*)$", done.stdout, flags=re.MULTILINE):
            for job_id in line.split(" → "):
                assert set(desk.wait(job_id, seconds=200)) == {"COMPLETED"}, desk.output(job_id)
    found = sorted(list_runs(desk.folder / "runs"), key=lambda row: row.folder.name)
    assert [(row.folder.name, row.state) for row in found] == [
        (name, "finished") for name in ("long", "sweep-optim.lr_1e-2", "sweep-optim.lr_1e-3", "two_nodes")
    ]
    assert "has finished already" in desk.output(re.findall(r"^job +\d+ → (\d+)$", said, flags=re.MULTILINE)[0])
