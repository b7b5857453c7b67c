"""The wheel: it builds from what is committed, holds the package and its licence, and runs outside the clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path, home: Path) -> str:
    """Output of a command with nothing of this session's environment but the path."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools leaves folders behind where it builds."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    shutil.copytree(REPO / "phi3_dist", source / "phi3_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*build, "--wheel-dir", dist, source, cwd=source, home=dist)
    (built,) = dist.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    on_disk = {
        path.relative_to(REPO).as_posix()
        for path in (REPO / "phi3_dist").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == on_disk
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_runs_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """Its dependencies come from this environment through a .pth file; the package itself only from the wheel."""
    clean = tmp_path / "clean"
    run(sys.executable, "-m", "venv", "--without-pip", clean, cwd=tmp_path, home=tmp_path)
    python = clean / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run(*install, wheel, cwd=tmp_path, home=tmp_path)
    packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path, home=tmp_path).strip()
    )
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    where = run(python, "-c", "import phi3_dist; print(phi3_dist.__file__)", cwd=tmp_path, home=tmp_path)
    assert Path(where.strip()).is_relative_to(clean)
    program = clean / "bin" / "phi3-dist"
    assert "Usage: phi3-dist" in run(program, "--help", cwd=tmp_path, home=tmp_path)
    schema = json.loads(run(program, "config", "schema", cwd=tmp_path, home=tmp_path))
    assert {"model", "data"} <= set(schema["properties"])
