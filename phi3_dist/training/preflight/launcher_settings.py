"""What an Accelerate config says beside its topology: the run file decides it, and nothing of it is read in silence.

`accelerate config` writes such fields of itself. Accelerate's launcher hands them on as variables (accelerate 1.15,
utils/launch.py), and a DeepSpeed file beside them counts (utils/dataclasses.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import PlanError, Problem
from phi3_dist.planning.facts import LaunchFacts
from phi3_dist.planning.plan import RunPlan

__all__ = ["not_read", "refuse_contradictions"]

_WHERE = "Accelerate config"


def _setting(environ: Mapping[str, str], name: str, *nothing: str) -> str:
    value = environ.get(name, "").strip()
    return "" if value.lower() in ("", "none", *nothing) else value


def refuse_contradictions(environ: Mapping[str, str], launch: LaunchFacts) -> None:
    """Raises PlanError where ZeRO's fields in the Accelerate config say another thing than the DeepSpeed file there."""
    if not _setting(environ, "ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        return
    zero = launch.zero_settings.get("zero_optimization")
    zero = zero if isinstance(zero, Mapping) else {}
    file = environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]
    pairs: list[tuple[str, str, str]] = [
        ("zero_stage", _setting(environ, "ACCELERATE_DEEPSPEED_ZERO_STAGE"), str(zero.get("stage", 0)))
    ]
    for key in ("offload_optimizer", "offload_param"):
        device = environ.get(f"ACCELERATE_DEEPSPEED_{key.upper()}_DEVICE", "").strip().lower()
        pairs.append((f"{key}_device", device, _device(zero.get(key))))
    problems = [
        Problem(f"{_WHERE}: {name}", f"is {said}, and {file} beside it says {counts}", f"remove {name} there")
        for name, said, counts in pairs
        if said and said != counts
    ]
    if problems:
        raise PlanError(*problems)


def _device(section: Any) -> str:
    return str(section.get("device", "none")) if isinstance(section, Mapping) else "none"


def not_read(cfg: RunConfig, environ: Mapping[str, str], plan: RunPlan) -> Iterator[str]:
    """A line for each setting of the launcher's that differs from the run, which goes by the run file."""
    says = f"{_WHERE} says"
    mixed = _setting(environ, "ACCELERATE_MIXED_PRECISION", "no")
    if mixed not in ("", plan.precision):
        yield f"{says} mixed_precision {mixed}; the run is {plan.precision}, by model.precision={cfg.model.precision}"
    steps = _setting(environ, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    # 1 is what Accelerate writes unasked
    if steps not in ("", "1", str(plan.accumulation)):
        yield f"{says} gradient_accumulation_steps {steps}; the run has {plan.accumulation}, by train.global_batch"
    clip = _setting(environ, "ACCELERATE_GRADIENT_CLIPPING", "auto")
    if clip and _number(clip) != cfg.optim.max_grad_norm:
        yield f"{says} gradient_clipping {clip}; the run has {cfg.optim.max_grad_norm:g}, by optim.max_grad_norm"
    dynamo = _setting(environ, "ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo:
        yield f"{says} dynamo_backend {dynamo.lower()}; what is compiled is decided by model.compile"
    if not plan.strategy.startswith("fsdp"):
        return
    again = _setting(environ, "FSDP_ACTIVATION_CHECKPOINTING", "false")
    if again and not cfg.model.activation_checkpointing:
        yield f"{says} fsdp_activation_checkpointing {again}; the run has model.activation_checkpointing=false"
    reshard = _setting(environ, "FSDP_RESHARD_AFTER_FORWARD", "true", "1", "full_shard")
    if reshard:
        yield f"{says} fsdp_reshard_after_forward {reshard}; the run frees gathered weights after each layer"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
