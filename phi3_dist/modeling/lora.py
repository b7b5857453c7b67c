"""LoRA through PEFT: its names, configuration and files; here only the checks and a start that no topology changes.

PEFT draws the start of lora_A from the global generator, so that the adapter would depend on what was drawn
before and on how the model is sharded. Here each tensor is drawn from a generator of its own, seeded by the run's
seed and the tensor's name.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phi3_dist.config.schema import LoraConfig
from phi3_dist.errors import ModelError, Problem
from phi3_dist.family.variants import check_targets

__all__ = [
    "Adapted",
    "Counts",
    "adapted",
    "add_lora",
    "count_parameters",
    "fill_adapter",
    "lora_targets",
    "named_seed",
    "peft_config",
    "quiet_peft",
    "init_dora_magnitudes",
    "initial_value",
]


@dataclass(frozen=True)
class Counts:
    """Parameters by what happens to them."""

    total: int
    trainable: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"{self.total:,} parameters, {self.trainable:,} trainable ({share:.2f} %)"


def _linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def lora_targets(model: nn.Module, targets: str | tuple[str, ...]) -> list[str]:
    """The module names that get an adapter. Raises ModelError for each one asked for that matches nothing."""
    linears = [name for name in _linear_names(model) if name != "lm_head"]
    if targets == "all-linear":
        return sorted({name.rsplit(".", 1)[-1] for name in linears})
    assert not isinstance(targets, str)
    # an embedding or the head may be named too
    known = [*linears, *(n for n, m in model.named_modules() if isinstance(m, nn.Embedding)), "lm_head"]
    problems = check_targets(targets, known)
    if problems:
        raise ModelError(*problems)
    return list(targets)


def peft_config(model: Any, cfg: LoraConfig, base_name: str, token_ids: Sequence[int] = ()) -> Any:
    """PEFT's configuration for the `lora` section; `token_ids` are the rows of embedding and head that train."""
    from peft import LoraConfig as PeftLoraConfig

    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    _check_layers(model, cfg)
    missing = [m for m in cfg.modules_to_save if m not in names]
    if missing:
        raise ModelError(
            *(
                Problem("lora.modules_to_save", f"'{m}' matches no module of the model", "lm_head or embed_tokens")
                for m in missing
            )
        )
    config = PeftLoraConfig(
        r=cfg.r,
        lora_alpha=_as_peft_writes(cfg.alpha),
        rank_pattern=dict(cfg.rank_pattern),
        alpha_pattern={key: _as_peft_writes(alpha) for key, alpha in cfg.alpha_pattern.items()},
        layers_to_transform=None if cfg.layers is None else list(cfg.layers),
        lora_dropout=cfg.dropout,
        bias=cfg.bias,
        target_modules=lora_targets(model, cfg.targets),
        modules_to_save=list(cfg.modules_to_save) or None,
        use_rslora=cfg.rslora,
        use_dora=cfg.dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        trainable_token_indices=_token_indices(model, token_ids),
    )
    _check_patterns(adapted(model, config), cfg)
    return config


def _token_indices(model: Any, token_ids: Sequence[int]) -> dict[str, list[int]] | None:
    if not token_ids:
        return None
    rows = {"embed_tokens": list(token_ids)}
    # a tied head follows the embedding by itself
    return rows if model.config.tie_word_embeddings else {**rows, "lm_head": list(token_ids)}


