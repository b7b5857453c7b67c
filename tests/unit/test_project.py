"""What the package writes for a project: `init`, `config accelerate`, and shipped files found without a clone."""

from __future__ import annotations

import errno
import json
import os
import shlex
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from typer.testing import CliRunner

from phi3_dist.cli import app
from phi3_dist.config.load import load_run
from phi3_dist.config.new_project import RUN_FILE, new_project
from phi3_dist.config.shipped_files import SHIPPED_ROOT, here_or_shipped, shipped_file, shipped_files
from phi3_dist.data.blocks import read_chats
from phi3_dist.errors import ConfigError, MachineError, ModelError, PlanError
from phi3_dist.machine.launch_request import read_command_line
from phi3_dist.machine.launcher import _with_deepspeed_file
from phi3_dist.planning.launch_configs import SHIPPED, deepspeed_json
from phi3_dist.planning.preview import launch_of_config
from phi3_dist.planning.support import STRATEGIES
from phi3_dist.planning.write_configs import write_configs

REPO = Path(__file__).resolve().parents[2]
MINI = "microsoft/Phi-3-mini-4k-instruct"


# --- what comes with the package ----------------------------------------------------------------------------------


def test_what_ships_is_the_repositorys_and_is_what_the_wheel_takes() -> None:
    files = shipped_files()
    assert set(SHIPPED) < set(map(str, files))
    assert {"configs/run/debug.yaml", "configs/sweep/lr_and_rank.yaml", "launch/local.sh"} < set(map(str, files))
    assert "launch/slurm/train.sbatch" in map(str, files)
    for name, path in files.items():
        assert path.resolve() == REPO / name  # a link, and no copy that could differ
    inside = {
        path for folder in ("accelerate", "deepspeed", "run", "sweep") for path in (REPO / "configs" / folder).iterdir()
    }
    assert {str(path.relative_to(REPO)) for path in inside} < set(map(str, files)), "a config without a pattern"
    packed = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    patterns = [p.removeprefix("config/shipped/") for p in packed["phi3_dist"] if p.startswith("config/shipped/")]
    assert {PurePosixPath(path.relative_to(REPO)) for p in patterns for path in REPO.glob(p)} == set(files)


def test_what_is_not_shipped_is_said() -> None:
    with pytest.raises(MachineError, match="comes with the package and is not there"):
        shipped_file("configs/run/nobody.yaml")


def test_a_shipped_config_is_found_by_its_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As messages name them: `use configs/accelerate/ddp.yaml`."""
    monkeypatch.chdir(tmp_path)
    name = Path("configs/accelerate/zero3.yaml")
    assert here_or_shipped(name) == SHIPPED_ROOT / name
    assert launch_of_config(name, 4).strategy == "zero3"
    asked = read_command_line(["phi3-dist", "launch", "--config_file", str(name), "-m", "phi3_dist"], tmp_path, {})
    assert asked is not None
    assert asked.asked_world_size == 8
    found = _with_deepspeed_file(["--config_file", str(name), "-m", "phi3_dist", "train", "--config_file", "x"])
    assert found[0] == "--deepspeed_config_file"
    assert json.loads(Path(found[1]).read_text("utf-8"))["zero_optimization"]["stage"] == 3
    assert found[2:] == ["--config_file", str(SHIPPED_ROOT / name), "-m", "phi3_dist", "train", "--config_file", "x"]
    for unknown in (Path("configs/accelerate/nobody.yaml"), Path("../configs/run/debug.yaml"), Path("mine.yaml")):
        assert here_or_shipped(unknown) == unknown
    name.parent.mkdir(parents=True)
    name.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\n")
    assert here_or_shipped(name) == name
    assert launch_of_config(name, None).strategy == "ddp"


def test_a_shipped_run_file_is_not_run_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are named from the project's folder: the way to it is told."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="phi3-dist init FOLDER lays a project out that has it"):
        load_run(Path("configs/run/debug.yaml"))
    with pytest.raises(ConfigError) as caught:
        load_run(Path("configs/run/nobody.yaml"))
    assert caught.value.problems[0].fix == ""


# --- init ---------------------------------------------------------------------------------------------------------


def test_a_new_project_has_all_that_a_clone_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(app, ["init", str(tmp_path / "my project")])
    assert done.exit_code == 0, done.output
    assert f"cd '{tmp_path / 'my project'}'" in done.output
    folder = tmp_path / "my project"
    monkeypatch.chdir(folder)
    run = load_run(Path(RUN_FILE))
    assert (run.model.source, run.save.folder) == (MINI, "runs/first")
    assert len(read_chats(run.data).train) > 40
    assert "prompt and completion" in (folder / RUN_FILE).read_text("utf-8")
    for name, path in shipped_files().items():
        if name.name != "demo.yaml":
            assert (folder / name).read_bytes() == path.read_bytes(), name
    assert load_run(Path("configs/run/debug.yaml")).data.train == "configs/run/debug_chats.jsonl"
    assert all(os.access(folder / "launch" / name, os.X_OK) for name in ("local.sh", "multinode.sh", "single.sh"))
    readme = (folder / "README.md").read_text("utf-8")
    assert readme.startswith("# my project\n")
    assert readme.count("\n") <= 16
    files = {path for path in folder.rglob("*") if path.is_file()}
    assert len(files) == len(shipped_files()) - 1 + 3


def test_nothing_of_a_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds README\.md already"):
        new_project(tmp_path, MINI)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "notes.txt"]
    (tmp_path / "README.md").unlink()
    assert new_project(tmp_path, MINI)[0] == tmp_path / RUN_FILE
    with pytest.raises(ConfigError, match="and 36 more already"):
        new_project(tmp_path, MINI)
    with pytest.raises(ConfigError, match="Not a directory"):
        new_project(tmp_path / "notes.txt" / "new", MINI)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_full_disk_leaves_no_half_of_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next try would find its files and refuse."""
    opened = Path.open

    def full(path: Path, *args: Any, **more: Any) -> Any:
        if path.name == "zero3.yaml" and path.is_relative_to(tmp_path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return opened(path, *args, **more)

    (tmp_path / "notes.txt").write_text("mine")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        with pytest.raises(ConfigError, match=r"No space left on device[\s\S]*make room"):
            new_project(tmp_path, MINI)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["notes.txt"]
    assert new_project(tmp_path, MINI)


def test_a_projects_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"did you mean microsoft/Phi-3\.5-mini-instruct\?"):
        new_project(tmp_path / "a", "phi-3.5-mini")
    assert not (tmp_path / "a").exists()
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    base = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "max_position_embeddings": 4096}
    base |= {**dict.fromkeys(sizes, 64), "num_attention_heads": 4}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(base))
    monkeypatch.chdir(tmp_path)
    new_project(Path("b"), "base")
    assert load_run(tmp_path / "b" / RUN_FILE).model.source == str(tmp_path / "base")  # as seen from the project


