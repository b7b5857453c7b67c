"""What `phi3-dist plan --learn` fitted for a card, kept in the user's configuration for the plans to come."""

from __future__ import annotations

import json
import os
from pathlib import Path

from phi3_dist.config.json_text import parse_json
from phi3_dist.errors import MachineError, PlanError, Problem
from phi3_dist.machine.card_measurements import card_file
from phi3_dist.machine.storage import home_folder, storage_fault
from phi3_dist.planning.fitted_overheads import Overheads
from phi3_dist.planning.gpus import find_gpu

__all__ = ["config_folder", "keep_overheads", "overheads_file", "overheads_of"]


def config_folder() -> Path | None:
    """`$XDG_CONFIG_HOME/phi3_dist`, else below ~/.config; None without a home."""
    asked, home = os.environ.get("XDG_CONFIG_HOME"), home_folder()
    if asked and Path(asked).is_absolute():
        return Path(asked) / "phi3_dist"
    return None if home is None else home / ".config" / "phi3_dist"


def overheads_file(device: str) -> Path | None:
    folder = config_folder()
    return None if folder is None else folder / "learned" / card_file(device).name


def keep_overheads(found: Overheads) -> Path:
    """Write them, in place of what was learned of this card before. Raises MachineError where that can't be."""
    file = overheads_file(found.device)
    if file is None:
        raise MachineError(Problem("plan --learn", "this user has no home folder here", "set XDG_CONFIG_HOME"))
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        what, fix = storage_fault(error, "set XDG_CONFIG_HOME to a folder of your own")
        raise MachineError(Problem(str(file), what, fix)) from error
    return file


def overheads_of(device: str) -> Overheads | None:
    """What was learned of a card, by any of its names; None where nothing was, or what lies there is no such file."""
    file = overheads_file(device)
    if file is None:
        return None
    wanted = _card(device)
    for one in (file, *sorted(file.parent.glob("*.json"))):
        try:
            found = Overheads.of(parse_json(one.read_text("utf-8")))
        except (OSError, ValueError):
            continue
        if found is not None and (found.device == device or (wanted and _card(found.device) == wanted)):
            return found
    return None


def _card(device: str) -> str:
    """Its name among the data sheets; empty for a card without one."""
    try:
        return find_gpu(device).name
    except PlanError:
        return ""
