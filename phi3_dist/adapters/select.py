"""Which tensors make up an adapter, under which names, in which shapes: known on every rank without communication.

For a PEFT model the names are PEFT's own: `get_peft_model_state_dict` is asked, with stand-ins on the meta device in
place of the weights, so that what it would save is known while the weights are still in shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from phi3_dist.errors import AdapterError, Problem

__all__ = ["FLOATS", "Bias", "Chosen", "check_tensors", "choose", "expected_keys", "find_peft_model"]

Bias = Literal["none", "all", "lora_only"]
_BIAS_MODES = ("none", "all", "lora_only")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of what trains."""
_NAMED_AT_MOST = 3


@dataclass(frozen=True)
class Chosen:
    """One tensor of the adapter: its saved name, the (perhaps sharded) tensor of the model, and its full shape."""

    key: str
    tensor: Tensor
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype


def full_shape(tensor: Tensor) -> torch.Size:
    """The shape without sharding: DeepSpeed ZeRO-3 keeps it in `ds_shape`, a DTensor reports it itself."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def find_peft_model(model: nn.Module) -> Any | None:
    """The PEFT model inside whatever wraps it (a loss, DDP, DeepSpeed, torch.compile), or None."""
    return next((module for module in model.modules() if isinstance(module, PeftModel)), None)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers under the names that `state_dict` gives them."""
    wrappers = ("_orig_mod.", "_checkpoint_wrapped_module.")  # torch.compile and activation checkpoint wrappers
    for prefix, module in model.named_modules(remove_duplicate=False):
        hidden = module._non_persistent_buffers_set
        own: list[tuple[str, Tensor | None]] = [*module._parameters.items()]
        own += [(name, buffer) for name, buffer in module._buffers.items() if name not in hidden]
        for name, tensor in own:
            if tensor is not None:
                full_name = f"{prefix}.{name}" if prefix else name
                for wrapper in wrappers:
                    full_name = full_name.replace(wrapper, "")
                yield full_name, tensor


def choose(
    model: nn.Module, bias: Bias | None = None, adapter_name: str = "default", *, names_only: bool = False
) -> list[Chosen]:
    """The tensors of the adapter in a fixed order. Raises AdapterError; see `gather_adapter` for the rules.

    names_only: they may be without storage.
    """
    if bias is not None and bias not in _BIAS_MODES:
        raise AdapterError(Problem("bias", f"{bias!r} is not a mode", f"one of {', '.join(_BIAS_MODES)}"))
    for module in model.modules():
        # After a forward pass FSDP2 may leave the outermost group whole, in compute precision: back to the shards.
        if isinstance(module, FSDPModule):
            module.reshard()
    peft_model = find_peft_model(model)
    named = _of_plain(model, bias) if peft_model is None else _of_peft(peft_model, bias, adapter_name)
    chosen = [Chosen(key, tensor, full_shape(tensor)) for key, tensor in named.items()]
    problems = []
    if not chosen:
        problems.append(Problem("adapter", "the model has no tensor to save", "add LoRA to it, or train something"))
    problems += _named("has no elements", [c.key for c in chosen if c.shape.numel() == 0], "a module of size 0 trains")
    params = [c for c in chosen if isinstance(c.tensor, nn.Parameter)]
    surprising = [f"{c.key} ({c.dtype})" for c in params if c.dtype not in FLOATS]
    problems += _named("is not of a floating dtype", surprising, "a quantised module cannot train or be saved")
    meta = [c.key for c in chosen if c.tensor.is_meta and not names_only]
    problems += _named("is on the meta device", meta, "load the weights before gathering")
    if problems:
        raise AdapterError(*problems)
    return chosen


def _of_plain(model: nn.Module, bias: Bias | None) -> dict[str, Tensor]:
    """Modules without PEFT, such as loralib's: every trainable, or what `loralib.lora_state_dict(bias=…)` picks."""
    while True:  # DDP and DeepSpeed engines put `module.` before each name
        wraps = isinstance(model, DistributedDataParallel) or hasattr(model, "zero_optimization_stage")
        if not wraps or not isinstance(model.module, nn.Module):
            break
        model = model.module
    named = dict(_named_tensors(model))
    if bias is None:
        return {name: tensor for name, tensor in named.items() if tensor.requires_grad}
    beside_lora = {name.split("lora_")[0] + "bias" for name in named if "lora_" in name}
    return {
        name: tensor
        for name, tensor in named.items()
        if "lora_" in name
        or (bias == "all" and "bias" in name.rsplit(".", 1)[-1])
        or (bias == "lora_only" and name in beside_lora)
    }


