"""The commands and the Python of README.md, the docs and CONTRIBUTING.md run, in order, outside the clone.

README's run in real processes: none of them imports torch. The docs' are forked from a process that has, in
`make test-full`; other pages may use what the tutorial made. `make test` holds all of them against the command line
(`test_readme.py`).
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

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(1200)]
COMMAND_TIMEOUT_S = 300
PROGRAMS = {"phi3-dist": "phi3_dist", "accelerate": "accelerate.commands.accelerate_cli"}
TUTORIAL = "docs/tutorial.md"


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
        self.done: set[str] = set()
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

    def run_page(self, page: str) -> None:
        run = [block for block in pages.blocks(page) if block.runs]
        assert run, f"{page} has nothing to run"
        for block in run:
            self.run(block)

    def run(self, block: Block) -> None:
        """What another page has run already, such as the first training of `debug.yaml`, is not run again."""
        if block.language == "python":
            script = self.folder / "block.py"
            script.write_text(block.text, encoding="utf-8")
            self.call([self.python, str(script)], block)
            return
        for command in block.commands:
            if command in self.done:
                continue
            self.call(shlex.split(command), block)
            self.done.add(command)

    def call(self, command: list[str], block: Block) -> None:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False, timeout=COMMAND_TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == block.exit_code, f"{block.page}: $ {shlex.join(command)}\n{done.stdout}"


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """Where the tutorial's commands have run."""
    made = Desk(tmp_path_factory.mktemp("desk"), real=False)
    made.run_page(TUTORIAL)
    return made


def test_what_the_readme_shows_runs(tmp_path: Path) -> None:
    Desk(tmp_path, real=True).run_page("README.md")


@pytest.mark.full
def test_what_the_tutorial_shows_runs(desk: Desk) -> None:
    for run in ("debug", "two", "two_again"):
        assert (desk.folder / "runs" / run / "adapter/adapter_model.safetensors").is_file(), run
        assert (desk.folder / "runs" / run / "curves.png").is_file(), run
    assert (desk.folder / "comparison.html").is_file()


OTHERS = [
    page
    for page in pages.pages()
    if page not in ("README.md", TUTORIAL) and any(block.runs for block in pages.blocks(page))
]


@pytest.mark.full
@pytest.mark.parametrize("page", OTHERS)
def test_what_a_page_shows_runs(desk: Desk, page: str) -> None:
    desk.run_page(page)
