"""What the toolkit never does: run what it reads, write where it shouldn't, tell what it was trusted with."""

from __future__ import annotations

import ast
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from phi3_dist.errors import PlanError, RunFolderError
from phi3_dist.planning.sbatch_script import parse_env
from phi3_dist.training.run_folder import RunFolder
from tests import warm

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "phi3_dist"
SECRETS = {
    "HF_TOKEN": "hf_sEcReTsEcReT1",
    "HUGGING_FACE_HUB_TOKEN": "hf_sEcReTsEcReT2",
    "WANDB_API_KEY": "sEcReTsEcReT3",
    "MLFLOW_TRACKING_PASSWORD": "sEcReTsEcReT4",
    "AWS_SECRET_ACCESS_KEY": "sEcReTsEcReT5",
}
SMALL = (
    f"data.train={REPO / 'configs/run/debug_chats.jsonl'}",
    "train.max_steps=2",
    "save.every=1",
    "model.precision=fp32",
)


# --- the code -----------------------------------------------------------------------------------------------------


def calls() -> Iterator[tuple[str, ast.Call]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                yield path.relative_to(REPO).as_posix(), node


def test_nothing_that_is_read_can_run() -> None:
    found, seen = [], 0
    for place, call in calls():
        name, seen = ast.unparse(call.func), seen + 1
        keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
        if name == "torch.load" and keywords.get("weights_only") != "True":
            found.append(f"{place}: {name} without weights_only")
        if name in {"eval", "exec", "compile", "yaml.load", "yaml.unsafe_load", "pickle.load", "pickle.loads"}:
            found.append(f"{place}: {name}")
        if name in {
            "joblib.load",
            "marshal.loads",
            "shelve.open",
            "runpy.run_path",
            "os.system",
            "shutil.unpack_archive",
        }:
            found.append(f"{place}: {name}")
        if name == "np.load" and keywords.get("allow_pickle", "False") != "False":
            found.append(f"{place}: pickled arrays")
        if keywords.get("trust_remote_code", "False") != "False" or keywords.get("shell", "False") != "False":
            found.append(f"{place}: {name} with {keywords}")
        if name.startswith(("tarfile.", "zipfile.")):
            found.append(f"{place}: {name} can unpack outside of its folder")
    assert seen > 1000
    assert found == []


# --- secrets --------------------------------------------------------------------------------------------------------


def phi3_dist(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = warm.environment(**SECRETS, PYTHONPATH=str(REPO), XDG_CACHE_HOME=str(cwd / "cache"))
    command = [warm.python(), "-m", "phi3_dist", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, umask=0o027)


def told(text: str) -> list[str]:
    return [name for name, secret in SECRETS.items() if secret in text]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which a run was made under umask 027, with secrets in its environment; and what was printed."""
    folder = tmp_path_factory.mktemp("home")
    done = phi3_dist("train", str(REPO / "configs/run/debug.yaml"), *SMALL, "save.folder=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "run/adapter/adapter_model.safetensors").is_file()
    return folder, done.stdout + done.stderr


def test_secrets_are_in_no_file_and_no_line_of_a_run(trained: tuple[Path, str]) -> None:
    folder, output = trained
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 15
    assert told(output) == []
    assert {p.name: told(p.read_bytes().decode("latin-1")) for p in files} == {p.name: [] for p in files}


def test_secrets_are_in_no_error_script_or_diagnosis(tmp_path: Path) -> None:
    run = str(REPO / "configs/run/debug.yaml")
    script = tmp_path / "job.sbatch"
    for arguments, code in (
        (("train", run, "model.source=no/such-model"), None),
        (("train", run, "lora.targets=[q_proj]"), None),
        (("slurm", run, "--processes-per-node", "2", "--script", str(script), "--time", "1h"), 0),
        (("doctor",), None),
        (("plan", run, *SMALL, "--device", "cpu"), 0),
    ):
        done = phi3_dist(*arguments, cwd=tmp_path)
        assert code is None or done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout + done.stderr
        assert told(done.stdout + done.stderr) == []
    assert told(script.read_text()) == []


def test_a_secret_is_refused_as_a_line_of_a_script() -> None:
    with pytest.raises(PlanError, match="--env-file") as raised:
        parse_env(["HF_TOKEN=hf_sEcReT", "WANDB_API_KEY=sEcReT", "NCCL_DEBUG=INFO"])
    assert [p.what.split()[0] for p in raised.value.problems] == ["HF_TOKEN", "WANDB_API_KEY"]
    assert "sEcReT" not in str(raised.value)
    assert parse_env(["NCCL_DEBUG=INFO"]) == (("NCCL_DEBUG", "INFO"),)


# --- files ----------------------------------------------------------------------------------------------------------


def test_files_have_the_users_umask(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    wrong = {}
    for path in (folder / "run").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode != (0o750 if path.is_dir() else 0o640):
            wrong[str(path.relative_to(folder))] = oct(mode)
    assert wrong == {}


def test_a_run_folder_that_is_a_link_out_of_its_parent_is_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.yaml").write_text("name: precious\n")
    parent = tmp_path / "runs"
    parent.mkdir()
    (parent / "debug").symlink_to(elsewhere)
    folder = RunFolder(parent / "debug")
    with pytest.raises(RunFolderError, match="is a link to"):
        folder.claim(overwrite=True)
    with pytest.raises(RunFolderError, match="is a link to"):
        folder.reopen()
    assert [p.name for p in elsewhere.iterdir()] == ["config.yaml"]


def test_a_folder_of_runs_may_be_a_link_and_a_link_beside_is_followed(tmp_path: Path) -> None:
    """As people keep runs/ on a scratch disk."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    with (first := RunFolder(tmp_path / "runs" / "one")).recording_failure(active=True):
        first.claim(overwrite=False)
    (tmp_path / "scratch" / "latest").symlink_to("one")
    RunFolder(tmp_path / "runs" / "latest").reopen()


@pytest.mark.parametrize("name", ["checkpoints", "adapter", "metrics.jsonl", ".config.yaml.tmp"])
def test_a_link_inside_a_run_folder_is_refused(name: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("name: x\n")
    (run / name).symlink_to(outside)
    with pytest.raises(RunFolderError, match=f"{name}.* is a link") as raised:
        RunFolder(run).reopen()
    assert raised.value.problems[0].fix == "remove it"
