"""What a run leaves in its folder, by name. Only that is ever moved or removed, and only where a run's mark stands.

`--overwrite` moves the old run into `.replaced/` of the same folder, which stays locked all the while. Once the new run
has made a step, the old one is removed; where it ends before that, the old one comes back, and so it does at the next
start where it was killed. The mark moves last and comes back first: `.replaced/` holds it exactly while the files
beside `.replaced/` are the new run's.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

from phi3_dist.adapters.file_names import ADAPTER_FILE, PARTIAL
from phi3_dist.config.json_text import parse_json
from phi3_dist.errors import Problem, RunFolderError

__all__ = [
    "LOCK",
    "MARK",
    "drop_replaced",
    "in_use",
    "is_run",
    "mark",
    "move_aside",
    "named",
    "put_back",
    "foreign_entries",
    "unsafe",
]

MARK, LOCK = ".phi3_dist_run", ".lock"
_REPLACED, _LEAVING = ".replaced", ".leaving"
_CHECKPOINT = r"(damaged-(\d+-)?)?step_\d{6,}(\.tmp|\.old)?"
_OURS = re.compile(
    "|".join(
        (
            re.escape(LOCK),
            rf"{re.escape(MARK)}|\.{re.escape(MARK)}\.tmp",
            r"\.?(config\.yaml|(plan|environment|evaluation|heartbeat|exit)\.json)(\.tmp)?",
            r"metrics\.(jsonl|tmp)",
            r"(curves\.png|report\.html)",
            r"\.?(evaluation\.json|evaluation_rows\.jsonl)(\.\d+\.tmp)?",
            r"start\.safetensors|\.start\.safetensors\.\d+\.tmp",
            r"profile/(trace\.json\.gz|table\.txt)",
            r"logs/terminal/rank_\d+\.log",
            r"logs/([^/]+/)*(events\.out\.tfevents\.[^/]*|hparams\.yml)",
            r"(logs/)?(wandb|mlruns|trackio|dvclive|swanlab|swanlog|\.aim)/.*",
            rf"checkpoints/{_CHECKPOINT}/(state\.safetensors|(trainer|manifest)\.json|{PARTIAL})",
            rf"adapter(\.(tmp|old)-\d+)?/({ADAPTER_FILE.pattern})",
            PARTIAL,
        )
    )
)
"""Paths, from the run folder on, of every file that a run writes. tests/unit/test_folder.py holds it against a run."""
_OUR_FOLDERS = re.compile(
    rf"profile|(logs|wandb|mlruns|trackio|dvclive|swanlab|swanlog|\.aim)(/.*)?|checkpoints(/{_CHECKPOINT})?"
    r"|adapter(\.(tmp|old)-\d+)?(/additional_chat_templates)?"
)
_SHOWN = 4


def mark(folder: Path) -> None:
    """Say that this folder is a run's. Raises OSError."""
    text = json.dumps({"phi3_dist_run": uuid.uuid4().hex, "time": time.time()})
    temporary = folder / f".{MARK}.tmp"
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(folder / MARK)


def is_run(folder: Path) -> bool:
    """Whether a run's mark stands in `folder`, or in what a run there was about to replace."""
    return any(_marked(place) for place in (folder, folder / _REPLACED))


def _marked(folder: Path) -> bool:
    try:
        return "phi3_dist_run" in parse_json((folder / MARK).read_text("utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def in_use(folder: Path) -> bool:
    """Whether the folder holds anything but what a run leaves that ended before its first file."""
    nothing = {LOCK, MARK, f".{MARK}.tmp", ".config.yaml.tmp", _LEAVING}
    return folder.is_dir() and any(p.name not in nothing for p in folder.iterdir())


def unsafe(folder: Path) -> str:
    """Why nothing in `folder` may be replaced, whatever it holds; empty where it may."""
    here = folder.resolve()
    try:
        home = Path.home().resolve()
    except RuntimeError:  # a user without one
        home = Path("/")
    if here.parent == here:
        return "is the root of the file system"
    if home.is_relative_to(here):
        return "is your home folder, or holds it"
    if Path.cwd().is_relative_to(here):
        return "is the folder you are in, or holds it"
    return ""


def foreign_entries(folder: Path) -> list[str]:
    """Paths below `folder` that no run writes: files, links, folders, sorted and named from `folder` on."""
    found = []
    for where, folders, files in os.walk(folder):
        inside = Path(where).relative_to(folder)
        for name in list(folders):
            path = (inside / name).as_posix()
            if path in {_REPLACED, _LEAVING}:
                folders.remove(name)
            elif (folder / path).is_symlink() or not _OUR_FOLDERS.fullmatch(path):
                found.append(path)
                folders.remove(name)
        found += [p for p in ((inside / name).as_posix() for name in files) if _foreign_file(folder, p)]
    return sorted(found)


def _foreign_file(folder: Path, path: str) -> bool:
    return (folder / path).is_symlink() or not _OURS.fullmatch(path)


def named(paths: Iterable[str]) -> str:
    """The first few of some paths, and how many there are besides."""
    paths = list(paths)
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(paths[:_SHOWN]) + more


def move_aside(folder: Path) -> None:
    """Put the run in `folder` aside. Its own files alone are there, and its lock is held. Raises OSError."""
    aside = folder / _REPLACED
    aside.mkdir()
    for path in _entries(folder):
        if path.name != MARK:
            path.rename(aside / path.name)
    (folder / MARK).rename(aside / MARK)


def put_back(folder: Path) -> bool:
    """Undo `move_aside`, also one that a kill has cut short. Whether there was one to undo.

    Raises RunFolderError where somebody has put files of his own beside, OSError where the disk refuses.
    """
    _remove(folder / _LEAVING)
    aside = folder / _REPLACED
    if not aside.is_dir():
        return False
    if _marked(aside):
        others = foreign_entries(folder)
        if others:
            what = f"holds {named(others)}, which no run wrote, and in {_REPLACED} a run that was to be replaced"
            raise RunFolderError(Problem(str(folder), what, "move these files elsewhere"))
        for path in _entries(folder):
            _remove(path)
        (aside / MARK).rename(folder / MARK)
    for path in aside.iterdir():
        path.rename(folder / path.name)
    aside.rmdir()
    return True


def drop_replaced(folder: Path) -> None:
    """Remove what `move_aside` has put aside. Raises OSError."""
    aside = folder / _REPLACED
    if aside.is_dir():
        _remove(folder / _LEAVING)
        aside.rename(folder / _LEAVING)
        _remove(folder / _LEAVING)


def _entries(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.name not in {LOCK, _REPLACED, _LEAVING}]


def _remove(path: Path) -> None:
    """Remove a file, or a folder with what a run wrote in it. What somebody else has put there stays.

    Raises OSError.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    top = path if path.name == _LEAVING else path.parent
    for where, _, files in os.walk(path, topdown=False):
        for name in files:
            file = Path(where) / name
            if _OURS.fullmatch(file.relative_to(top).as_posix()):
                file.unlink()
        if not any(Path(where).iterdir()):
            Path(where).rmdir()
