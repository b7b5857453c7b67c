"""`phi3-dist init`: a project's folder, with a run file for one's own data and all that a clone has to start it."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path, PurePosixPath

from phi3_dist.config.shipped_files import shipped_file, shipped_files
from phi3_dist.config.starter import first_run_file
from phi3_dist.config.unsafe_texts import is_folder
from phi3_dist.errors import ConfigError, Problem

__all__ = ["RUN_FILE", "new_project"]

RUN_FILE = "first.yaml"
_ROWS = "data/chats.jsonl"
_EXAMPLE = "configs/run/debug_chats.jsonl"
_NOT_FOR_PROJECTS = frozenset({"configs/run/demo.yaml"})
"""The demo's run, which names the base and the chats that the demo makes."""

_ABOUT_ROWS = """\
  # Your rows: a file (JSONL, JSON, CSV, Parquet), a folder, or a hub id. A line of this one is
  #   {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
  # Other forms (alpaca, sharegpt, prompt and completion, raw text) are recognised too. See how the model will see
  # them, with what it learns in colour: phi3-dist data show first.yaml
"""

_README = """\
# {name}

Commands are run in this folder.

1. Put your rows in `data/chats.jsonl`, or name another file in `first.yaml`; see them: `phi3-dist data show first.yaml`
2. See what would run and whether it fits: `phi3-dist plan first.yaml`
3. One GPU: `phi3-dist train first.yaml`. All GPUs of this machine: `launch/local.sh --config zero2 first.yaml`
4. Several nodes: `launch/multinode.sh --help`, or Slurm: `phi3-dist slurm first.yaml --nodes 2 --gpus-per-node 8`
5. Results: `phi3-dist report runs/first`, `phi3-dist chat runs/first`, and `runs/first/adapter` for PEFT

`configs/accelerate` has a file for each strategy; `phi3-dist config accelerate zero3 --processes 4 --overwrite`
writes it for another number of processes.
`phi3-dist train configs/run/debug.yaml` is a run of a minute on a CPU.
"""


def new_project(folder: Path, model: str) -> tuple[Path, ...]:
    """Lay a project out in `folder`, new or with other files in it; returns the files, the run file first.

    Nothing is written where one of them exists already. Raises ConfigError for that and for a folder that can't be
    written, ModelError for a model that is not one of the family.
    """
    if is_folder(model):
        model = str(Path(model).resolve())
    run_file = first_run_file(model, _ROWS).replace("data:\n", f"data:\n{_ABOUT_ROWS}", 1)
    name = folder.resolve().name or "project"
    texts = {
        PurePosixPath(RUN_FILE): run_file.encode(),
        PurePosixPath(_ROWS): shipped_file(_EXAMPLE).read_bytes(),
        PurePosixPath("README.md"): _README.format(name=name).encode(),
    }
    texts |= {path: file.read_bytes() for path, file in shipped_files().items() if str(path) not in _NOT_FOR_PROJECTS}
    _check(folder, list(texts))
    begun: list[Path] = []
    try:
        for path, content in texts.items():
            file = folder / path
            begun.append(file)
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("xb") as new:
                new.write(content)
            if content.startswith(b"#!"):
                file.chmod(file.stat().st_mode | (file.stat().st_mode & 0o444) >> 2)
    except FileExistsError as error:  # somebody else's, since the look before
        _undo(begun[:-1])
        what = "was written by another process"
        raise ConfigError(Problem(str(error.filename), what, "name another folder")) from error
    except OSError as error:
        _undo(begun)  # else the next try would find these files and refuse
        what = f"cannot be written: {error.strerror or error}"
        raise ConfigError(Problem(str(error.filename or folder), what, "make room, or name another folder")) from error
    return tuple(folder / path for path in texts)


def _undo(files: list[Path]) -> None:
    for file in files:
        with suppress(OSError):
            file.unlink(missing_ok=True)


def _check(folder: Path, paths: list[PurePosixPath]) -> None:
    """Raises ConfigError where the folder is a file, or holds one of the files already."""
    there = [path for path in paths if os.path.lexists(folder / path)]
    above = [path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()]
    if above:
        raise ConfigError(Problem(str(above[0]), os.strerror(errno.ENOTDIR), "name another folder"))
    if there:
        shown = ", ".join(map(str, there[:3])) + (f" and {len(there) - 3} more" if len(there) > 3 else "")
        what = f"holds {shown} already, and nothing is replaced"
        raise ConfigError(Problem(str(folder), what, "name another folder"))
