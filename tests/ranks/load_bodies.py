"""What each rank does in test_load_at_scale.py."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from phi3_dist.bench.load import measured_load, start
from phi3_dist.modeling.base import find_base
from phi3_dist.training.build import build_model

PROBED = ("model.embed_tokens.weight", "model.layers.1.mlp.gate_up_proj.weight", "lm_head.weight")


def load(strategies: list[str], folder: str) -> dict[str, Any]:
    """By strategy: what the load took on this rank. The weights of `PROBED` are compared with the files."""
    found = {}
    for strategy in strategies:
        cfg, runtime = start(strategy, Path(folder))
        base = find_base(folder)
        model, cost = measured_load(runtime, lambda cfg=cfg, base=base, runtime=runtime: _built(cfg, base, runtime))
        for name in PROBED:
            assert torch.equal(_whole(model, name), _in_file(Path(folder), name)), f"{strategy}: {name} is another"
        found[strategy] = asdict(cost)
        del model
    dist.barrier()
    dist.destroy_process_group()
    return found


def _built(cfg: Any, base: Any, runtime: Any) -> Any:
    return build_model(cfg, base, runtime, longest_row=64)


def _whole(model: Any, name: str) -> torch.Tensor:
    """A weight of the base, gathered where it is sharded."""
    param = next(p for n, p in model.named_parameters() if n.replace(".base_layer", "").endswith(name))
    if hasattr(param, "ds_tensor"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([param]):
            return param.detach().clone()
    whole: torch.Tensor = param.full_tensor() if hasattr(param, "full_tensor") else param.detach()
    return whole


def _in_file(folder: Path, name: str) -> torch.Tensor:
    for path in folder.glob("model-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 -- not a mapping
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
    raise AssertionError(f"{name} is in no file")
