"""`phi3-dist --version`: the versions that a bug report needs, found without importing any of the packages."""

from __future__ import annotations

import importlib.util
import platform
import re
from importlib import metadata
from pathlib import Path

from phi3_dist.machine.own_cards import own_cards
from phi3_dist.version import __version__

__all__ = ["version_lines"]

_PACKAGES = ("transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "flash-attn")
_ABSENT = "not installed"


def version_lines() -> list[str]:
    """phi3-dist first, then one line for Python, torch and each package, and one for each kind of GPU."""
    versions = {"Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}", "torch": _torch()}
    versions |= {name: _version(name) for name in _PACKAGES}
    names = [name for name, _ in own_cards()]
    versions["GPUs"] = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none seen"
    return [f"phi3-dist {__version__}", *(f"  {name:<13} {value}" for name, value in versions.items())]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return _ABSENT


def _torch() -> str:
    """Its version with the CUDA it was built for, which its wheel's metadata do not say: read from torch/version.py."""
    found = importlib.util.find_spec("torch")  # looks for it and imports nothing
    if found is None or found.origin is None:
        return _ABSENT
    try:
        text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return _version("torch")
    return torch_version(text) or _version("torch")


def torch_version(text: str) -> str:
    """The version and its toolkit out of the text of torch's version.py; empty where it has another form."""

    def value(name: str) -> str:
        match = re.search(rf"^{name}\b[^=\n]*= *'([^']*)'", text, flags=re.MULTILINE)
        return match[1] if match else ""

    version, cuda, hip = value("__version__"), value("cuda"), value("hip")
    built = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "no CUDA"
    return f"{version} ({built})" if version else ""