def _as_peft_writes(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else alpha


def _check_layers(model: Any, cfg: LoraConfig) -> None:
    layers = model.config.num_hidden_layers
    beyond = [str(layer) for layer in cfg.layers or () if layer >= layers]
    if beyond:
        what = f"names layer {', '.join(beyond)}, and the model has {layers}, counted from 0"
        raise ModelError(Problem("lora.layers", what, f"stay below {layers}"))


def _check_patterns(found: Sequence[Adapted], cfg: LoraConfig) -> None:
    """Raises ModelError for a target that `layers` leaves nothing of, and a pattern that matches no adapted module."""
    names = [module.name for module in found]
    problems = []
    for target in cfg.targets if cfg.targets != "all-linear" else ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            what = f"{target!r} is in none of lora.layers"
            problems.append(Problem("lora.targets", what, "take it out, or leave lora.layers out"))
    for field, keys in (("rank_pattern", cfg.rank_pattern), ("alpha_pattern", cfg.alpha_pattern)):
        for key in keys:
            # as peft 0.21's get_pattern_key does
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in names):
                ends = sorted({name.rsplit(".", 1)[-1] for name in names})
                what = f"{key!r} matches none of the adapted modules"
                problems.append(Problem(f"lora.{field}", what, f"they end in {', '.join(ends)}"))
    if problems:
        raise ModelError(*problems)


@dataclass(frozen=True)
class Adapted:
    """A module that gets an adapter: its name in the base, its rank, and the scale of its update."""

    name: str
    r: int
    scale: float


def adapted(model: nn.Module, config: Any) -> list[Adapted]:
    """The modules that PEFT's `config` adapts, before or after they are, in the model's order."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    found = []
    for full_name, module in model.named_modules():
        name = full_name.split("base_model.model.", 1)[-1]
        if not isinstance(module, nn.Linear | nn.Embedding) and not hasattr(module, "base_layer"):
            continue
        if check_target_module_exists(config, name) is not True:
            continue
        r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
        found.append(Adapted(name, r, alpha / (math.sqrt(r) if config.use_rslora else r)))
    return found


@contextmanager
def quiet_peft() -> Iterator[None]:
    """While PEFT wraps a model: peft 0.21 asks transformers 5.24 for a name that it has renamed, which warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def add_lora(model: nn.Module, cfg: LoraConfig, base_name: str, token_ids: Sequence[int] = ()) -> Any:
    """The PEFT model around `model`. Its adapter is not yet at its start: see `fill_adapter`."""
    from peft import get_peft_model

    with quiet_peft():
        peft_model = get_peft_model(model, peft_config(model, cfg, base_name, token_ids))
    # dropout of the base is no part of LoRA
    for name, module in peft_model.named_modules():
        if name.endswith((".resid_attn_dropout", ".resid_mlp_dropout")):
            module.p = 0.0
    if cfg.freeze_a:
        for name, param in peft_model.named_parameters():
            if ".lora_A." in name:
                param.requires_grad_(False)
    _train_in_float32(peft_model)
    return peft_model


def _train_in_float32(peft_model: Any) -> None:
    """What trains is float32, whatever the base is: PEFT sees to that for A and B, not for biases and whole modules.

    ZeRO-3's shards are left alone, since DeepSpeed keeps float32 weights of its own. An embedding that trains still
    gives the base's dtype, since autocast has no embedding.
    """
    for param in peft_model.parameters():
        if param.requires_grad and not hasattr(param, "ds_id"):
            param.data = param.data.float()
    embedding = peft_model.get_input_embeddings()
    dtype = peft_model.config.dtype
    if any(param.requires_grad and param.ndim > 1 for param in embedding.parameters()) and dtype is not None:
        embedding.register_forward_hook(lambda _, __, out: out.to(dtype))


