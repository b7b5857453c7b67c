"""A run folder holds a run and nothing else is ever touched: what may be replaced, who may write, what a move does."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from phi3_dist.config.load import load_run
from phi3_dist.errors import ModelError, RunFolderError
from phi3_dist.training import run_folder_contents as belongings
from phi3_dist.training.preflight.before_torch import check_before_torch
from phi3_dist.training.run_folder import RunFolder
from phi3_dist.training.run_folder_contents import drop_replaced, move_aside, put_back
from tests.ranks.launcher import REPO

LEFT = """.phi3_dist_run config.yaml plan.json environment.json heartbeat.json exit.json metrics.jsonl curves.png
evaluation.json
report.html start.safetensors profile/table.txt profile/trace.json.gz logs/phi3_dist/events.out.tfevents.1.host.2.0
logs/phi3_dist/1.5/hparams.yml logs/terminal/rank_000.log logs/wandb/run-1/files/output.log
adapter/adapter_model.safetensors adapter/adapter_config.json
adapter/README.md adapter/base_facts.json adapter/checksums.json adapter/tokenizer.json adapter/chat_template.jinja
checkpoints/step_000004/state.safetensors checkpoints/step_000004/trainer.json checkpoints/step_000004/manifest.json
checkpoints/damaged-step_000003/state.safetensors checkpoints/step_000005.tmp/.tmpa1B2c3"""
"""As a run leaves them; tests/unit/test_folder_runs.py holds a whole run against the same patterns."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    for path in LEFT.split():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)
    belongings.mark(folder)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs" / "run"))


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below with its bytes, every folder; without the lock, which any start may leave."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}
    return {path: data for path, data in found.items() if path != ".lock"}


def claimed(folder: Path, *, inputs: tuple[str, ...] = (), overwrite: bool = False) -> RunFolder:
    taken = RunFolder(folder, inputs=inputs)
    taken.claim(overwrite=overwrite)
    return taken


# --- what may be replaced -------------------------------------------------------------------------------------------


def test_a_folder_with_a_config_yaml_is_not_yet_a_run(tmp_path: Path) -> None:
    """Foreign sources, and a config.yaml of their own."""
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    (project / "config.yaml").write_text("theirs\n")
    (project / "src" / "main.py").write_text("theirs\n")
    before = sorted(p.as_posix() for p in project.rglob("*"))
    for attempt in (
        lambda: RunFolder(project).claim(overwrite=True),
        lambda: RunFolder(project).claim(overwrite=False),
        lambda: RunFolder(project).reopen(),
    ):
        with pytest.raises(RunFolderError, match="holds no run") as raised:
            attempt()
        assert "another save.folder" in raised.value.problems[0].fix
    assert sorted(p.as_posix() for p in project.rglob("*")) == before


@pytest.mark.parametrize(
    "path",
    ["notes.txt", "src/main.py", "checkpoints/notes", "adapter/merged.safetensors", "logs/mine.csv", ".git/HEAD"],
)
def test_a_run_that_holds_a_file_of_somebody_else_is_not_replaced(path: str, run: Path) -> None:
    (run / path).parent.mkdir(exist_ok=True)
    (run / path).write_text("precious")
    before = contents(run)
    with pytest.raises(RunFolderError, match="which no run wrote") as raised:
        claimed(run, overwrite=True)
    assert path.split("/", maxsplit=1)[0] in raised.value.problems[0].what
    assert contents(run) == before


def test_a_link_deep_in_a_run_is_no_file_of_the_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (run / "checkpoints" / "step_000004" / "state.safetensors").unlink()
    (run / "checkpoints" / "step_000004" / "state.safetensors").symlink_to(tmp_path / "precious")
    with pytest.raises(RunFolderError, match="which no run wrote"):
        claimed(run, overwrite=True)


