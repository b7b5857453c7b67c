"""From a plan to a model that is ready to train: base, LoRA, attention, shards, in the order each strategy needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phi3_dist.adapters.loading import not_to_go_on_from, too_few_rows, without_frozen_tables
from phi3_dist.adapters.reading import read_adapter, read_metadata
from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import ModelError, Problem
from phi3_dist.modeling.attention.backend import use_backend
from phi3_dist.modeling.base import (
    Base,
    checkpoint_activations,
    load_full,
    load_into_fsdp2,
    load_quantized,
    load_zero3,
    meta_model,
)
from phi3_dist.modeling.fp8 import use_fp8
from phi3_dist.modeling.fused_layers import install_fused_layers, select_in_last_layer
from phi3_dist.modeling.fused_lora import FusedReport, install_fused, keep_dequantized
from phi3_dist.modeling.lora import adapted, add_lora, fill_adapter, init_dora_magnitudes
from phi3_dist.modeling.lora_init import subtract_from_base
from phi3_dist.modeling.loss import Kernel, PackedLoss
from phi3_dist.modeling.new_tokens import token_rows, whole_tables
from phi3_dist.modeling.passes import BY_HAND, compiled_passes, kernel_passes
from phi3_dist.modeling.rope import Regime, pin_longrope, pinned_regime, regime_for
from phi3_dist.modeling.sequence_parallel_dropout import draw_dropout_for_whole_packs, dropout_by_peft
from phi3_dist.planning.facts import Choice
from phi3_dist.planning.plan import RunPlan
from phi3_dist.training.engines.fsdp2 import shard_fsdp2
from phi3_dist.training.runtime import Runtime, is_fsdp

__all__ = ["Built", "adapter_values", "build_model", "load_base"]


@dataclass(frozen=True)
class Built:
    """A model that is ready to train, and what was decided and computed on the way."""

    model: PackedLoss
    choices: tuple[Choice, ...]
    """What was decided about the model itself, for the lines at start."""
    lora_init: Mapping[str, torch.Tensor]
    """What `lora.init` computed, by saved name; empty for the default."""
    longrope: Regime | None
    """The factors that the whole run uses; None for a base without LongRoPE."""


def load_base(cfg: RunConfig, base: Base, runtime: Runtime) -> Any:
    """The base before LoRA, on its device, sharded or without storage as the strategy wants it. Collective."""
    strategy = runtime.plan.strategy
    if cfg.model.quantization != "none":
        return load_quantized(base, cfg.model.quantization, runtime.dtype, runtime.device, runtime.zero3)
    if strategy.startswith("zero3"):
        assert runtime.ds_config is not None
        return load_zero3(base, runtime.dtype, runtime.ds_config)
    if is_fsdp(strategy):
        return meta_model(base, runtime.dtype)
    return load_full(base, runtime.dtype, runtime.device)


def adapter_values(cfg: RunConfig, base: Base, token_ids: Sequence[int]) -> dict[str, torch.Tensor]:
    """The tensors of the adapter to train on from. Raises ModelError where the `lora` section means another update.

    Shapes are compared later, with the model; a scale that differs would show nowhere but in the losses.
    """
    assert cfg.model.adapter is not None
    values, saved = read_adapter(Path(cfg.model.adapter))
    pairs = (
        ("lora.r", cfg.lora.r, saved.get("r")),
        ("lora.alpha", cfg.lora.alpha, saved.get("lora_alpha")),
        ("lora.rslora", cfg.lora.rslora, bool(saved.get("use_rslora"))),
        ("lora.dora", cfg.lora.dora, bool(saved.get("use_dora"))),
        ("lora.rank_pattern", cfg.lora.rank_pattern, saved.get("rank_pattern") or {}),
        ("lora.alpha_pattern", cfg.lora.alpha_pattern, saved.get("alpha_pattern") or {}),
    )
    problems = [
        Problem(name, f"is {asked}, and the adapter in {cfg.model.adapter} was trained with {found}", f"{name}={found}")
        for name, asked, found in pairs
        if asked != found
    ]
    taught = (saved.get("trainable_token_indices") or {}).get("embed_tokens") or []
    if taught != list(token_ids):
        what = f"have the rows {list(token_ids)}, and the adapter in {cfg.model.adapter} has taught {taught}"
        fix = "name the same tokens in the same order, with the adapter's folder as model.tokenizer"
        problems.append(Problem("model.new_tokens", what, fix))
    problems += too_few_rows(Path(cfg.model.adapter), saved, int(base.config.vocab_size))
    problems += not_to_go_on_from(Path(cfg.model.adapter), saved)
    if problems:
        raise ModelError(*problems)
    return without_frozen_tables(values, base, saved)


def _fused(cfg: RunConfig, model: PackedLoss, plan: RunPlan, tokens: int) -> Iterator[Choice]:
    """Install what `model.fp8` and `model.fused_*` ask for; each with what stayed as the library made it, and why."""
    compiled = plan.compile_from is not None and tokens >= plan.compile_from
    off, kernels = "as the run file says", plan.kernels == "triton"
    if cfg.model.fp8:
        taken, kept = use_fp8(model, turned=kernels)
        yield Choice("base", "FP8", str(FusedReport(taken, kept, "linears")))
    if not cfg.model.fused_lora:
        yield Choice("LoRA linear", "PEFT's", off)
    else:
        lora = install_fused(model, kernels=kernels)
        keep_dequantized(model, plan.kept_layers)
        yield Choice("LoRA linear", "fused" if lora.fused else "PEFT's", str(lora))
    if not cfg.model.fused_layers:
        yield Choice("norm, rotary, MLP", "transformers'", off)
    else:
        passes = kernel_passes() if kernels else compiled_passes() if compiled else BY_HAND
        report = install_fused_layers(model, passes)
        counted = f"; {tokens:,} tokens a rank" if plan.compile_from else ""
        yield Choice(
            "norm, rotary, MLP",
            f"fused{', compiled' if compiled else ', by Triton' if kernels else ''}",
            f"{report}{counted}",
        )
        select_in_last_layer(model)


def _rotary(cfg: RunConfig, regime: Regime | None, longest_row: int) -> tuple[Choice, ...]:
    """The choice of LongRoPE's factors. Raises ModelError where the adapter to train on from serves the others."""
    if regime is None:
        return ()
    saved = read_metadata(cfg.model.adapter).get("longrope", regime) if cfg.model.adapter else regime
    if saved != regime:
        what = f"are the {regime} ones, and the adapter in {cfg.model.adapter} was trained with the {saved} ones"
        raise ModelError(Problem("model.longrope", what, f"model.longrope={saved}"))
    asked = cfg.model.longrope != "auto"
    why = "as the run file says" if asked else f"for the whole run: the longest row has {longest_row:,} tokens"
    return (Choice("LongRoPE", f"{regime} factors", why),)


