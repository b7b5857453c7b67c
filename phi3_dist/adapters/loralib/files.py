"""Files of loralib to adapter folders and back, for `phi3-dist convert`.

A pickle is read with `torch.load(weights_only=True)`, which runs no code. What is written is read back and compared
before it takes its name.

loralib's own files say nothing of alpha and of the kinds of layers. Those written here do, beside the tensors: in the
header of a safetensors file, and in a pickle as the `_metadata` that state dicts of torch carry. loralib reads past it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from phi3_dist.adapters.durable_files import write_tensors
from phi3_dist.adapters.files import write_adapter
from phi3_dist.adapters.loralib.layers import KINDS, Kind, Layer, lookup
from phi3_dist.adapters.loralib.state_dicts import loralib_from_peft, peft_from_loralib
from phi3_dist.adapters.model_card import adapter_card
from phi3_dist.adapters.reading import read_adapter
from phi3_dist.config.json_text import parse_json
from phi3_dist.errors import AdapterError, ConfigError, Problem
from phi3_dist.family.variants import Shape

__all__ = ["Converted", "Direction", "by_module", "convert_file"]

Direction = Literal["loralib→peft", "peft→loralib"]
_DIRECTIONS: tuple[Direction, ...] = ("loralib→peft", "peft→loralib")
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_NESTED = ("model_state_dict", "state_dict")
_LAYERS = "loralib_layers"
"""Key of the header: how each layer is built, as JSON."""


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote. `notes` are sentences for the user: what the target's form has no place for."""

    target: Path
    tensors: int
    notes: tuple[str, ...]
    layers: Mapping[str, Layer]
    """Module → how loralib's layer must be built; empty for a PEFT target."""


def convert_file(
    source: str | Path,
    target: str | Path,
    direction: str,
    *,
    alpha: float | Mapping[str, float] | None = None,
    enable_lora: Mapping[str, Sequence[bool]] | None = None,
    kinds: Mapping[str, Kind] | None = None,
    r: int | None = None,
    base_config: str | Path | Mapping[str, Any] | None = None,
    base_name: str | None = None,
) -> Converted:
    """Convert one file or folder; `→` may be written `->` or `-to-`.

    loralib→peft: `source` is what `torch.save(lora.lora_state_dict(model), …)` wrote, or a .safetensors with the same
    names; `target` becomes an adapter folder. `alpha`, `kinds` and `enable_lora` are those of `peft_from_loralib`, and
    may be left out for a file that was written here: it carries them, and other ones are refused. `base_name` (hub id
    or folder) goes into adapter_config.json.
    peft→loralib: `source` is an adapter folder; `target` a new file, .safetensors or a pickle of tensors (.pt, .pth,
    .bin, .ckpt). `enable_lora` and `r` are those of `loralib_from_peft`.
    base_config: the base model's config.json, its folder, or its content: sizes and heads are checked against it.
    Raises ConfigError for arguments that are missing or do not belong to this direction, AdapterError for a file that
    cannot be read, written or converted. Then nothing is written.
    """
    source, target = Path(source), Path(target)
    known = {name.replace("→", arrow): name for name in _DIRECTIONS for arrow in ("→", "->", "-to-")}
    if direction not in known:
        raise ConfigError(
            Problem("direction", f"{direction!r} is not a direction", "loralib-to-peft or peft-to-loralib")
        )
    to_peft = known[direction] == "loralib→peft"
    _refuse_foreign({"r": r} if to_peft else {"alpha": alpha, "kinds": kinds, "base_name": base_name}, known[direction])
    base = None if base_config is None else Shape.of(_read_config(base_config))
    if to_peft:
        state, said = _read_loralib(source)
        arguments = _held_against(said, source, {"alpha": alpha, "kinds": kinds, "enable_lora": enable_lora})
        tensors, config = peft_from_loralib(state, **arguments, base=base, base_name=base_name)
        facts = {"base": base_name, "lora": config, "converted from": f"loralib, {source.name}"}
        write_adapter(target, tensors, config, card=adapter_card(facts))
        return Converted(target, len(tensors), _notes_of_peft(config), {})
    tensors, config = read_adapter(source)
    state, layers = loralib_from_peft(tensors, config, enable_lora=enable_lora, r=r, base=base)
    _write_loralib(target, state, layers)
    return Converted(target, len(state), _notes_of_loralib(layers, config), layers)


def _refuse_foreign(arguments: Mapping[str, object], direction: Direction) -> None:
    where = "alpha is in adapter_config.json" if direction == "peft→loralib" else "loralib's file fixes the rank"
    given = [name for name, value in arguments.items() if value not in (None, {})]
    if given:
        raise ConfigError(*(Problem(name, f"is not for {direction} ({where})", "leave it out") for name in given))


