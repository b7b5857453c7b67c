"""The wheel: it builds from what is committed, holds the package and its licence, and suffices outside the clone."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

from phi3_dist.config.shipped_files import shipped_files

REPO = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path, home: Path, **more: str) -> str:
    """Output of a command with nothing of this session's environment but the path, and `more`."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", **more}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools leaves folders behind where it builds."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("phi3_dist", "configs", "launch"):
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*build, "--wheel-dir", dist, source, cwd=source, home=dist)
    (built,) = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`phi3-dist` in a clean environment, whose dependencies come from this one through a .pth file."""
    clean = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", clean, cwd=clean, home=clean)
    python = clean / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run(*install, wheel, cwd=clean, home=clean)
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(python, "-c", asked, cwd=clean, home=clean).strip())
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import phi3_dist; print(phi3_dist.__file__)", cwd=clean, home=clean)
    assert Path(where.strip()).is_relative_to(clean)
    return clean / "bin" / "phi3-dist"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        shipped = {f"phi3_dist/config/shipped/{name}": path for name, path in shipped_files().items()}
        assert all(archive.read(name) == path.read_bytes() for name, path in shipped.items())
    on_disk = {
        path.relative_to(REPO).as_posix()
        for path in (REPO / "phi3_dist").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and "shipped" not in path.parts
    }
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == on_disk | set(shipped)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_suffices_in_an_empty_folder(program: Path, tmp_path: Path) -> None:
    def said(*words: str | Path) -> str:
        return run(program, *words, cwd=tmp_path, home=tmp_path)

    assert "Usage: phi3-dist" in said("--help")
    assert {"model", "data"} <= set(json.loads(said("config", "schema"))["properties"])
    said("init", "project")
    for name, path in shipped_files().items():
        if name.name != "demo.yaml":
            assert (tmp_path / "project" / name).read_bytes() == path.read_bytes()
    command = shlex.split(said("config", "accelerate", "zero2", "--processes", "2", "--out", "own").splitlines()[-1])
    config = yaml.safe_load(Path(command[command.index("--config_file") + 1]).read_text("utf-8"))
    zero = Path(config["deepspeed_config"]["deepspeed_config_file"])
    assert json.loads(zero.read_text("utf-8"))["zero_optimization"]["stage"] == 2


SMALL = ("model.source=tiny-random", "data.pack_length=512", "train.global_batch=6", "model.precision=fp32")


def environment(program: Path, extensions: Path) -> dict[str, str]:
    path = os.pathsep.join((str(program.parent), str(Path(sys.executable).parent), os.environ["PATH"]))
    return {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCH_EXTENSIONS_DIR": str(extensions)}


@pytest.mark.full
@pytest.mark.ranks
@pytest.mark.timeout(900)
def test_zero2_on_two_processes_with_what_the_package_wrote(program: Path, tmp_path: Path, deepspeed_ops: Path) -> None:
    """From an empty folder: `init`, `config accelerate`, and the launch that it prints."""
    project = tmp_path / "project"
    run(program, "init", "project", cwd=tmp_path, home=tmp_path)
    words = ["config", "accelerate", "zero2", "--processes", "2", "--overwrite"]
    command = shlex.split(run(program, *words, cwd=project, home=tmp_path).splitlines()[-1])
    assert command[-1] == "RUN.yaml"
    more = environment(program, deepspeed_ops)
    run(program, *command[1:-1], "first.yaml", *SMALL, cwd=project, home=tmp_path, **more)
    plan = json.loads((project / "runs/first/plan.json").read_text("utf-8"))
    assert (plan["strategy"], plan["world_size"]) == ("zero2", 2)
    assert (project / "runs/first/adapter/adapter_model.safetensors").is_file()


@pytest.mark.full
@pytest.mark.ranks
@pytest.mark.timeout(900)
def test_accelerate_finds_a_projects_deepspeed_file_from_another_folder(
    program: Path, tmp_path: Path, deepspeed_ops: Path
) -> None:
    """The config names it by a relative path, as shipped ones do; its name is none of theirs."""
    run(program, "init", "project", cwd=tmp_path, home=tmp_path)
    configs, away = tmp_path / "project" / "configs", tmp_path / "away"
    (configs / "deepspeed/mine.json").write_bytes((configs / "deepspeed/zero2.json").read_bytes())
    text = (configs / "accelerate/zero2.yaml").read_text("utf-8").replace("deepspeed/zero2.json", "deepspeed/mine.json")
    (configs / "accelerate/mine.yaml").write_text(text)
    away.mkdir()
    start = [program.parent / "python", "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    start += ["../project/configs/accelerate/mine.yaml", "--num_processes", "2", "-m", "phi3_dist", "train"]
    rows = f"data.train={tmp_path / 'project/data/chats.jsonl'}"
    more = environment(program, deepspeed_ops)
    run(*start, "../project/first.yaml", rows, *SMALL, "save.folder=run", cwd=away, home=tmp_path, **more)
    plan = json.loads((away / "run/plan.json").read_text("utf-8"))
    assert (plan["strategy"], plan["world_size"]) == ("zero2", 2)