def named_seed(seed: int, name: str) -> int:
    """The run's seed for one tensor or module: what is drawn for one depends on no other."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def initial_value(name: str, shape: torch.Size, seed: int) -> Tensor | None:
    """The start of an adapter tensor in float32, on the CPU; None for one that starts as a copy of the base.

    lora_A is uniform in ±1/sqrt(inputs), which is loralib's and PEFT's `kaiming_uniform_(a=sqrt(5))`; lora_B is 0.
    Of an embedding both have A at 0 and B normal.
    """
    if ".lora_B." in name or ".lora_embedding_A." in name:
        return torch.zeros(shape)
    if ".lora_A." not in name and ".lora_embedding_B." not in name:
        return None
    generator = torch.Generator().manual_seed(named_seed(seed, name))
    if ".lora_embedding_B." in name:
        return torch.randn(shape, generator=generator)
    bound = 1.0 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def init_dora_magnitudes(model: nn.Module) -> None:
    """Set DoRA's magnitudes to the norms of the base's rows, where FSDP2 shards came after PEFT had computed them.

    PEFT's start is the norm of W + BA, with B = 0. Rows of both are sharded alike, so each rank needs only its own.
    """
    for module in model.modules():
        magnitude = getattr(getattr(module, "lora_magnitude_vector", None), "default", None)
        if magnitude is not None:
            base: Any = module.base_layer
            with torch.no_grad():
                rows = base.weight.to_local().float().norm(dim=1)
                magnitude.weight.to_local().copy_(rows)


def _adapter_name(name: str) -> str:
    """A parameter's name from `base_model.` on, whatever wraps the PEFT model."""
    return "base_model." + name.split("base_model.", 1)[1] if "base_model." in name else name


def _saved_name(name: str) -> str:
    """The name under which PEFT saves the parameter of adapter `default`. DoRA's magnitude loses its `.weight`."""
    saved = name.replace(".modules_to_save.default", "").replace(".default", "")
    return saved.removesuffix(".weight") if saved.endswith(".lora_magnitude_vector.weight") else saved


def fill_adapter(
    model: nn.Module,
    seed: int,
    values: Mapping[str, Tensor] | None = None,
    initial: Mapping[str, Tensor] | None = None,
) -> None:
    """Set every tensor of the adapter to its start: a saved adapter's `values`, or `initial`'s, or the seeded draw.

    `initial` may hold some tensors only, `values` must hold all. A frozen A (LoRA-FA) is set like one that trains.

    Works on whole parameters and on FSDP2's shards; a rank writes only its own rows.
    Raises ModelError where the saved adapter and the `lora` section differ in names or shapes.
    """
    from torch.distributed.tensor import DTensor

    from phi3_dist.modeling.base import own_rows

    problems: list[Problem] = []
    used: set[str] = set()
    for full_name, param in model.named_parameters():
        if not param.requires_grad and ".lora_A." not in full_name:
            continue
        name = _adapter_name(full_name)
        if values is None:
            value = (initial or {}).get(_saved_name(name))
            value = initial_value(name, param.shape, seed) if value is None else value
        else:
            value = values.get(_saved_name(name))
            used.add(_saved_name(name))
            if value is None or value.shape != param.shape:
                have = "is missing" if value is None else f"has shape {tuple(value.shape)}"
                problems.append(
                    Problem("model.adapter", f"{_saved_name(name)} {have}, the lora section says {tuple(param.shape)}")
                )
                continue
        if value is None:
            continue
        with torch.no_grad():
            if isinstance(param, DTensor):
                param.to_local().copy_(value[own_rows(param)])
            else:
                param.copy_(value)
    if values is not None:
        problems += [Problem("model.adapter", f"{n} has no place in this model") for n in sorted(set(values) - used)]
    if problems:
        shown = problems[:5]
        shown.append(Problem("lora", f"{len(problems)} tensors differ", "make r, targets and modules_to_save agree"))
        raise ModelError(*shown)


def count_parameters(model: nn.Module) -> Counts:
    """Counts over the whole model: ZeRO-3's and FSDP2's shards count in full, 4-bit weights by what they stand for."""
    total = trainable = 0
    packed: dict[int, int] = {}
    for module in model.modules():
        state: Any = getattr(module, "quant_state", None)
        if state is not None:
            packed[id(module.weight)] = math.prod(state.shape)
    for param in model.parameters():
        size = packed.get(id(param)) or getattr(param, "ds_numel", None) or param.numel()
        total += size
        trainable += size if param.requires_grad else 0
    return Counts(total, trainable)
