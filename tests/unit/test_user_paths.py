"""Paths as they are typed on a command line: the home folder's `~`, control characters, links to nothing."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from typer.testing import CliRunner

from phi3_dist.cli import app
from phi3_dist.cli.app import MAY_BE_PATHS
from phi3_dist.config.user_paths import user_path
from phi3_dist.errors import ConfigError, Phi3DistError
from phi3_dist.machine.launcher import _with_deepspeed_file

NO_PATHS = {
    "account", "array", "as_json", "constraint", "context", "dataset", "density", "device", "direction", "directive",
    "enable_lora", "env", "form", "gpu", "host_memory", "into", "job", "kinds", "language", "license", "master", "mem",
    "memory", "method", "metric", "older_than", "overrides", "partition", "precision", "prompt", "qos", "quantization",
    "repo", "revision", "revive", "server", "split", "stored", "strategy", "system", "task", "time", "weights", "why",
    "alpha", "allow_changed", "base_name",
}  # fmt: skip
RUN = "configs/run/debug.yaml"


def verbs() -> list[object]:
    apps = [app, *(group.typer_instance for group in app.registered_groups)]
    return [command.callback for one in apps for command in one.registered_commands if one is not None]


def test_each_text_of_a_verb_is_known_to_be_a_path_or_none() -> None:
    for verb in verbs():
        for name, parameter in inspect.signature(verb, eval_str=False).parameters.items():  # type: ignore[arg-type]
            if "str" in str(parameter.annotation).partition(",")[0]:
                assert name in MAY_BE_PATHS | NO_PATHS, f"{name}: add it to MAY_BE_PATHS, or here"


def test_home_is_written_out_for_texts_and_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x") == f"{tmp_path}/x"
    assert user_path(Path("~/x")) == tmp_path / "x"
    assert user_path("owner/~name") == "owner/~name"
    with pytest.raises(ConfigError, match="begins with ~nobody-here"):
        user_path("~nobody-here/x")


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "~/x", "-p", "hello"],
        ["generate", RUN, RUN, "--output=~/x/answers.jsonl"],
        ["eval", "~/x"],
        ["check", "~/x", "--for=vllm"],
        ["adapter", "~/x", "out"],
        ["runs", "~/x"],
        ["board", "~/x"],
        ["import", "~/x"],
        ["cache", "--folder=~/x"],
        ["plan", "--learn", "~/x"],
        ["plan", "--learn", RUN, "~/x"],
        ["slurm", RUN, "--gpus-per-node=2", "--config_file=~/x"],
        ["config", "show", "~/x"],
    ],
)
def test_home_is_home_for_every_verb(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    error = CliRunner().invoke(app, words).exception
    assert isinstance(error, Phi3DistError)
    assert f"{tmp_path}/x" in str(error)


def test_home_is_home_for_the_launcher_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _with_deepspeed_file(["--config_file=~/x", "-m", "~/y"]) == ["--config_file", f"{tmp_path}/x", "-m", "~/y"]


@pytest.mark.parametrize(
    "words",
    [
        ["adapter", "run", "a\nb"],
        ["export", "run", "a\nb", "--as=merged"],
        ["publish", "run", "a\nb", "--base=owner/name"],
        ["convert", "peft-to-loralib", "run", "a\nb"],
        ["config", "accelerate", "ddp", "--processes=2", "--out=a\nb"],
        ["config", "new", "a\nb"],
        ["init", "a\nb"],
        ["chat", "a\nb"],
        ["eval", "run", "a\nb"],
        ["generate", "a\nb", "-p", "two\nlines"],
        ["report", "a\nb"],
        ["slurm", RUN, "--script=a\nb"],
    ],
)
def test_a_control_character_is_refused_by_every_verb(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    error = CliRunner().invoke(app, words).exception
    assert isinstance(error, ConfigError)
    (problem,) = error.problems
    assert problem.where == r"'a\nb'"
    assert not list(tmp_path.iterdir())


def test_a_prompt_may_have_lines() -> None:
    error = CliRunner().invoke(app, ["generate", "no-such\x07", "-p", "two\nlines"]).exception
    assert r"\x07" in str(error)


@pytest.mark.parametrize(
    "words",
    [
        ["config", "new", "microsoft/Phi-3-mini-4k-instruct", "--output=link.yaml"],
        ["slurm", str(Path(RUN).resolve()), "--gpus-per-node=2", "--script=link.yaml"],
        ["config", "accelerate", "single", "--out=."],
    ],
)
def test_nothing_is_written_through_a_link_to_nothing(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "accelerate").mkdir()
    for link in ("link.yaml", "accelerate/single_gpu.yaml"):
        (tmp_path / link).symlink_to(tmp_path / "elsewhere.yaml")
    error = CliRunner().invoke(app, words).exception
    assert isinstance(error, Phi3DistError)
    assert "is a link to what is not there" in str(error)
    assert not (tmp_path / "elsewhere.yaml").exists()
