"""How many processes the launcher was asked for, read from the command lines of the processes above this one.

The environment can't tell: the known silent failure is a launcher that was asked for two processes and started one
without setting anything (`accelerate launch --cpu --num_processes 2`, or a YAML with MULTI_CPU).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from phi3_dist.config.shipped_files import shipped_of
from phi3_dist.config.yaml_text import YamlFault, read_yaml_file

__all__ = ["LaunchRequest", "config_of_launch", "cpu_was_asked", "launch_request", "read_command_line"]


class LaunchRequest(NamedTuple):
    """The number of processes over all nodes, and the words or file that asked for it."""

    asked_world_size: int
    asked_by: str


class _Launcher(NamedTuple):
    """A launcher's own options, without those of the script it starts, and the folder it was called in."""

    kind: str
    options: tuple[str, ...]
    folder: Path


def launch_request() -> LaunchRequest | None:
    """What the nearest launcher above this process was asked for; None where there is none or it doesn't say.

    Never raises when a process has gone or can't be read.
    """
    for command, folder in _ancestors():
        launcher = _recognise(command, folder)
        if launcher is not None:
            return _request(launcher, os.environ)
    return None


def cpu_was_asked(environ: Mapping[str, str]) -> bool:
    """Whether a CPU was asked for: `ACCELERATE_USE_CPU`, `--cpu`, or `use_cpu: true` in the launcher's config.

    Accelerate doesn't hand the last one on to processes started with MULTI_GPU (accelerate 1.15, read and run).
    """
    if environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on"):
        return True
    for command, folder in _ancestors():
        launcher = _recognise(command, folder)
        if launcher is not None:
            if launcher.kind != "accelerate":
                return False
            if {"--cpu", "--use_cpu", "--use-cpu"} & set(launcher.options):
                return True
            config = _config_file(launcher, environ)
            return config is not None and _load(config).get("use_cpu") is True
    return False


def config_of_launch(environ: Mapping[str, str]) -> Path | None:
    """The Accelerate config that the nearest launcher above this process reads; None where there is none."""
    found = (_recognise(command, folder) for command, folder in _ancestors())
    launcher = next((one for one in found if one is not None), None)
    return _config_file(launcher, environ) if launcher is not None and launcher.kind == "accelerate" else None


def read_command_line(command: Sequence[str], folder: Path, environ: Mapping[str, str]) -> LaunchRequest | None:
    """What one command line asks for, when called in `folder`; None where it is not a launcher's or doesn't say."""
    launcher = _recognise(command, folder)
    return None if launcher is None else _request(launcher, environ)


def _ancestors() -> Iterator[tuple[list[str], Path]]:
    """Command line and folder of each process above this one, the nearest first; what can't be read is left out."""
    try:
        parents = psutil.Process().parents()
    except (psutil.Error, OSError):
        return
    for process in parents:
        try:
            command = process.cmdline()
        except (psutil.Error, OSError):
            continue
        try:
            folder = Path(process.cwd())
        except (psutil.Error, OSError):
            folder = Path.cwd()
        yield command, folder


def _recognise(command: Sequence[str], folder: Path) -> _Launcher | None:
    """A launcher by its name: `accelerate launch`, `accelerate-launch`, `torchrun`, or one of them as `python -m …`."""
    program, words = _program(command)
    if program in ("accelerate", "accelerate.commands.accelerate_cli") and words[:1] == ("launch",):
        return _Launcher("accelerate", _own_options(words[1:]), folder)
    if program in ("accelerate-launch", "accelerate.commands.launch"):
        return _Launcher("accelerate", _own_options(words), folder)
    # accelerate's own options, read in the process of this toolkit
    if program in ("phi3-dist", "phi3_dist", "phi3_dist.__main__") and words[:1] == ("launch",):
        return _Launcher("accelerate", _own_options(words[1:]), folder)
    if program in ("torchrun", "torch.distributed.run"):
        return _Launcher("torchrun", _own_options(words), folder)
    return None


def _program(command: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The program's or module's name and its words, with Python and its own options taken off the front."""
    words = tuple(command)
    if words and Path(words[0]).name.startswith("python"):
        words = words[1:]
        while words and words[0].startswith("-") and words[0] != "-m":
            words = words[1:]
        if words[:1] == ("-m",):
            return (words[1], words[2:]) if len(words) > 1 else ("", ())
    return (Path(words[0]).name, words[1:]) if words else ("", ())


def _own_options(words: Sequence[str]) -> tuple[str, ...]:
    """The words up to the script: what follows `-m`, or the first that ends in .py, belongs to the training."""
    for index, word in enumerate(words):
        if word in ("-m", "--module") or word.endswith(".py") or Path(word).name == "phi3-dist":
            return tuple(words[:index])
    return tuple(words)


def _option(launcher: _Launcher, *names: str) -> str | None:
    """The value of `--name value` or `--name=value`, with dashes or underscores inside; the last one counts."""
    found = None
    wanted = {name.replace("-", "_") for name in names}
    for index, word in enumerate(launcher.options):
        if not word.startswith("-"):
            continue
        name, equals, value = word.lstrip("-").partition("=")
        if name.replace("-", "_") in wanted:
            following = launcher.options[index + 1 : index + 2]
            found = value if equals else (following[0] if following else None)
    return found


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _request(launcher: _Launcher, environ: Mapping[str, str]) -> LaunchRequest | None:
    if launcher.kind == "torchrun":
        per_node = _number(_option(launcher, "nproc_per_node") or "1")
        nodes = _number(_option(launcher, "nnodes") or "1")
        if per_node is None or nodes is None:  # auto, gpu, or an elastic range 1:4
            return None
        return LaunchRequest(per_node * nodes, f"torchrun --nnodes {nodes} --nproc_per_node {per_node}")
    asked = _option(launcher, "num_processes")
    if asked is not None:
        number = _number(asked)
        return None if number is None else LaunchRequest(number, f"accelerate launch --num_processes {number}")
    config = _config_file(launcher, environ)
    if config is None:
        return None
    values = _load(config)
    number = values.get("num_processes", 1 if values.get("distributed_type") == "NO" else None)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        return None
    return LaunchRequest(number, f"{_short(config)}: num_processes")


def _config_file(launcher: _Launcher, environ: Mapping[str, str]) -> Path | None:
    """The config that `accelerate launch` reads: the one named, or the default one where it exists and no `--cpu`."""
    named = _option(launcher, "config_file")
    if named is not None:
        path = launcher.folder / named
        shipped = shipped_of(Path(named))  # as `phi3-dist launch` finds it
        return path if shipped is None or path.exists() else shipped
    if "--cpu" in launcher.options:
        return None
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        home = Path(environ.get("HF_HOME") or f"{cache}/huggingface").expanduser()
        default = home / "accelerate" / "default_config.yaml"
        return default if default.is_file() else None
    except (RuntimeError, OSError, ValueError):  # no home folder, or none that may be looked at
        return None


def _load(config: Path) -> Mapping[str, Any]:
    """The config's values; empty where it can't be read, which the launcher itself has complained about."""
    try:
        values = read_yaml_file(config)
    except (OSError, YamlFault):
        return {}
    return values if isinstance(values, dict) else {}


def _short(path: Path) -> str:
    """The path from the present folder where it lies below it, else as it is."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
