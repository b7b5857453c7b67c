"""What was measured on a card: shipped for some, and written by `make card` for the one in this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_dist.config.json_text import parse_json
from phi3_dist.machine.storage import cache_folder

__all__ = ["card_file", "file_name_of", "measured_on", "write_card"]

SHIPPED = Path(__file__).parent / "measured"


def file_name_of(device_name: str) -> str:
    """A device's name as that of a file."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".json"


def card_file(device_name: str) -> Path:
    """Where `make card` writes what it found on this machine's card."""
    return cache_folder() / "cards" / file_name_of(device_name)


def write_card(device_name: str, found: Mapping[str, Any]) -> Path:
    """Keep what was measured on a card for the plans of this machine. Raises OSError where there is no room."""
    file = card_file(device_name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(found), indent=2) + "\n", encoding="utf-8")
    return file


def measured_on(device_name: str) -> dict[str, Any]:
    """What was measured on a card of this name: here, or else before it was shipped; empty where nothing was.

    A file that cannot be read is as none: it only spares a choice its guess.
    """
    for file in (card_file(device_name), SHIPPED / file_name_of(device_name)):
        try:
            found = parse_json(file.read_text("utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found
    return {}
