"""A trained model from what a run leaves: a run folder, an adapter, a checkpoint, or a base alone.

Everything is checked before it is used: the adapter's checksums, a checkpoint's manifest, and, where a run says which
weights it was trained on, the base's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from phi3_dist.adapters.durable_files import file_sha256
from phi3_dist.adapters.loading import load_adapter
from phi3_dist.adapters.reading import CONFIG, WEIGHTS, read_adapter
from phi3_dist.adapters.select import choose
from phi3_dist.config.load import load_run
from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import AdapterError, ConfigError, ModelError, Problem, RunFolderError
from phi3_dist.family.variants import TINY_RANDOM
from phi3_dist.machine.storage import cache_folder
from phi3_dist.modeling.base import Base, find_base, load_full, load_quantized
from phi3_dist.modeling.lora import adapted, add_lora, fill_adapter
from phi3_dist.modeling.lora_init import subtract_from_base
from phi3_dist.modeling.loss import PackedLoss
from phi3_dist.modeling.new_tokens import enlarged, new_token_ids, token_rows
from phi3_dist.modeling.rope import pin_longrope
from phi3_dist.modeling.stop_ids import published_stops
from phi3_dist.modeling.tokenizer import load_tokenizer
from phi3_dist.training.build import adapter_values
from phi3_dist.training.checkpoints.compatibility import base_fingerprint
from phi3_dist.training.checkpoints.files import MANIFEST, STATE, Checkpoint, find_checkpoint, read_state, verify
from phi3_dist.training.engines.optimizer import trained
from phi3_dist.training.run_folder import RunFolder
from phi3_dist.training.run_folder_contents import is_run
from phi3_dist.training.shared_init import LORA_INIT_FILE

__all__ = ["Opened", "Options", "open_model", "run_folder_of"]

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Options:
    """How to open a model. Everything has a default that follows the run.

    `base`: where the base is, if not where the adapter says. `precision`: auto, bf16 or fp32. `quantization`: none, nf4
    or int8; None: as the run had it. `device`: None: a GPU where there is one.
    """

    base: str | None = None
    revision: str | None = None
    precision: str = "auto"
    quantization: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class Opened:
    """A model that can answer, on its device and in eval mode, and what it was opened from."""

    name: str
    model: Any
    tokenizer: Any
    base: Base
    run: Path | None
    cfg: RunConfig | None
    precision: str
    weights: str
    """What tells these weights from others: a digest of the adapter's or checkpoint's file, or the base's name."""

    @property
    def has_adapter(self) -> bool:
        return isinstance(self.model, PeftModel)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def causal_lm(self) -> Any:
        return self.model.get_base_model() if self.has_adapter else self.model

    @contextmanager
    def base_alone(self, wanted: bool = True) -> Iterator[None]:
        """The adapter is switched off inside, if wanted."""
        with self.model.disable_adapter() if wanted and self.has_adapter else nullcontext():
            yield


def open_model(target: str | Path, options: Options | None = None) -> Opened:
    """The model that `target` names: a run folder, an adapter's, a checkpoint's, a base's folder or hub id.

    Raises RunFolderError for a run without an adapter, AdapterError for a damaged one, one of another base, or one
    whose base is not where it says; ModelError for a base that can't be read; ConfigError for an impossible option.
    """
    options = options or Options()
    _check(options)
    folder = Path(target)
    if (folder / MANIFEST).is_file() or (folder.parent.name == "checkpoints" and folder.is_dir()):
        return _of_checkpoint(folder, options)
    if (folder / CONFIG).is_file():
        return _of_adapter(folder, _run_of(folder.parent), options)
    if folder.is_dir() and is_run(folder):
        return _of_adapter(_adapter_of_run(folder), _run_of(folder), options)
    if folder.is_dir() and not (folder / "config.json").is_file():
        what = "is neither a run folder, an adapter, a checkpoint nor a base model"
        raise RunFolderError(Problem(str(folder), what, "name a folder that holds config.yaml or adapter_config.json"))
    if not folder.is_dir() and _looks_like_a_path(str(target)):
        what = "is a file, not a folder" if folder.is_file() else "no such folder"
        raise RunFolderError(Problem(str(target), what, "name a run folder, an adapter, or a base model"))
    base = find_base(str(target), options.revision)
    precision, device = _precision(options, None), _device(options)
    model = _load(base, options.quantization or "none", precision, device)
    pin_longrope(model, 0)
    model.model.rotary_emb.to(device)
    return Opened(str(target), model.eval(), load_tokenizer(str(target)), base, None, None, precision, str(target))


