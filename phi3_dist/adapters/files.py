"""An adapter's folder: written whole or not at all, read back before it takes its name.

Files: adapter_model.safetensors, adapter_config.json, README.md, base_facts.json where the base needs something, the
tokenizer's own, and checksums.json, which is written last. Everything is made in `<folder>.tmp-<pid>`, synced, compared
with what was to be written, and renamed.
An adapter that is replaced is first renamed to `<folder>.old-<pid>`: at every moment one complete adapter is on disk,
and `recover` puts it back in its place after a crash. One writer at a time for a folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from phi3_dist.adapters.durable_files import file_sha256, sync, write_tensors
from phi3_dist.adapters.file_names import ADAPTER_FILE
from phi3_dist.adapters.for_plain_base import on_plain_base
from phi3_dist.adapters.gather import gather_adapter, raised_together
from phi3_dist.adapters.model_card import adapter_card
from phi3_dist.adapters.reading import CHECKSUMS, CONFIG, WEIGHTS, read_adapter
from phi3_dist.adapters.select import Bias, check_tensors, find_peft_model
from phi3_dist.errors import AdapterError, Problem

__all__ = [
    "AdapterReceipt",
    "recover",
    "save_adapter",
    "write_adapter",
]

CARD, FACTS = "README.md", "base_facts.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class AdapterReceipt:
    """What was written: SHA-256 and size of adapter_model.safetensors, and how many tensors it holds."""

    sha256: str
    bytes: int
    tensors: int


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    card: str | None = None,
    bias: Bias | None = None,
    bucket_mib: int = 64,
    adapter_name: str = "default",
    base_hint: Mapping[str, str] | None = None,
    taken_out: Mapping[str, Tensor] | None = None,
    unrounded: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> AdapterReceipt | None:
    """Gather the adapter of `model` and write it on rank 0. The receipt on rank 0, None elsewhere.

    taken_out: A and B that were subtracted from the base before training (PiSSA), under their saved names: the adapter
    is then written for the plain base, with twice the rank.
    unrounded: float32 tensors by saved name, on rank 0, of which the model holds rounded copies (ZeRO in bf16): they
    are written in their place.

    Collective: every rank must call it, between steps; when it returns, the adapter is on disk. The arguments are
    those of `gather_adapter` and `write_adapter`. Raises AdapterError on every rank when it fails on one.
    """
    tensors = gather_adapter(model, bias=bias, bucket_mib=bucket_mib, adapter_name=adapter_name)
    receipt = None
    with raised_together():
        peft_model = find_peft_model(model)
        if peft_model is None:
            what = "the model has no PEFT adapter, so there is no adapter_config.json to write"
            raise AdapterError(Problem(str(folder), what, "take gather_adapter's tensors and write them yourself"))
        if tensors:
            tensors = _as_optimized(tensors, unrounded or {})
            config = _as_dict(peft_model.peft_config[adapter_name])
            if bias is not None:
                config["bias"] = bias
            if taken_out:
                tensors, config = on_plain_base(tensors, config, taken_out)
            card = (
                adapter_card({"base": config.get("base_model_name_or_path"), "lora": config}) if card is None else card
            )
            receipt = write_adapter(
                Path(folder),
                tensors,
                config,
                card=card,
                tokenizer=tokenizer,
                base_hint=base_hint,
                metadata=metadata,
            )
    return receipt


def _as_optimized(tensors: dict[str, Tensor], unrounded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with the float32 values that they were rounded from. Raises AdapterError where they were not."""
    differ = [key for key, exact in unrounded.items() if not torch.equal(exact.to(tensors[key].dtype), tensors[key])]
    if differ:
        what = f"{len(differ)} tensors of the model differ from the optimizer's rounded values, first {differ[0]}"
        raise AdapterError(Problem("adapter", what, "continue from the last checkpoint with --resume"))
    return {**tensors, **unrounded}


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    peft_config: Any,
    *,
    card: str,
    tokenizer: Any = None,
    base_hint: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> AdapterReceipt:
    """Write an adapter folder that plain `PeftModel.from_pretrained` loads. Call it on one rank.

    tensors: PEFT's saved names → CPU tensors, as `gather_adapter` returns them. peft_config: PEFT's configuration
    object, or its dict. card: the README.md. base_hint: keys of adapter_config.json that say where the base is
    (`base_model_name_or_path`, `revision`), in place of the configuration's own; a folder's whole path is written.
    metadata: facts that the weights' file carries beside the tensors (see `read_metadata`), and base_facts.json too.
    An adapter that stands in `folder` is replaced once the new one is complete.
    Raises AdapterError: tensors that are empty or not finite, a disk that is full or read-only, a file that reads
    back different. Then `folder` is as it was, and nothing is left beside it.
    """
    folder = Path(folder)
    problems = check_tensors(tensors)
    if problems:
        raise AdapterError(*problems)
    config = _config_json(peft_config, base_hint or {})
    partial = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        recover(folder)
        _refuse_strangers(folder)
        partial.mkdir()
        try:
            receipt = _fill(partial, _separate(tensors), config, card, tokenizer=tokenizer, metadata=metadata or {})
            _swap(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise AdapterError(_write_problem(folder, error)) from error
    return receipt


def _refuse_strangers(folder: Path) -> None:
    """Replacing a folder deletes what is in it: only an adapter's folder, or an empty one, may be replaced."""
    if folder.exists() and not (folder.is_dir() and ((folder / CONFIG).exists() or not any(folder.iterdir()))):
        raise AdapterError(Problem(str(folder), "exists and is not an adapter", "choose another folder, or remove it"))


def _write_problem(folder: Path, error: OSError | SafetensorError) -> Problem:
    cause = (error.strerror if isinstance(error, OSError) else None) or str(error)
    full = isinstance(error, OSError) and error.errno in _FULL
    full = full or any(os.strerror(number) in str(error) for number in _FULL)
    fix = "free some space, or raise the quota" if full else "choose a folder that can be written"
    return Problem(str(folder), f"the adapter cannot be written: {cause}", fix)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of their own memory: safetensors refuses two names for one memory."""
    seen: set[int] = set()
    result = {}
    for key in sorted(tensors):
        tensor = tensors[key].detach().to("cpu").contiguous()
        memory = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return result


def _fill(
    partial: Path,
    tensors: Mapping[str, Tensor],
    config: str,
    card: str,
    *,
    tokenizer: Any,
    metadata: Mapping[str, str],
) -> AdapterReceipt:
    """Write all files of the folder, each synced; the weights are read back and compared, the checksums come last."""
    weights = partial / WEIGHTS
    write_tensors(weights, tensors, metadata)
    (partial / CONFIG).write_text(config, encoding="utf-8")
    (partial / CARD).write_text(card, encoding="utf-8")
    if metadata:
        (partial / FACTS).write_text(json.dumps(dict(metadata), indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        _save_tokenizer(tokenizer, partial)
    for path in sorted(partial.rglob("*")):
        sync(path)
    _compare(weights, tensors)
    receipt = AdapterReceipt(file_sha256(weights), weights.stat().st_size, len(tensors))
    (partial / CHECKSUMS).write_text(
        json.dumps({"sha256": {WEIGHTS: receipt.sha256}}, indent=2) + "\n", encoding="utf-8"
    )
    sync(partial / CHECKSUMS)
    sync(partial)
    return receipt


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Raises OSError for a full disk, also where tokenizers (0.22, Rust) reports it as a bare Exception."""
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(f"the tokenizer: {error}") from error


def _compare(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises AdapterError where the file differs from `tensors` in a name, a shape, a dtype or a bit."""
    different = []
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for key, tensor in tensors.items():
            if key not in names or not _same_bits(file.get_tensor(key), tensor):
                different.append(key)
    different += sorted(names - set(tensors))
    if different:
        what = f"{len(different)} tensors read back different from what was written, first {different[0]}"
        raise AdapterError(Problem(str(path.name), what, "the disk or its driver is faulty: save to another one"))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _swap(partial: Path, folder: Path) -> None:
    """Give the complete folder its name. Between the two renames `recover` would finish what was begun."""
    old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    replaced = folder.exists()
    if replaced:
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if replaced:
            old.rename(folder)
        raise
    sync(folder.parent)
    if replaced:
        _drop(old, folder)


def recover(folder: str | Path) -> None:
    """Put the adapter back in its place after a writer died: the new one where it was complete, else the old one.

    Leftovers of writers that no longer live are removed. Does nothing where there are none.
    """
    folder = Path(folder)
    if not folder.parent.is_dir():
        return
    left = [p for p in sorted(folder.parent.iterdir()) if _is_leftover(p, folder)]
    new = [p for p in left if p.name.startswith(f"{folder.name}.tmp-")]
    old = [p for p in left if p not in new]
    if not folder.exists():
        whole = [p for p in new if _is_whole(p)] or old
        if whole:
            whole[0].rename(folder)
            sync(folder.parent)
    for path in left:
        _drop(path, folder)


def _drop(old: Path, folder: Path) -> None:
    """Remove an adapter that was replaced. What somebody else has put beside it goes into the new one's folder.

    A disk that refuses leaves the folder to the next writer.
    """
    with contextlib.suppress(OSError):
        for path in sorted(old.rglob("*"), reverse=True):  # what is in a folder before the folder
            name = path.relative_to(old)
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif ADAPTER_FILE.fullmatch(name.as_posix()):
                path.unlink()
            elif folder.is_dir() and not os.path.lexists(folder / name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                path.rename(folder / name)
        if not any(old.iterdir()):
            old.rmdir()


def _is_leftover(path: Path, folder: Path) -> bool:
    """A folder that this module makes beside `folder`, whose writer is gone (or is this process, which is here)."""
    match = re.fullmatch(re.escape(folder.name) + r"\.(?:tmp|old)-(\d+)", path.name)
    if match is None:
        return False
    pid = int(match[1])
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _is_whole(path: Path) -> bool:
    with contextlib.suppress(AdapterError):
        read_adapter(path)
        return (path / CHECKSUMS).exists()  # written last
    return False


# --- adapter_config.json ---------------------------------------------------------------------------------------------


def _as_dict(peft_config: Any) -> dict[str, Any]:
    return dict(peft_config if isinstance(peft_config, Mapping) else peft_config.to_dict())


def _config_json(peft_config: Any, base_hint: Mapping[str, str]) -> str:
    config = _as_dict(peft_config) | {"inference_mode": True} | dict(base_hint)
    config = {key: sorted(value) if isinstance(value, set | frozenset) else value for key, value in config.items()}
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and base and Path(base).is_dir():
        config["base_model_name_or_path"] = str(Path(base).resolve())  # found from any folder
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