def _held_against(layers: Mapping[str, Layer], source: Path, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `peft_from_loralib`, filled in from what the file says of its layers.

    Raises ConfigError for those that say something else: another alpha is another update, and nothing would show it.
    """
    of_layer: dict[str, Callable[[Layer], Any]] = {
        "alpha": lambda layer: layer.alpha,
        "kinds": lambda layer: layer.kind,
        "enable_lora": lambda layer: layer.enable_lora or None,
    }
    filled: dict[str, Any] = {}
    problems: dict[str, Problem] = {}
    for name, read in of_layer.items():
        value = arguments[name]
        by_name = isinstance(value, Mapping)
        filled[name] = dict(value) if by_name else value
        for module, layer in layers.items():
            ours, theirs = lookup(value, module) if by_name else value, read(layer)
            if ours is None and theirs is not None:
                filled[name] = {**(filled[name] or {}), module: theirs}
            elif ours is not None and (tuple(ours) if name == "enable_lora" else ours) != theirs:
                what = f"is {ours}, and {source.name} says of {module}: {layer}"
                problems.setdefault(name, Problem(name, what, "leave it out: the file carries it"))
    if problems:
        raise ConfigError(*problems.values())
    return filled


def _notes_of_peft(config: Mapping[str, Any]) -> tuple[str, ...]:
    notes = ["dropout is 0 in adapter_config.json: loralib's file holds none"]
    if not config["base_model_name_or_path"]:
        notes.append("no base model is named in adapter_config.json: give base_name")
    return tuple(notes)


def _notes_of_loralib(layers: Mapping[str, Layer], config: Mapping[str, Any]) -> tuple[str, ...]:
    """How to build the layers, as one sentence for all modules that share a form."""
    ends: dict[str, dict[str, None]] = {}
    for module, layer in layers.items():
        ends.setdefault(str(layer), {})[module.rsplit(".", 1)[-1]] = None
    notes = [f"build {', '.join(modules)} as {layer}" for layer, modules in ends.items()]
    if config.get("lora_dropout"):
        notes.append(f"lora_dropout was {config['lora_dropout']:g}; loralib takes it when the layer is built")
    return (*notes, "load with model.load_state_dict(…, strict=False)")


# --- reading and writing --------------------------------------------------------------------------------------------


def _read_config(base_config: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(base_config, Mapping):
        return base_config
    path = Path(base_config)
    path = path / "config.json" if path.is_dir() else path
    try:
        content = parse_json(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        what = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise ConfigError(Problem(str(path), what, "give the base model's config.json, or its folder")) from error
    if not isinstance(content, dict):
        raise ConfigError(Problem(str(path), "is not a model configuration", "give the base model's config.json"))
    return content


def _read_loralib(path: Path) -> tuple[dict[str, Tensor], dict[str, Layer]]:
    """The state dict in a file of loralib's users, also where a training script put it under a name of its own.

    And what a file that was written here says of its layers; nothing for another one.
    """
    try:
        content, layers = _read_safetensors(path) if path.suffix == ".safetensors" else _unpickle(path)
    except OSError as error:
        fix = "give a file saved with torch.save(lora.lora_state_dict(model), path)"
        raise AdapterError(Problem(str(path), f"cannot be read: {error.strerror or error}", fix)) from error
    except pickle.UnpicklingError as error:
        what = "is not a pickle of tensors alone; other content could run code when it is read"
        fix = "save it with torch.save(lora.lora_state_dict(model), path)"
        raise AdapterError(Problem(str(path), what, fix)) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = f"is damaged, or is not a file of tensors: {reason}"
        raise AdapterError(Problem(str(path), what, "copy or save it again")) from error
    nested = [key for key in _NESTED if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)]
    state = content[nested[0]] if nested else content
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        fix = "save it with torch.save(lora.lora_state_dict(model), path)"
        raise AdapterError(Problem(str(path), "is not a dict of tensors", fix))
    wrapped = bool(state) and all(name.startswith("module.") for name in state)  # saved from a DDP model
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in state.items()}, layers


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Layer]]:
    with safe_open(path, framework="pt") as file:
        header = parse_json((file.metadata() or {}).get(_LAYERS, "{}"))
    return load_file(path), {module: _layer(facts) for module, facts in header.items()}


def _unpickle(path: Path) -> tuple[Any, dict[str, Layer]]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    carried = getattr(content, "_metadata", None) or {}
    return content, {module: _layer(facts) for module, facts in carried.items() if "alpha" in facts}


def _layer(values: Mapping[str, Any]) -> Layer:
    """Raises KeyError, TypeError or ValueError for facts that are none of a layer."""
    if values["kind"] not in KINDS:
        raise ValueError(f"no kind of layer: {values['kind']!r}")
    flags = tuple(bool(flag) for flag in values["enable_lora"])
    return Layer(values["kind"], int(values["r"]), float(values["alpha"]), flags)


def _write_loralib(target: Path, state: Mapping[str, Tensor], layers: Mapping[str, Layer]) -> None:
    """Whole or not at all; what is there already stays. Beside the tensors stands how their layers are built."""
    if target.suffix not in (".safetensors", *_PICKLES):
        fix = f"end it with .safetensors, {', '.join(_PICKLES)}"
        raise ConfigError(Problem(str(target), f"'{target.suffix}' is not a form of loralib's files", fix))
    if target.exists():
        raise AdapterError(Problem(str(target), "exists", "choose another name, or remove it"))
    partial = target.with_name(f"{target.stem}.tmp-{os.getpid()}{target.suffix}")
    own = OrderedDict((name, tensor.contiguous()) for name, tensor in state.items())
    header = {module: asdict(layer) for module, layer in layers.items()}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if target.suffix == ".safetensors":
                write_tensors(partial, own, {_LAYERS: json.dumps(header)})
            else:
                # load_state_dict hands each module what is under its name here, and loralib's take nothing of it
                own._metadata = OrderedDict(header)  # type: ignore[attr-defined]
                torch.save(own, whole := io.BytesIO())  # of a full disk torch says nothing but a position
                partial.write_bytes(whole.getbuffer())
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            again, said = _read_loralib(partial)
            if (
                said != dict(layers)
                or again.keys() != own.keys()
                or not all(_same(again[name], own[name]) for name in own)
            ):
                raise AdapterError(
                    Problem(str(target), "reads back different from what was written", "save to another disk")
                )
            partial.rename(target)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        what = f"cannot be written: {getattr(error, 'strerror', None) or error}"
        raise AdapterError(Problem(str(target), what, "choose a folder that can be written and has room")) from error


def _same(one: Tensor, other: Tensor) -> bool:
    """To the bit, so that NaN equals itself."""
    return one.dtype == other.dtype and torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


# --- words of a command line ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByModule:
    """What `convert_file` takes, from words such as `32`, `qkv_proj=true,false,true`, `fc=linear`."""

    alpha: float | dict[str, float] | None
    enable_lora: dict[str, tuple[bool, ...]]
    kinds: dict[str, Kind]


def by_module(*, alpha: Sequence[str] = (), enable_lora: Sequence[str] = (), kinds: Sequence[str] = ()) -> ByModule:
    """Read a command line's words. alpha: one number, or `module=number` each. Raises ConfigError with all mistakes."""
    problems: list[Problem] = []
    alphas: dict[str, float] = {}
    for name, value in _pairs("alpha", alpha, problems):
        try:
            alphas[name] = float(value)
        except ValueError:
            problems.append(Problem("alpha", f"'{value}' is not a number", "alpha=32, or qkv_proj=32"))
    if "" in alphas and len(alphas) > 1:
        problems.append(Problem("alpha", "is one number for all, or one for each module", "give module=number each"))
    flags: dict[str, tuple[bool, ...]] = {}
    for name, value in _pairs("enable_lora", enable_lora, problems):
        words = value.lower().split(",")
        if not name or not set(words) <= {"true", "false"}:
            fix = "qkv_proj=true,false,true"
            problems.append(Problem("enable_lora", f"'{value}' for '{name}' is not true or false each", fix))
        flags[name] = tuple(word == "true" for word in words)
    kind_of: dict[str, Kind] = {}
    for name, value in _pairs("kinds", kinds, problems):
        kind = next((known for known in KINDS if known == value), None)
        if kind is None or not name:
            problems.append(Problem("kinds", f"'{value}' for '{name}' is not a kind", f"module={'|'.join(KINDS)}"))
        else:
            kind_of[name] = kind
    if problems:
        raise ConfigError(*problems)
    return ByModule(alphas.get("", alphas or None), flags, kind_of)


def _pairs(argument: str, words: Sequence[str], problems: list[Problem]) -> list[tuple[str, str]]:
    """(module, value) of each word; the module is "" where none is named."""
    pairs = [(word.rpartition("=")[0].strip(), word.rpartition("=")[2].strip()) for word in words]
    twice = {name for index, (name, _) in enumerate(pairs) if name in [n for n, _ in pairs[:index]]}
    problems += [Problem(argument, f"'{name}' is given twice", "give it once") for name in sorted(twice)]
    return pairs
