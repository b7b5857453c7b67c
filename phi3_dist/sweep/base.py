"""The base that all candidates of a sweep share: loaded, frozen, sharded as planned, with the joint loss on top."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from phi3_dist.config.schema import RunConfig
from phi3_dist.modeling.attention.backend import use_backend
from phi3_dist.modeling.base import Base, checkpoint_activations, load_into_fsdp2
from phi3_dist.modeling.fp8 import put_into_fp8
from phi3_dist.modeling.fused_layers import install_fused_layers, select_in_last_layer
from phi3_dist.modeling.lora import adapted, peft_config
from phi3_dist.modeling.passes import BY_HAND, compiled_passes
from phi3_dist.modeling.rope import pin_longrope
from phi3_dist.planning.facts import Choice
from phi3_dist.sweep.joint import JointLoss
from phi3_dist.training.build import load_base
from phi3_dist.training.engines.fsdp2 import shard_fsdp2
from phi3_dist.training.plan_proof import prove_frozen
from phi3_dist.training.runtime import Runtime, is_fsdp

__all__ = ["load_shared"]


def load_shared(
    cfg: RunConfig,
    base: Base,
    runtime: Runtime,
    *,
    longest_row: int,
    tokens: int,
    before_changes: Callable[[Any], None] = lambda causal_lm: None,
) -> tuple[JointLoss, tuple[Choice, ...]]:
    """The frozen base in the place where a run has its model, and what was chosen about it. Collective under FSDP2.

    `before_changes` gets the base as it was loaded, as a run's `lora.init` sees it.
    """
    plan = runtime.plan
    causal_lm = load_base(cfg, base, runtime)
    use_backend(causal_lm, plan.attention, runtime.device, deterministic=plan.deterministic)
    before_changes(causal_lm)
    for param in causal_lm.parameters():
        param.requires_grad_(False)
    for name, module in causal_lm.named_modules():
        if name.endswith((".resid_attn_dropout", ".resid_mlp_dropout")):
            module.p = 0.0
    if cfg.model.fp8:
        for one in adapted(causal_lm, peft_config(causal_lm, cfg.lora, base.source)):
            put_into_fp8(causal_lm, one.name)
    joint = JointLoss(causal_lm, kernel="liger" if plan.loss == "liger" else "chunked")
    if cfg.model.activation_checkpointing:
        checkpoint_activations(causal_lm, context_fn=joint.present.recomputed)
    choices = [joint.loss_choice()]
    if cfg.model.fused_layers:
        compiled = plan.compile_from is not None and tokens >= plan.compile_from
        report = install_fused_layers(joint, compiled_passes() if compiled else BY_HAND)
        select_in_last_layer(joint)
        choices.append(Choice("norm, rotary, MLP", "fused, compiled" if compiled else "fused", str(report)))
    if is_fsdp(plan.strategy):
        shard_fsdp2(joint, runtime)
        if cfg.model.quantization == "none":
            joint.to_empty(device="cpu" if plan.strategy.endswith("offload") else runtime.device)
            load_into_fsdp2(causal_lm, base)
            causal_lm.model.rotary_emb = type(causal_lm.model.rotary_emb)(base.config)
    if plan.strategy.startswith("zero3"):
        _gather_as_needed(joint, runtime)
    pin_longrope(causal_lm, longest_row, cfg.model.longrope)
    causal_lm.model.rotary_emb.to(runtime.device)
    joint.train()
    prove_frozen(joint, runtime)
    return joint, tuple(choices)


def _gather_as_needed(joint: JointLoss, runtime: Runtime) -> None:
    """DeepSpeed's hooks, which gather a module's shards before its forward and backward and free them after.

    Its optimizer has no part in it: with none, `initialize` makes the hooks alone.
    """
    import deepspeed

    assert runtime.ds_config is not None
    deepspeed.initialize(model=joint, config=dict(runtime.ds_config))
