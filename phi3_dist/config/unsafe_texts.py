"""Texts of a run file that reach a path, a script or a terminal: what none of these takes is refused at its place.

A home folder's `~` is written out here, once, so that every key takes it and the resolved run holds no trace of it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from phi3_dist.config.schema import RunConfig

__all__ = ["Cross", "expanded", "is_folder", "path_fault", "text_faults"]

LONGEST_PART = 255
"""Bytes of a file's name; the limit of every common file system."""
LONGEST_PATH = 4096
_ROOM = 55
"""Bytes that a run adds to its folder's name while it writes beside it."""
_PATHS = re.compile(
    r"model\.(source|tokenizer|adapter)|data\.(train|validation)(\[\d+\])?(\.path)?|data\.cache|save\.folder"
)
_ANY_TEXT = "data.columns"
"""Names of columns, which belong to whoever made the file: a line's end may stand in one."""
_HUB_ADDRESS = re.compile(r"https?://[^/]+/(?:datasets/)?([\w.-]+/[\w.-]+?)(?:/(?:tree|blob|resolve)/.*|/)?")


class Cross(NamedTuple):
    """Fields that cannot stand, or not together: dotted paths (the first is where it is shown), what, fix."""

    paths: tuple[str, ...]
    what: str
    fix: str


def text_faults(cfg: RunConfig) -> Iterator[Cross]:
    """Control characters in any text; and paths that are web addresses, too long, or below a home that is not known."""
    for path, text in _texts(cfg.model_dump(mode="python"), ""):
        control = next((c for c in text if unicodedata.category(c) in ("Cc", "Cs")), None)
        if control is not None and unicodedata.category(control) == "Cs":
            what = f"holds bytes that are not text in this language setting ({control!a})"
            yield Cross((path,), what, "set LC_ALL=C.UTF-8, or write it in the run file")
        elif control is not None and not (path.startswith(_ANY_TEXT) and control in "\n\r\t"):
            what = f"has the control character {control!a}, which no path, script or terminal may get"
            yield Cross((path,), what, "leave it out")
        elif _PATHS.fullmatch(path):
            what, fix = path_fault(text, room=_ROOM if path == "save.folder" else 0)
            if what:
                yield Cross((path,), what, fix)
    if (size := len(cfg.name.encode("utf-8", "replace"))) > LONGEST_PART - _ROOM:
        what = f"has {size:,} bytes, and it names a folder"
        yield Cross(("name",), what, f"use at most {LONGEST_PART - _ROOM} bytes")


def path_fault(text: str, room: int = 0) -> tuple[str, str]:
    """(what, fix) for a text that names no file, folder or hub id on any machine; two empty texts where it may."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        hub = _HUB_ADDRESS.fullmatch(text)
        fix = f"write the hub id {hub[1]}" if hub else "download it, and name the file or folder"
        return f"is the address {_shortened(text)}; expected a folder, a file or a hub id", fix
    raw = text.encode("utf-8", "replace")
    longest = max((len(part) for part in raw.split(b"/")), default=0)
    if longest > LONGEST_PART - room:
        return f"has a part of {longest:,} bytes, and a file's name has at most {LONGEST_PART - room}", "shorten it"
    if len(raw) > LONGEST_PATH - room:
        return f"has {len(raw):,} bytes, and a path has at most {LONGEST_PATH - room:,}", "shorten it"
    if text.startswith("~") and _below_home(text) is None:
        who = text.partition("/")[0]
        return f"begins with {who}, and that home folder is not known here", "write the path out, or set HOME"
    return "", ""


def is_folder(text: str) -> bool:
    """Whether a text names a folder that is here and may be looked at."""
    try:
        return Path(_below_home(text) or text).is_dir()
    except (OSError, ValueError):  # too long, not allowed, or with a null character
        return False


def expanded(cfg: RunConfig) -> RunConfig:
    """The run with `~` written out in every path. To be called where `text_faults` found none."""
    values = cfg.model_dump(mode="python")

    def home(path: str, text: str) -> str:
        return (_below_home(text) or text) if text.startswith("~") and _PATHS.fullmatch(path) else text

    new = _changed(values, "", home)
    return cfg if new == values else RunConfig.model_validate(new)


def _below_home(text: str) -> str | None:
    """The path with its `~` or `~user` written out; None where that home isn't known."""
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except (RuntimeError, ValueError):
        return None


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """(dotted path, text) of each text inside, keys of patterns among them."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if path.endswith("_pattern"):
                yield path, key
            yield from _texts(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, Sequence):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{path}[{index}]")


def _changed(value: Any, path: str, change: Callable[[str, str], str]) -> Any:
    if isinstance(value, str):
        return change(path, value)
    if isinstance(value, Mapping):
        return {key: _changed(inner, f"{path}.{key}" if path else key, change) for key, inner in value.items()}
    if isinstance(value, tuple):
        return tuple(_changed(inner, f"{path}[{index}]", change) for index, inner in enumerate(value))
    return value


def _shortened(address: str) -> str:
    """Without a user's name and password."""
    text = re.sub(r"//[^/@]*@", "//", address)
    return text if len(text) <= 100 else f"{text[:97]}..."
