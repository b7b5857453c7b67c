"""What a run fetches from the model hub, and whether it is here or can be reached."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from phi3_dist.config.json_text import parse_json
from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import redacted
from phi3_dist.family.variants import TINY_RANDOM
from phi3_dist.machine.findings import Finding
from phi3_dist.training.preflight.trackers_and_inputs import inputs_of

__all__ = ["hub_findings", "hub_ids", "hub_is_off", "missing_ids"]

ANSWER_S = 3.0
_HUB = "https://huggingface.co"


def hub_ids(cfg: RunConfig) -> tuple[str, ...]:
    """What the run names that is not a path here: owner/name."""
    names = (name for name in inputs_of(cfg) if name != TINY_RANDOM and not name.startswith((".", "/", "~")))
    return tuple(name for name in dict.fromkeys(names) if name.count("/") == 1 and not os.path.lexists(name))


def hub_is_off(environ: Mapping[str, str]) -> bool:
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in names)


def missing_ids(cfg: RunConfig) -> tuple[str, ...]:
    """Those of `hub_ids` that would be downloaded, in whole or in part."""
    return tuple(
        name for name in hub_ids(cfg) if not _cached(name, cfg.model.revision, weights=name == cfg.model.source)
    )


def _cached(name: str, revision: str | None, *, weights: bool) -> bool:
    """Whether a model or data set lies in the hub's cache; of a base, every file of its weights."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    def found(file: str) -> Path | None:
        path = try_to_load_from_cache(name, file, revision=revision)
        return Path(path) if isinstance(path, str) else None

    if any(Path(HF_HUB_CACHE).glob(f"datasets--{name.replace('/', '--')}/snapshots/*")):
        return True
    if not weights:
        return any(map(found, ("tokenizer.json", "config.json", "adapter_config.json")))
    index = found("model.safetensors.index.json")
    if index is None:
        return found("config.json") is not None and found("model.safetensors") is not None
    try:
        files = set(parse_json(index.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return all(found(str(file)) for file in files)


def hub_findings(cfg: RunConfig, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Nothing for a run that names no hub id. Waits for the hub `ANSWER_S` seconds at most."""
    names = hub_ids(cfg)
    if not names:
        return
    missing = missing_ids(cfg)
    if not missing:
        yield Finding("ok", f"{', '.join(names)}: in the cache", check="hub")
        return
    named = ", ".join(missing)
    if hub_is_off(environ):
        fix = "phi3-dist prepare where there is a network, or unset HF_HUB_OFFLINE"
        yield Finding("bad", f"{named}: not in the cache, and HF_HUB_OFFLINE is set", fix, "hub", 4)
        return
    endpoint = (environ.get("HF_ENDPOINT") or _HUB).rstrip("/")
    why = _unreachable(endpoint)
    if why:
        fix = "phi3-dist prepare where there is a network, a folder in place of the id, or HF_ENDPOINT of a mirror"
        what = f"{named}: not in the cache, and {redacted(endpoint)} does not answer: {why}"
        yield Finding("bad", what, fix, "hub", 4)
    else:
        yield Finding("ok", f"{named}: fetched at the start; {redacted(endpoint)} answers", check="hub")


def _unreachable(endpoint: str) -> str:
    """Why nothing answers there; empty where something does, whatever it says."""
    if not endpoint.startswith(("http://", "https://")):
        return "it is not a http address"
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=ANSWER_S).close()
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    return ""
