"""FSDP2: which modules are sharded, and in which precision their shards are gathered."""

from __future__ import annotations

from typing import Any

import torch

from phi3_dist.modeling.loss import PackedLoss
from phi3_dist.training.runtime import Runtime

__all__ = ["shard_fsdp2"]


def shard_fsdp2(model: PackedLoss, runtime: Runtime) -> PackedLoss:
    """`fully_shard` each decoder layer and then the rest, in place. The same call on CPU (gloo) and GPU (NCCL).

    Accelerate's own FSDP2 path is not used: on a CPU it silently shards nothing, and one path that the tests start for
    real is worth more than two of which one never runs here.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    mesh = init_device_mesh(runtime.device.type, (runtime.world,))
    policy = MixedPrecisionPolicy(
        param_dtype=runtime.dtype if runtime.plan.precision == "bf16" else None, reduce_dtype=torch.float32
    )
    offload: OffloadPolicy = CPUOffloadPolicy() if runtime.plan.strategy.endswith("offload") else OffloadPolicy()
    inner: Any = model.model
    causal_lm = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    for layer in causal_lm.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)
    return model
