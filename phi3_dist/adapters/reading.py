"""Reading an adapter's folder: what is missing, damaged, pickled or of no kind that trains is told, all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftType
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from phi3_dist.adapters.config_values import wrong_values
from phi3_dist.adapters.durable_files import file_sha256
from phi3_dist.adapters.select import check_tensors
from phi3_dist.config.json_text import parse_json
from phi3_dist.errors import AdapterError, Problem

__all__ = ["CHECKSUMS", "CONFIG", "WEIGHTS", "read_adapter", "read_metadata"]

WEIGHTS, CONFIG, CHECKSUMS = "adapter_model.safetensors", "adapter_config.json", "checksums.json"


def read_adapter(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (CPU, under their saved names) and the configuration of an adapter folder.

    Raises AdapterError, with all that is wrong: a file missing or damaged (checked against checksums.json where the
    folder has one), pickled weights, an empty or non-finite tensor.
    """
    folder = Path(folder)
    problems: list[Problem] = []
    config = _read_config(folder, problems)
    tensors = _read_weights(folder, problems)
    problems += check_tensors(tensors) if not problems else []
    if problems:
        raise AdapterError(*problems)
    return tensors, config


def read_metadata(folder: str | Path) -> dict[str, str]:
    """The facts in the header of an adapter's weights, such as `longrope`. Raises AdapterError."""
    path = Path(folder) / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise AdapterError(Problem(str(path), f"cannot be read: {error}", "save the adapter again")) from error


def _read_config(folder: Path, problems: list[Problem]) -> dict[str, Any]:
    path = folder / CONFIG
    if path.exists() and not path.is_file():  # a pipe would be waited for
        problems.append(Problem(str(path), "is not a plain file", "copy or save the adapter again"))
        return {}
    try:
        config = parse_json(path.read_text("utf-8"))
    except OSError as error:
        problems.append(Problem(str(path), f"cannot be read: {error.strerror}", "give the folder of a saved adapter"))
        return {}
    except ValueError as error:
        problems.append(Problem(str(path), f"is damaged: {error}", "copy or save the adapter again"))
        return {}
    if not isinstance(config, dict) or "peft_type" not in config:
        problems.append(Problem(str(path), "is not a PEFT configuration: it has no peft_type", "save it with PEFT"))
        return {}
    kind = config["peft_type"]
    if kind not in [known.value for known in PeftType]:
        problems.append(Problem(str(path), f"peft_type is {kind!r}, which PEFT does not know", "copy or save it again"))
    problems += [Problem(str(path), what, "copy or save the adapter again") for what in wrong_values(config)]
    return config


def _read_weights(folder: Path, problems: list[Problem]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        what = "only adapter_model.bin, a pickle, which can run any code when it is read" if pickled else "is missing"
        fix = "convert it with PEFT: save_pretrained(safe_serialization=True)" if pickled else "save the adapter again"
        problems.append(Problem(str(path), what, fix))
        return {}
    try:
        recorded = _recorded_sha256(folder)
        found = file_sha256(path)
        if recorded is not None and recorded != found:
            what = f"is damaged: SHA-256 {found[:16]}…, {CHECKSUMS} says {recorded[:16]}…"
            problems.append(Problem(str(path), what, "copy it again, or save it again"))
            return {}
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        problems.append(Problem(str(path), f"is damaged or cannot be read: {error}", "copy it again, or save it again"))
        return {}


def _recorded_sha256(folder: Path) -> str | None:
    """From checksums.json; None where the folder has none (PEFT writes none). Raises ValueError where it is damaged."""
    path = folder / CHECKSUMS
    if not path.exists():
        return None
    if not path.is_file():
        raise ValueError(f"{CHECKSUMS} is not a plain file")
    try:
        return str(parse_json(path.read_text("utf-8"))["sha256"][WEIGHTS])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{CHECKSUMS} is damaged ({error!r})") from error