def run_folder_of(target: str | Path) -> Path | None:
    """The run folder that `target` is, or lies in (an adapter, a checkpoint); None where there is none."""
    folder = Path(target)
    places = (folder, folder.parent, folder.resolve().parent.parent) if folder.is_dir() else ()
    return next((place for place in places if is_run(place) and (place / "config.yaml").is_file()), None)


def _check(options: Options) -> None:
    problems = []
    if options.precision not in ("auto", *_DTYPES):
        problems.append(Problem("--precision", f"is {options.precision!r}", "auto, bf16 or fp32"))
    if options.quantization not in (None, "none", "nf4", "int8"):
        problems.append(Problem("--quantization", f"is {options.quantization!r}", "none, nf4 or int8"))
    if options.device not in (None, "cpu", "cuda"):
        problems.append(Problem("--device", f"is {options.device!r}", "cpu or cuda"))
    elif options.device == "cuda" and not torch.cuda.is_available():
        problems.append(Problem("--device", "cuda was asked for, and torch sees no GPU", "phi3-dist doctor says why"))
    if problems:
        raise ConfigError(*problems)


def _looks_like_a_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or ("/" not in source and source != TINY_RANDOM)


def _device(options: Options) -> torch.device:
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _precision(options: Options, run: Path | None) -> str:
    """What was asked for; else what the run computed in, on the same kind of device; else what the device has fast."""
    if options.precision != "auto":
        return options.precision
    device = _device(options).type
    plan = _json(run / "plan.json") if run else {}
    if plan.get("device") == device and plan.get("precision") in _DTYPES:
        return str(plan["precision"])
    return "bf16" if device == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _run_of(folder: Path) -> tuple[Path, RunConfig] | None:
    """The run that left `folder`, and its run file; None where none did."""
    if not is_run(folder) or not (folder / "config.yaml").is_file():
        return None
    return folder, load_run(folder / "config.yaml")


def _adapter_of_run(folder: Path) -> Path:
    adapter = RunFolder(folder).adapter
    if (adapter / CONFIG).is_file():
        return adapter
    checkpoint, _ = find_checkpoint(folder / "checkpoints")
    fix = "continue it: phi3-dist train … --resume"
    if checkpoint is not None:
        fix += f"; or take what it has so far: {checkpoint.folder}"
    raise RunFolderError(Problem(str(folder), "holds a run that has not finished: there is no adapter in it", fix))


def _load(base: Base, quantization: str, precision: str, device: torch.device) -> Any:
    if quantization != "none":
        model = load_quantized(base, quantization, _DTYPES[precision], device)
    else:
        model = load_full(base, _DTYPES[precision], device)
    model.generation_config.eos_token_id = published_stops(base.folder) or model.generation_config.eos_token_id
    return model


def _found_base(where: Path, source: object, revision: str | None, options: Options) -> Base:
    """The base that an adapter needs. Raises AdapterError, with the way out, where it is not where the adapter says."""
    if options.base is not None:
        return find_base(options.base, options.revision)
    fix = "--base-model FOLDER names it where it is"
    if not isinstance(source, str) or not source:
        raise AdapterError(Problem(str(where), "does not say which base it was trained on", fix))
    if source.startswith((".", "/", "~")) and not Path(source).expanduser().is_dir():
        raise AdapterError(Problem(str(where), f"was trained on the base in {source}, which is not there", fix))
    try:
        return find_base(source, revision)
    except ModelError as error:
        raise ModelError(*error.problems, Problem(str(where), f"was trained on {source}", fix)) from error


def _refuse_other_weights(run: Path, base: Base, cfg: RunConfig, identity: dict[str, Any]) -> None:
    """Raises AdapterError where the run was made on other weights than those of `base`."""
    said = identity.get("base weights")
    if said and said != (found := base_fingerprint(base, cache_folder(cfg.data.cache))):
        what = (
            f"was trained on a base with the weights {said[:16]}…, and {base.folder or base.source} has {found[:16]}…"
        )
        raise AdapterError(Problem(str(run), what, "--base-model FOLDER names the base that it was trained on"))