def test_where_one_stands_and_lives_nothing_is_replaced(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a run: `save.folder=.`, a parent of it, home, the root."""
    before = contents(run)
    monkeypatch.chdir(run)
    with pytest.raises(RunFolderError, match="the folder you are in"):
        claimed(Path(), overwrite=True)
    monkeypatch.chdir(run / "adapter")
    with pytest.raises(RunFolderError, match="the folder you are in"):
        claimed(run, overwrite=True)
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(run / "adapter"))
    with pytest.raises(RunFolderError, match="your home folder"):
        claimed(run, overwrite=True)
    assert belongings.unsafe(Path("/")) == "is the root of the file system"
    assert contents(run) == before


def test_a_run_that_the_new_one_reads_is_not_replaced(run: Path) -> None:
    """Training on from the adapter of the very run that would be gone by then."""
    inputs = ("tiny-random", str(run / "adapter"))
    with pytest.raises(RunFolderError, match="which the new run reads"):
        claimed(run, inputs=inputs, overwrite=True)
    overrides = (f"save.folder={run}", f"model.adapter={run / 'adapter'}")
    cfg = load_run(REPO / "configs/run/debug.yaml", overrides)
    with pytest.raises(RunFolderError, match="which the new run reads"):
        check_before_torch(cfg, {}, overwrite=True, resume=False)
    rank_1 = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    check_before_torch(cfg, rank_1, overwrite=True, resume=False)


def test_an_existing_run_names_resume_first(run: Path) -> None:
    with pytest.raises(RunFolderError, match="holds a run already") as raised:
        claimed(run)
    assert raised.value.problems[0].fix.startswith("--resume")


# --- moved aside ----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The end of the process, as far as files can tell."""


def killed(calls: int, *steps: Callable[[], object]) -> bool:
    """Whether `steps` were cut short: from the call after `calls` on nothing is made, renamed or removed any more."""
    left = [calls]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return original(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "write_text"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        try:
            for step in steps:
                step()
        except Killed:
            return True
    return False


def reopened(folder: Path) -> dict[str, bytes | None]:
    with (again := RunFolder(folder)).recording_failure(active=False):
        again.reopen()
    return contents(folder)


def test_a_kill_at_any_moment_of_replacing_loses_nothing(trained: Path, tmp_path: Path) -> None:
    """Amid moving aside, amid the new run's first files, and amid putting back: the next --resume has the old run."""
    before = contents(trained)
    for calls in itertools.count():
        folder = Path(shutil.copytree(trained, tmp_path / f"{calls}"))
        steps = (
            partial(move_aside, folder),
            partial(belongings.mark, folder),
            partial(RunFolder(folder).write, "config.yaml", "new"),
            partial(put_back, folder),
        )
        cut = killed(calls, *steps)
        assert reopened(folder) == before, calls
        shutil.rmtree(folder)
        if not cut:
            break
    assert calls > 30


def test_a_kill_while_the_replaced_run_is_removed_leaves_the_new_one(trained: Path, tmp_path: Path) -> None:
    for calls in itertools.count(2):  # once it has its other name; before that, see above
        folder = Path(shutil.copytree(trained, tmp_path / f"{calls}"))
        move_aside(folder)
        belongings.mark(folder)
        RunFolder(folder).write("config.yaml", "new")
        cut = killed(calls, partial(drop_replaced, folder))
        assert sorted(reopened(folder)) == [".phi3_dist_run", "config.yaml"], calls
        if not cut:
            break
    assert calls > 20


def test_files_put_beside_a_replaced_run_are_named_and_stay(run: Path) -> None:
    move_aside(run)
    belongings.mark(run)
    (run / "notes.txt").write_text("precious")
    with pytest.raises(RunFolderError, match=r"holds notes\.txt, which no run wrote"):
        RunFolder(run).reopen()
    assert (run / "notes.txt").read_text() == "precious"
    assert (run / ".replaced" / "adapter" / "adapter_model.safetensors").is_file()


# --- who writes where -----------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_though_the_lock_file_was_removed(tmp_path: Path) -> None:
    first = claimed(tmp_path / "run")
    (tmp_path / "run" / ".lock").unlink()
    with pytest.raises(RunFolderError, match="another process trains in here"):
        RunFolder(tmp_path / "run").reopen()
    with first.recording_failure(active=True):
        pass
    RunFolder(tmp_path / "run").reopen()


def test_a_run_whose_folder_is_moved_writes_into_that_one(tmp_path: Path) -> None:
    first = claimed(tmp_path / "run")
    first.write("config.yaml", "first")
    (tmp_path / "run").rename(tmp_path / "moved")
    second = claimed(tmp_path / "run")
    second.write("config.yaml", "second")
    first.heartbeat(3)
    assert first.moved().endswith(f"was moved to {tmp_path / 'moved'}, and the run continues there")
    assert first.moved() == second.moved() == ""
    assert first.path == tmp_path / "moved"
    assert (tmp_path / "moved" / "config.yaml").read_text() == "first"
    assert (tmp_path / "moved" / "heartbeat.json").is_file()
    assert not (tmp_path / "run" / "heartbeat.json").exists()


def test_a_run_whose_folder_is_removed_writes_nowhere(tmp_path: Path) -> None:
    first = claimed(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    claimed(tmp_path / "run")
    with pytest.raises(RunFolderError, match="removed, moved or unmounted"):
        first.write("config.yaml", "first")
    first.heartbeat(1)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", ".phi3_dist_run"]


def test_errors_name_the_folder_and_not_its_handle(tmp_path: Path) -> None:
    first = claimed(tmp_path / "run")
    with pytest.raises(ModelError, match=f"{tmp_path / 'run'}/adapter") as raised, first.by_name():
        raise ModelError(f"{first.held}/adapter: no")
    assert "/proc" not in str(raised.value)


def test_a_folder_that_nobody_may_write_is_told_before_all_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunFolderError, match="is a file"):
            RunFolder(folder).check()
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(RunFolderError, match="cannot be written"):
            RunFolder(tmp_path / "closed" / "run").check()