def _share_dropout(model: PackedLoss) -> None:
    """Raises ModelError where a module that the fused forward doesn't take would draw for a rank's own rows."""
    others = dropout_by_peft(model)
    if others:
        what = f"PEFT's own forward draws it in {len(others)} modules ({others[0]}), for a rank's part of a pack alone"
        raise ModelError(Problem("lora.dropout", what, "lora.dropout=0, or train.sequence_parallel=1"))
    draw_dropout_for_whole_packs(model)


def _with_lora(cfg: RunConfig, causal_lm: Any, base: Base, runtime: Runtime, token_ids: Sequence[int]) -> Any:
    if not token_ids or runtime.zero3 is None:
        return add_lora(causal_lm, cfg.lora, base.source, token_ids)
    with whole_tables(causal_lm, runtime.zero3):
        return add_lora(causal_lm, cfg.lora, base.source, token_ids)


def _fill_shards(model: PackedLoss, base: Base, runtime: Runtime) -> None:
    """Give FSDP2's shards, which have no storage yet, their rows of the base."""
    device = torch.device("cpu") if runtime.plan.strategy.endswith("offload") else runtime.device
    model.to_empty(device=device)
    load_into_fsdp2(model, base)
    init_dora_magnitudes(model)
    inner = model.causal_lm.model
    inner.rotary_emb = type(inner.rotary_emb)(base.config).to(runtime.device)


LoraInit = Callable[[Any], dict[str, torch.Tensor]]
"""From the base before LoRA to the tensors that `lora.init` sets (training/shared_init.py)."""


def build_model(
    cfg: RunConfig,
    base: Base,
    runtime: Runtime,
    *,
    longest_row: int,
    tokens: int = 0,
    lora_init_of: LoraInit | None = None,
    token_ids: Sequence[int] = (),
) -> Built:
    """The model with its adapter as it starts, before DDP or DeepSpeed wrap it; FSDP2 shards are made here.

    `longest_row` in tokens fixes LongRoPE's regime for the run; `tokens`, all that this rank will train on, are what
    compiling has to pay within. Collective under ZeRO-3 and FSDP2.
    """
    values = adapter_values(cfg, base, token_ids) if cfg.model.adapter else None
    causal_lm = load_base(cfg, base, runtime)
    use_backend(causal_lm, runtime.plan.attention, runtime.device, deterministic=runtime.plan.deterministic)
    if cfg.model.activation_checkpointing:
        checkpoint_activations(causal_lm)
    lora_init = lora_init_of(causal_lm) if lora_init_of else {}
    kernel: Kernel = "liger" if runtime.plan.loss == "liger" else "chunked"
    model = PackedLoss(_with_lora(cfg, causal_lm, base, runtime, token_ids), kernel=kernel)
    regime = regime_for(causal_lm.config, longest_row, cfg.model.longrope)
    choices = (*_fused(cfg, model, runtime.plan, tokens), model.loss_choice(), *_rotary(cfg, regime, longest_row))
    if runtime.cut is not None:
        _share_dropout(model)
    if is_fsdp(runtime.plan.strategy):
        model = shard_fsdp2(model, runtime)
        if cfg.model.quantization == "none":  # a quantised base is whole, and cut as it is
            _fill_shards(model, base, runtime)
    if cfg.lora.init.startswith("pissa") and lora_init:
        peft_model: Any = model.model
        subtract_from_base(model, adapted(causal_lm, peft_model.peft_config["default"]), lora_init)
    fill_adapter(model, cfg.train.seed, values, {**lora_init, **token_rows(base, token_ids)})
    pin_longrope(causal_lm, longest_row, cfg.model.longrope)
    # a table left on the host is copied, and waited for, in each forward pass
    causal_lm.model.rotary_emb.to(runtime.device)
    model.train()
    return Built(model, choices, lora_init, pinned_regime(model))