# --- config accelerate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_the_two_configs_belong_together(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["config", "accelerate", strategy, "--processes", "4", "--out", "with space"])
    assert done.exit_code == 0, done.output
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    command = shlex.split(done.output.splitlines()[-1])
    assert command[:3] == ["phi3-dist", "launch", "--config_file"]
    asked = read_command_line(command, tmp_path / "elsewhere", {})
    assert asked is not None
    assert asked.asked_world_size == 4
    config = load_config_from_file(command[3])
    assert launch_of_config(Path(command[3]), None).strategy == strategy
    if strategy.startswith("zero"):
        zero = Path(config.deepspeed_config["deepspeed_config_file"])
        assert zero == tmp_path / "with space" / "deepspeed" / f"{strategy}.json"
        assert zero.read_text("utf-8") == deepspeed_json(strategy)
    else:
        assert not (tmp_path / "with space" / "deepspeed").exists()


def test_several_nodes_and_a_cpu(tmp_path: Path) -> None:
    several = write_configs("zero3", processes=16, nodes=2, out=tmp_path)
    assert several.files[0].name == "zero3_multinode.yaml"
    assert "--machine_rank RANK --main_process_ip HEAD --main_process_port 29500" in several.command
    assert yaml.safe_load(several.files[0].read_text())["num_machines"] == 2
    cpu = write_configs("ddp", processes=2, cpu=True, out=tmp_path).files[0]
    assert cpu.read_text("utf-8") == SHIPPED["configs/accelerate/cpu_2.yaml"]
    assert write_configs("single", processes=1, out=tmp_path).files[0].name == "single_gpu.yaml"


def test_written_configs_replace_nothing_unasked(tmp_path: Path) -> None:
    first = write_configs("zero2", processes=2, out=tmp_path)
    assert write_configs("zero2", processes=2, out=tmp_path) == first  # the same again is no change
    first.files[1].write_text("{}")
    with pytest.raises(PlanError, match=r"zero2\.yaml: exists and holds something else") as caught:
        write_configs("zero2", processes=4, out=tmp_path)
    assert len(caught.value.problems) == 2
    assert "num_processes: 2" in first.files[0].read_text()
    write_configs("zero2", processes=4, out=tmp_path, overwrite=True)
    assert "num_processes: 4" in first.files[0].read_text()
    with pytest.raises(PlanError, match="cannot be written"):
        write_configs("ddp", processes=2, out=first.files[0])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["zerro3", "--processes", "2"], "did you mean zero3?"),
        (["FSDP", "--processes", "2"], "did you mean fsdp2?"),
        (["megatron", "--processes", "2"], "There are single, ddp, zero1"),
        (["single", "--processes", "2"], "single has one process on one node, not 2 on 1"),
        (["ddp", "--processes", "3", "--nodes", "2"], "do not spread evenly over 2"),
        (["zero2", "--processes", "2", "--cpu"], "is for single and ddp"),
        (["zero2"], "no GPU is seen here"),
    ],
)
def test_one_message_for_a_wrong_name(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("phi3_dist.machine.own_cards.own_cards", tuple)
    done = CliRunner().invoke(app, ["config", "accelerate", *words])
    assert isinstance(done.exception, PlanError)
    assert says in str(done.exception)
    assert not any(tmp_path.iterdir())
