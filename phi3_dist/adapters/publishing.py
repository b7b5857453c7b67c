"""A copy of an adapter's folder to hand on. In the run's own folder a local base is named by its path, so that plain
PEFT finds it there; in the copy the hub's id stands in its place, and no path of this machine.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from phi3_dist.adapters.durable_files import failed_copy, sync
from phi3_dist.adapters.files import CARD
from phi3_dist.adapters.model_card import with_hub_base
from phi3_dist.adapters.reading import CONFIG, read_adapter
from phi3_dist.errors import AdapterError, ConfigError, Problem

__all__ = ["publish"]


def publish(folder: str | Path, target: str | Path, base: str, revision: str | None = None) -> Path:
    """Copy the adapter in `folder` to the new folder `target`, naming `base` (a hub id) as what it belongs on.

    Raises ConfigError for a `base` that is not a hub id, AdapterError for an adapter that is damaged, and for a target
    that exists or can't be written. Then nothing is left of it.
    """
    folder, target = Path(folder), Path(target)
    owner, _, name = base.partition("/")
    if not owner or not name or "/" in name or owner.startswith((".", "~")) or Path(base).is_dir():
        what = f"{base!r} is not a model on the hub, and a path means nothing elsewhere"
        raise ConfigError(Problem("--base", what, "owner/name, such as microsoft/Phi-3-mini-4k-instruct"))
    if target.exists():
        raise AdapterError(Problem(str(target), "exists", "choose another folder, or remove it"))
    _, config = read_adapter(folder)
    before = str(config.get("base_model_name_or_path") or "")
    partial = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copytree(folder, partial)
            config |= {"base_model_name_or_path": base, "revision": revision}
            (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            if (partial / CARD).is_file():
                card = (partial / CARD).read_text("utf-8")
                (partial / CARD).write_text(with_hub_base(card, before, base, revision), encoding="utf-8")
            for path in sorted(partial.rglob("*")):
                sync(path)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, shutil.Error, ValueError) as error:
        what, fix = f"cannot be written: {failed_copy(error)}", "choose a folder that can be written and has room"
        raise AdapterError(Problem(str(target), what, fix)) from error
    return target