def _of_adapter(adapter: Path, run: tuple[Path, RunConfig] | None, options: Options) -> Opened:
    tensors, config = read_adapter(adapter)
    base = _found_base(adapter, config.get("base_model_name_or_path"), config.get("revision"), options)
    folder, cfg = run or (None, None)
    if folder and cfg:
        _refuse_other_weights(folder, base, cfg, _json(folder / "plan.json").get("identity") or {})
    quantization = options.quantization or (cfg.model.quantization if cfg else "none")
    precision, device = _precision(options, folder), _device(options)
    own = (adapter / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(str(adapter) if own else (cfg and cfg.model.tokenizer) or base.source)
    model = _load(base, quantization, precision, device)
    try:
        model = load_adapter(model, adapter)
    except (RuntimeError, ValueError, LookupError, TypeError) as error:
        raise _unfit(adapter, base, " ".join(str(error).split())[:200]) from error
    here = {chosen.key for chosen in choose(model)}
    if here != set(tensors):
        odd = sorted(here ^ set(tensors))
        raise _unfit(adapter, base, f"{len(odd)} tensors are in only one of the two, first {odd[0]}")
    model.get_base_model().model.rotary_emb.to(device)
    digest = file_sha256(adapter / WEIGHTS)
    return Opened(str(folder or adapter), model.to(device).eval(), tokenizer, base, folder, cfg, precision, digest)


def _unfit(adapter: Path, base: Base, why: str) -> AdapterError:
    what = f"does not fit the base {base.source}: {why}"
    return AdapterError(Problem(str(adapter), what, "--base-model FOLDER names the base that it was trained on"))


def _of_checkpoint(folder: Path, options: Options) -> Opened:
    found, run = verify(folder), _run_of(folder.resolve().parent.parent)
    if not isinstance(found, Checkpoint):
        raise RunFolderError(Problem(str(folder), f"is not a checkpoint that can be used: {found}", "name another one"))
    if run is None:
        what = "is not inside a run folder, whose config.yaml says what it is a checkpoint of"
        raise RunFolderError(Problem(str(folder), what, "leave it in its run's folder"))
    path, cfg = run
    if options.quantization:
        cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"quantization": options.quantization})})
    base = _found_base(folder, cfg.model.source, cfg.model.revision, options)
    identity = dict(found.trainer.get("identity") or {})
    _refuse_other_weights(path, base, cfg, identity)
    source = options.base or cfg.model.source
    tokenizer = load_tokenizer(cfg.model.tokenizer or source, cfg.model.revision, cfg.model.new_tokens)
    base = enlarged(base, new_token_ids(tokenizer, cfg.model.new_tokens, base))
    precision, device = _precision(options, path), _device(options)
    causal_lm = _load(base, cfg.model.quantization, precision, device)
    model = _with_state(causal_lm, found, path, (cfg, base, tokenizer))
    if regime := identity.get("LongRoPE factors"):
        pin_longrope(causal_lm, 0, regime)
    causal_lm.model.rotary_emb.to(device)
    digest = file_sha256(folder / STATE)
    return Opened(str(folder), model.to(device).eval(), tokenizer, base, path, cfg, precision, digest)


def _with_state(causal_lm: Any, checkpoint: Checkpoint, run: Path, what: tuple[RunConfig, Base, Any]) -> Any:
    """The model as the run had built it, with what the checkpoint holds of it."""
    cfg, base, tokenizer = what
    token_ids = new_token_ids(tokenizer, cfg.model.new_tokens, base)
    peft_model = add_lora(causal_lm, cfg.lora, base.source, token_ids)
    wrapped = PackedLoss(peft_model)
    initial: dict[str, torch.Tensor] = {}
    if cfg.lora.init != "default" and cfg.model.adapter is None:
        try:
            initial = load_file(run / LORA_INIT_FILE)
        except (OSError, SafetensorError) as error:
            why = f"cannot be read, and the checkpoint continues from it: {error}"
            raise RunFolderError(Problem(str(run / LORA_INIT_FILE), why, "put it back")) from error
    if cfg.lora.init.startswith("pissa") and initial:
        subtract_from_base(wrapped, adapted(causal_lm, peft_model.peft_config["default"]), initial)
    values = adapter_values(cfg, base, token_ids) if cfg.model.adapter else None
    fill_adapter(wrapped, cfg.train.seed, values, {**initial, **token_rows(base, token_ids)})
    state = read_state(checkpoint)
    with torch.no_grad():
        for name, param in trained(wrapped):
            value = state.get(f"weight/{name}")
            if value is None or value.shape != param.shape:
                why = f"does not hold {name} in the shape that config.yaml gives"
                raise RunFolderError(Problem(str(checkpoint.folder), why, "take the run's own config.yaml"))
            param.copy_(value)
    return peft_model
