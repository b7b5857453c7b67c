"""The container recipes: linted, pinned, without root, and installing what the pages say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
CONTAINERS = REPO / "launch" / "containers"
DOCKERFILES = sorted(CONTAINERS.glob("*.Dockerfile"))
RECIPES = sorted(CONTAINERS.iterdir())


def instructions(path: Path) -> list[tuple[str, str]]:
    """Name and words of each instruction of a Dockerfile, its lines joined."""
    lines = [line for line in path.read_text("utf-8").splitlines() if line.strip() and not line.startswith("#")]
    found = [line.partition(" ") for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()]
    return [(name, words) for name, _, words in found]


HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def test_there_are_three() -> None:
    assert [path.name for path in RECIPES] == ["cpu.Dockerfile", "cuda.Dockerfile", "cuda.def"]


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint(path: Path) -> None:
    done = subprocess.run([str(HADOLINT), path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_base_is_pinned_and_what_was_not_built_is_said(path: Path) -> None:
    text = path.read_text("utf-8")
    (base,) = re.findall(r"^(?:FROM|From:) (\S+)$", text, flags=re.MULTILINE)
    assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+-[\w.-]+", base), base
    assert "latest" not in text
    assert "Never built and never run" in text.replace("\n# ", " ")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_no_root_and_only_files_of_the_repository(path: Path) -> None:
    found = instructions(path)
    users = [words for name, words in found if name == "USER"]
    assert users == ["10001"]
    after = found[[name for name, _ in found].index("USER") :]
    assert not any("apt-get" in words for _, words in after)
    copied = [word for name, words in found if name == "COPY" for word in words.split()[1:-1]]
    assert len(copied) == 7
    assert all((REPO / word).exists() for word in copied)
    assert ("ENTRYPOINT", '["phi3-dist"]') in found


def test_they_install_what_the_pages_say() -> None:
    """`pip install '.[gpu]'` of a clone; and Python is one that the package supports."""
    pages = "".join(path.read_text("utf-8") for path in (REPO / "README.md", *(REPO / "docs").glob("*.md")))
    wanted = {"cuda.Dockerfile": "'.[gpu]'", "cuda.def": "'.[gpu]'", "cpu.Dockerfile": "'.[deepspeed]'"}
    for name, words in wanted.items():
        text = (CONTAINERS / name).read_text("utf-8")
        assert f"--constraint constraints.txt {words}\n" in text.replace(" \\\n", "\n"), name
    extras = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert {"gpu", "deepspeed"} <= set(extras)
    install = REPO / "docs" / "install.md"
    assert not install.exists() or "pip install '.[gpu]'" in install.read_text("utf-8")
    supported = re.findall(r"Supported Python: 3\.(\d+) to 3\.(\d+)", pages)[0]
    for path in RECIPES:
        for minor in re.findall(r"python:?3\.(\d+)", path.read_text("utf-8")):
            assert int(supported[0]) <= int(minor) <= int(supported[1]), path.name


def test_apptainer_and_docker_do_the_same() -> None:
    docker, apptainer = ((CONTAINERS / name).read_text("utf-8") for name in ("cuda.Dockerfile", "cuda.def"))
    for pattern in (r"apt-get install .*?(?=\n|\s*\\\n)", r"pip install .*", r"nvidia/cuda:\S+"):
        assert re.findall(pattern, docker)[-1].strip() == re.findall(pattern, apptainer)[-1].strip()
    copied = {
        word
        for name, words in instructions(CONTAINERS / "cuda.Dockerfile")
        if name == "COPY"
        for word in words.split()[1:-1]
    }
    files = re.search(r"%files\n(.*?)\n\n", apptainer, flags=re.DOTALL)
    assert files is not None
    assert {line.split()[0] for line in files[1].splitlines()} == copied
    sections = re.findall(r"^%(\w+)$", apptainer, flags=re.MULTILINE)
    assert sections == ["files", "post", "environment", "runscript", "test"]
    post = apptainer.partition("%post\n")[2].partition("\n%environment")[0]
    checked = subprocess.run(["bash", "-n"], input=post, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