def _of_peft(peft_model: Any, bias: Bias | None, adapter_name: str) -> dict[str, Tensor]:
    if adapter_name not in peft_model.peft_config:
        raise AdapterError(
            Problem("adapter", f"no adapter '{adapter_name}'", f"one of {', '.join(sorted(peft_model.peft_config))}")
        )
    named = dict(_named_tensors(peft_model))
    # No weights move here: PEFT picks and renames stand-ins of the full shape, and identity leads back to the source.
    stand_ins = {name: torch.empty(full_shape(t), dtype=t.dtype, device="meta") for name, t in named.items()}
    source = {id(stand_in): name for name, stand_in in stand_ins.items()}
    # False: a targeted or resized embedding's frozen base weight is not the adapter's, and "auto" would ask the hub
    saved = get_peft_model_state_dict(
        peft_model, state_dict=stand_ins, adapter_name=adapter_name, save_embedding_layers=False
    )
    names = {key: source[id(stand_in)] for key, stand_in in saved.items()}
    config_bias = getattr(peft_model.peft_config[adapter_name], "bias", "none")
    if bias is None or bias == config_bias:
        _refuse_unsaved(peft_model, adapter_name, {id(named[name]) for name in names.values()})
    else:
        names = {key: name for key, name in names.items() if not _is_base_bias(name)}
        names |= {name: name for name in _base_biases(peft_model, named, bias)}
    return {key: named[name] for key, name in names.items()}


def _is_base_bias(name: str) -> bool:
    own = (".lora_", ".modules_to_save.", ".original_module.")
    return name.endswith(".bias") and not any(part in name for part in own)


def _base_biases(peft_model: Any, named: Mapping[str, Tensor], bias: Bias) -> list[str]:
    if bias == "none":
        return []
    if bias == "all":
        return [name for name in named if _is_base_bias(name)]
    layers = [name for name, module in peft_model.named_modules() if isinstance(module, BaseTunerLayer)]
    return [f"{layer}.base_layer.bias" for layer in layers if f"{layer}.base_layer.bias" in named]


def _refuse_unsaved(peft_model: Any, adapter_name: str, saved_ids: set[int]) -> None:
    """A tensor that trains and is not saved would lose its training without a word."""
    others = [f".{name}" for name in peft_model.peft_config if name != adapter_name]
    lost = [
        name
        for name, tensor in _named_tensors(peft_model)
        if tensor.requires_grad and id(tensor) not in saved_ids and not any(f"{o}." in f"{name}." for o in others)
    ]
    if lost:
        fix = "name its module in modules_to_save, set bias, or freeze it"
        raise AdapterError(*_named("trains, but the PEFT config does not save it", lost, fix))


def expected_keys(
    model: nn.Module, *, bias: Bias | None = None, adapter_name: str = "default"
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Saved name → (full shape, dtype) of what `gather_adapter` returns, on every rank, without communication.

    Raises AdapterError as `gather_adapter` does.
    """
    return {c.key: (c.shape, c.dtype) for c in choose(model, bias, adapter_name)}


def _named(verdict: str, names: Sequence[str], fix: str) -> list[Problem]:
    """One problem for all names that share a verdict."""
    if not names:
        return []
    rest = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return [Problem("adapter", f"{', '.join(names[:_NAMED_AT_MOST])}{rest}: {verdict}", fix)]


def _is_counter(name: str) -> bool:
    """A buffer of a module that is saved whole may hold integers, as a batch norm's `num_batches_tracked`."""
    own = ("lora_", "token_adapter.")
    return not any(part in name for part in own) and name.rsplit(".", 1)[-1] not in {"weight", "bias"}


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.Size, torch.dtype]] | None = None
) -> list[Problem]:
    """What is wrong with an adapter's tensors: names, shapes, dtypes, emptiness, non-finite values."""
    problems = []
    if expected is not None:
        both = [key for key in expected if key in tensors]
        problems += _named("missing", [k for k in expected if k not in tensors], "every rank must gather the adapter")
        problems += _named("not expected", [k for k in tensors if k not in expected], "is it another model's adapter?")
        shapes = [f"{k} {tuple(tensors[k].shape)}" for k in both if tensors[k].shape != expected[k][0]]
        problems += _named("another shape than the model's", shapes, "is it another model's adapter?")
        dtypes = [f"{k} {tensors[k].dtype}" for k in both if tensors[k].dtype != expected[k][1]]
        problems += _named("another dtype than the model's", dtypes, "gather before converting the model")
    elif not tensors:
        problems.append(Problem("adapter", "no tensor at all", "gather it on every rank, write it on rank 0"))
    odd = [f"{k} ({t.dtype})" for k, t in tensors.items() if t.dtype not in FLOATS and not _is_counter(k)]
    problems += _named("is not of a floating dtype that trains", odd, "save the adapter unquantised")
    empty = [k for k, t in tensors.items() if t.numel() == 0]
    problems += _named("has no elements", empty, "save through save_adapter, which gathers shards")
    bad = [k for k, t in tensors.items() if t.dtype in FLOATS and not bool(torch.isfinite(t).all())]
    problems += _named("holds NaN or infinity", bad, "the run diverged: lower the learning rate, use a checkpoint")
    return problems
