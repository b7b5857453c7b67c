"""Trackers: a missing key is one message, files lie in the run folder, a full disk ends no training."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phi3_dist.config.schema import LogConfig
from phi3_dist.errors import MachineError
from phi3_dist.training.monitor.metrics import Metrics
from phi3_dist.training.monitor.trackers import finish_trackers, start_trackers, tracker_options
from phi3_dist.training.preflight import trackers_and_inputs as early
from phi3_dist.training.preflight.trackers_and_inputs import check_trackers
from tests.disks import Disk, small_disk

KEY = "machine api.wandb.ai\n  login user\n  password 0123456789\n"


def log(*names: str) -> LogConfig:
    return LogConfig(trackers=names)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without keys, on a machine with wandb installed."""
    (tmp_path / "wandb.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def test_wandb_without_a_key_is_one_message_on_rank_0(home: Path) -> None:
    environ = {"HOME": str(home)}
    with pytest.raises(MachineError, match=r"'wandb' has no key(.|\n)*wandb login(.|\n)*WANDB_MODE=offline") as caught:
        check_trackers(log("tensorboard", "wandb"), 0, environ)
    assert len(caught.value.problems) == 1
    check_trackers(log("wandb"), 1, environ)
    assert "wandb" not in sys.modules, "it takes seconds"


@pytest.mark.parametrize(
    "more",
    [{"WANDB_API_KEY": "k"}, {"WANDB_MODE": "offline"}, {"WANDB_MODE": "disabled"}, {"WANDB_IDENTITY_TOKEN_FILE": "t"}],
)
def test_a_key_or_a_mode_of_the_environment_will_do(more: dict[str, str], home: Path) -> None:
    check_trackers(log("wandb"), 0, {"HOME": str(home), **more})


def test_a_key_is_found_where_wandb_login_puts_it(home: Path, tmp_path: Path) -> None:
    (home / ".netrc").write_text(KEY)
    (home / ".netrc").chmod(0o600)
    check_trackers(log("wandb"), 0, {"HOME": str(home)})
    with pytest.raises(MachineError, match="no key"):
        check_trackers(log("wandb"), 0, {"HOME": str(home), "WANDB_BASE_URL": "https://wandb.example.org"})
    (tmp_path / "other").write_text(KEY.replace("api.wandb.ai", "wandb.example.org"))
    environ = {"HOME": "/", "NETRC": str(tmp_path / "other"), "WANDB_BASE_URL": "https://wandb.example.org:8080"}
    check_trackers(log("wandb"), 0, environ)
    with pytest.raises(MachineError, match="no key"):
        check_trackers(log("wandb"), 0, {"HOME": "/", "NETRC": str(tmp_path / "nowhere")})


@pytest.mark.parametrize(
    "text", ["[default]\nmode = offline\n", "[default]\napi_key = k\n", "no settings", "[default\n"]
)
def test_settings_of_wandb_are_read_whatever_is_in_them(text: str, home: Path) -> None:
    settings = home / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(text)
    assert early.wandb_can_begin({"HOME": str(home)}) == ("=" in text)


def test_files_of_trackers_lie_in_the_run_folder(tmp_path: Path) -> None:
    options = tracker_options(("tensorboard", "wandb", "swanlab", "dvclive"), "story", tmp_path, {})
    assert set(options) == {"wandb", "swanlab", "dvclive"}
    for name, key in (("wandb", "dir"), ("swanlab", "logdir"), ("dvclive", "dir")):
        assert Path(options[name][key]).is_relative_to(tmp_path / "logs")
    assert options["wandb"]["name"] == "story"
    assert "dir" not in tracker_options(("wandb",), "story", tmp_path, {"WANDB_DIR": "/elsewhere"})["wandb"]


# --- TensorBoard on a full disk ---------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path) as made:
        yield made


def runtime(folder: Path) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    places = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs"))
    return SimpleNamespace(
        accelerator=Accelerator(cpu=True, log_with=["tensorboard"], project_config=places), is_main=True
    )


@pytest.fixture
def hook() -> Iterator[None]:
    before = threading.excepthook
    yield
    threading.excepthook = before


@pytest.mark.usefixtures("hook")
def test_a_tracker_that_cannot_begin_is_one_message(disk: Disk) -> None:
    disk.mount(inodes=1)
    with pytest.raises(MachineError, match=r"tensorboard can't begin: (.|\n)*No space left(.|\n)*log.trackers=\[\]"):
        start_trackers(runtime(disk.path), ("tensorboard",), project="p", run="r", folder=disk.path)


@pytest.mark.usefixtures("hook")
def test_a_tracker_whose_disk_fills_up_ends_no_training(disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    disk.mount(kib=256)
    here = runtime(disk.path)
    start_trackers(here, ("tensorboard",), project="p", run="r", folder=disk.path)
    row = {"loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "supervised_tokens_per_s": 1.0}
    with Metrics(disk.path / "metrics.jsonl", 3000, here.accelerator, active=True) as metrics:
        disk.leave(2)
        for step in range(1, 61):
            metrics.train({"step": step, **row}, 0.0)
    said = list(finish_trackers(here))
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    assert "No space left" in shown.out + "".join(said)
    assert json.loads((disk.path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
    assert here.accelerator.trackers == []
