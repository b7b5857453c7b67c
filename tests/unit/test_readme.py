"""README.md and CONTRIBUTING.md are true: their commands run, their tables are the code's, their tree the disk's.

Every line of a ```bash block is run here, in order, in a folder of its own; or it stands in `RUN_ELSEWHERE` with the
place that runs it.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from phi3_dist import errors
from phi3_dist.cli import app
from phi3_dist.config.load import load_run

REPO = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md")
COMMAND_TIMEOUT_S = 120

RUN_ELSEWHERE = {
    "make setup": "Makefile: setup",  # this session runs in what it made
    ". .venv/bin/activate": "Makefile: setup",
    "make test": "Makefile: test",  # this session
    **dict.fromkeys(
        (
            "phi3-dist slurm configs/run/debug.yaml save.folder=runs/two_nodes --resume --nodes 2 "
            "--processes-per-node 1 --config_file configs/accelerate/cpu_2.yaml --time 1h --submit",
            "phi3-dist slurm configs/run/debug.yaml save.folder=runs/sweep --array optim.lr=1e-2,1e-3 "
            "--processes-per-node 1 --submit",
            "phi3-dist slurm configs/run/debug.yaml save.folder=runs/long --resume --chain 2 --time 1h "
            "--processes-per-node 1 --submit",
            "phi3-dist logs runs/two_nodes --rank 1",
        ),
        "tests/slurm/test_slurm_readme.py::test_the_commands_of_the_readme",
    ),
    **dict.fromkeys(
        (
            'phi3-dist generate runs/debug --prompt "Two lattes to go, please" --max-new-tokens 32',
            "phi3-dist generate runs/debug questions.jsonl --output answers.jsonl",
            "phi3-dist chat runs/debug",
        ),
        "tests/unit/test_answers.py::test_the_verbs",
    ),
    "make demo": "tests/ranks/test_demo.py::test_the_demo_learns_the_tickets",  # minutes
    ".venv/bin/pre-commit install": "tests/unit/test_house.py::test_hooks_run_the_tools_of_the_virtual_environment",
}


def blocks(page: str, language: str) -> list[str]:
    text = (REPO / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Each command once, in the order of the pages; a trailing backslash joins lines."""
    lines = [
        line for page in PAGES for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()
    ]
    return list(dict.fromkeys(line.strip() for line in lines if line.strip() and not line.startswith("#")))


def section(page: str, heading: str) -> str:
    text = (REPO / page).read_text(encoding="utf-8")
    match = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert match is not None, f"{page} has no section '{heading}'"
    return match[1]


def verbs(group: Any, above: str = "phi3-dist") -> set[str]:
    """Full names of all commands below a group."""
    found: set[str] = set()
    for name, command in getattr(group, "commands", {}).items():
        path = f"{above} {name}"
        found |= verbs(command, path) if hasattr(command, "commands") else {path}
    return found


def test_the_first_command_is_the_demo() -> None:
    assert commands()[0] == "make demo"


def test_what_is_run_elsewhere_is_in_the_pages_and_there() -> None:
    assert set(RUN_ELSEWHERE) <= set(commands())
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    for command, place in RUN_ELSEWHERE.items():
        if place.startswith("Makefile: "):
            assert re.search(rf"^{place.removeprefix('Makefile: ')}:", makefile, flags=re.MULTILINE), command
        else:
            path, _, name = place.partition("::")
            assert f"def {name}(" in (REPO / path).read_text(encoding="utf-8"), command


def test_every_make_target_that_the_pages_name_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z0-9-]+)`", (REPO / page).read_text("utf-8"))}
    assert named
    assert named <= targets


@pytest.mark.ranks
@pytest.mark.timeout(600)
def test_every_other_command_runs(tmp_path: Path) -> None:
    """In order, since later commands look at what earlier ones made, and outside the clone, which stays as it is."""
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(REPO / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    here = [command for command in commands() if command not in RUN_ELSEWHERE]
    assert len(here) > 3
    for command in here:
        done = subprocess.run(
            shlex.split(command),
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=COMMAND_TIMEOUT_S,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}"
    for run in re.findall(r"runs/\w+", " ".join(here)):
        assert (tmp_path / run / "adapter" / "adapter_model.safetensors").is_file(), run
        assert (tmp_path / run / "curves.png").is_file(), run


def test_the_run_file_example_is_a_run_file(tmp_path: Path) -> None:
    (example,) = blocks("README.md", "yaml")
    run = tmp_path / "example.yaml"
    run.write_text(example, encoding="utf-8")
    config = load_run(run)
    shown = yaml.safe_load(example)
    assert config.model.source == shown["model"]["source"]
    assert config.train.eval_every == shown["train"]["eval_every"]


def test_the_table_of_verbs_is_the_command_line() -> None:
    table = section("README.md", "Verbs")
    rows = re.findall(r"^\| `(phi3-dist [a-z ]+?)(?: [A-Z\[-].*?)?` \|", table, flags=re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == verbs(typer.main.get_command(app))


def test_the_table_of_exit_codes_is_the_exception_tree() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)`", section("README.md", "Exit codes"), flags=re.MULTILINE)
    tree = {c.__name__: c.exit_code for c in errors.Phi3DistError.__subclasses__()}
    assert {name: int(code) for code, name in rows} == tree


def tree_of(page: str) -> set[str]:
    """Paths of the annotated tree; folders end in a slash."""
    (tree,) = re.findall(r"^```text\n(.*?)^```$", section(page, "What is where"), flags=re.MULTILINE | re.DOTALL)
    above: list[str] = []
    paths: set[str] = set()
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        above = [*above[:depth], line.split()[0]]
        paths.add("".join(above))
    return paths


def test_the_tree_is_the_disks() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPO, capture_output=True, text=True, check=True,
    )  # fmt: skip
    files = [Path(line) for line in listed.stdout.splitlines() if (REPO / line).exists()]
    tree = tree_of("README.md")
    missing = {path for path in tree if not (REPO / path).exists()}
    assert not missing, "in the tree, not on the disk"

    top = {file.parts[0] + ("/" if len(file.parts) > 1 else "") for file in files} - {".gitignore"}
    assert top <= tree, "on the disk, not in the tree"
    rooms = {f"{file.parts[0]}/{file.parts[1]}/" for file in files if len(file.parts) > 2}
    rooms = {room for room in rooms if room.startswith(("phi3_dist/", "tests/", "configs/"))}
    assert rooms <= tree, "rooms without a line in the tree"


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", (REPO / page).read_text(encoding="utf-8")):
            assert (REPO / target).exists(), f"{page}: {target}"
