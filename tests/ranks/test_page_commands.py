"""The commands and the Python of README.md, the docs and CONTRIBUTING.md run, in order, outside the clone.

A page may use what its own blocks and README's have made. Processes are forked from one that has imported torch, with
one real one; in `make test-full` all pages run, and README's commands in real processes throughout.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import pages, warm
from tests.pages import REPO, Block

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]
COMMAND_TIMEOUT_S = 120
PROGRAMS = {"phi3-dist": "phi3_dist", "accelerate": "accelerate.commands.accelerate_cli"}
ALWAYS = ("docs/tutorial.md",)
"""Pages that run in `make test`, beside README.md."""


class Desk:
    """A folder with what a clone has, and rows of one's own; what is on PATH there."""

    def __init__(self, folder: Path, *, real: bool) -> None:
        self.folder = folder
        for name in ("configs", "launch"):
            (folder / name).symlink_to(REPO / name)
        (folder / "data").mkdir()
        shutil.copy(REPO / "configs/run/debug_chats.jsonl", folder / "data/chats.jsonl")
        for block in (block for page in pages.pages() for block in pages.blocks(page) if block.title):
            (folder / block.title).write_text(block.text, encoding="utf-8")
        self.python = sys.executable if real else warm.python()
        self.environment = warm.environment(
            PATH=os.pathsep.join([str(self._programs()), str(Path(self.python).parent), os.environ["PATH"]]),
            VIRTUAL_ENV=sys.prefix,
            XDG_CACHE_HOME=str(folder / "cache"),
        )

    def _programs(self) -> Path:
        """A folder with `phi3-dist` and `accelerate` that start this desk's Python."""
        programs = self.folder / "programs"
        programs.mkdir()
        for name, module in PROGRAMS.items():
            path = programs / name
            path.write_text(f'#!/bin/sh\nexec {shlex.quote(self.python)} -m {module} "$@"\n')
            path.chmod(0o755)
        return programs

    def run(self, block: Block) -> None:
        if block.language == "python":
            script = self.folder / "block.py"
            script.write_text(block.text, encoding="utf-8")
            self.call([self.python, str(script)], block)
            return
        for command in block.commands:
            self.call(shlex.split(command), block)

    def call(self, command: list[str], block: Block) -> None:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False, timeout=COMMAND_TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == block.exit_code, f"{block.page}: $ {shlex.join(command)}\n{done.stdout}"


def run_page(desk: Desk, page: str) -> list[Block]:
    run = [block for block in pages.blocks(page) if block.runs]
    for block in run:
        desk.run(block)
    return run


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """Where README's commands have run, in forked processes."""
    made = Desk(tmp_path_factory.mktemp("desk"), real=False)
    assert run_page(made, "README.md")
    return made


OTHERS = [page for page in pages.pages()[1:] if any(block.runs for block in pages.blocks(page))]


@pytest.mark.parametrize(
    "page", [page if page in ALWAYS else pytest.param(page, marks=pytest.mark.full) for page in OTHERS]
)
def test_what_a_page_shows_runs(desk: Desk, page: str) -> None:
    run_page(desk, page)


@pytest.mark.full
def test_what_the_readme_shows_runs_in_real_processes(tmp_path: Path) -> None:
    assert run_page(Desk(tmp_path, real=True), "README.md")
