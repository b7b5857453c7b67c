"""What each rank does in test_load_at_scale.py, test_quantized_shards.py and test_relatives_ranks.py."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from phi3_dist.bench.load import measured_load, start
from phi3_dist.modeling.base import find_base
from phi3_dist.modeling.new_tokens import enlarged
from phi3_dist.training.build import build_model
from phi3_dist.training.engines.backward_and_update import make_engine

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
    return build_model(cfg, base, runtime, longest_row=64).model


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


# --- a quantised base ---------------------------------------------------------------------------------------------


def quantized(strategy: str, folder: str, steps: int) -> dict[str, Any]:
    """Train on an NF4 base: losses, gradient norms, and this rank's bytes of the 4-bit weights before and after.

    After half of the steps there is a forward pass in eval mode, as for a held-out loss.
    """
    import bitsandbytes as bnb

    plain, runtime = start(strategy, Path(folder))
    parts = {"model": {"quantization": "nf4"}, "lora": {"dropout": 0.0}}
    cfg = plain.model_copy(
        update={name: getattr(plain, name).model_copy(update=values) for name, values in parts.items()}
    )
    model = build_model(cfg, find_base(folder), runtime, longest_row=64).model
    linears = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    engine = make_engine(model, runtime, cfg.optim)
    facts: dict[str, Any] = {"layers": len(linears), "before": _held(linears), "losses": [], "norms": []}
    for step in range(steps):
        ids = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(step))
        mine = list(ids) if runtime.world == 1 else [ids[runtime.rank]]
        nll = torch.zeros(())
        for number, ids_T in enumerate(mine):
            engine.start_micro_batch(last=number == len(mine) - 1)
            loss = engine.model(**_row(ids_T))
            engine.backward(loss / ids.numel())
            nll += loss.detach()
        facts["losses"].append(float(runtime.sum(nll)) / ids.numel())
        facts["norms"].append(float(engine.update(1e-3)))
        if step == steps // 2:
            engine.model.eval()
            with torch.no_grad():
                engine.model(**_row(ids[0]))
            engine.model.train()
    facts["after"] = _held(linears)
    runtime.barrier()
    if runtime.world > 1:
        dist.destroy_process_group()
    return facts


# --- new tokens under ZeRO-3 ---------------------------------------------------------------------------------------


def taught(folder: str, ids: list[int], steps: int) -> dict[str, list[list[int]]]:
    """By parameter of embedding and head: how many values are whole on this rank after each step, and if they moved."""
    cfg, runtime = start("zero3", Path(folder))
    # so that the new rows, which are few, are shards too
    runtime.ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 10
    model = build_model(cfg, enlarged(find_base(folder), ids), runtime, longest_row=64, token_ids=ids).model
    engine = make_engine(model, runtime, cfg.optim)
    shards = {n: p for n, p in engine.model.named_parameters() if "embed_tokens" in n or "lm_head" in n}
    found: dict[str, list[list[int]]] = {name: [] for name in shards}
    for step in range(steps):
        before = {name: param.ds_tensor.clone() for name, param in shards.items()}
        row = torch.randint(0, ids[-1] + 1, (32,), generator=torch.Generator().manual_seed(step))
        row[: len(ids)] = torch.tensor(ids)
        engine.start_micro_batch(last=True)
        engine.backward(engine.model(**_row(row)) / 64)
        engine.update(1e-2)
        for name, param in shards.items():
            found[name].append([param.numel(), not torch.equal(param.ds_tensor, before[name])])
    dist.barrier()
    dist.destroy_process_group()
    return found


def _row(ids_T: torch.Tensor) -> dict[str, Any]:
    """One document of T tokens, all but the first of them supervised."""
    T = ids_T.numel()
    return {
        "ids_T": ids_T,
        "positions_T": torch.arange(T),
        "predict_S": torch.arange(T - 1),
        "target_S": ids_T[1:],
        "cu_seqlens": torch.tensor([0, T], dtype=torch.int32),
        "lengths": (T,),
    }


def _held(linears: list[Any]) -> int:
    """Bytes of the storages behind this rank's part of the packed weights."""
    found = 0
    for linear in linears:
        weight = linear.weight
        local = weight.ds_tensor if hasattr(weight, "ds_tensor") else getattr(weight, "to_local", lambda w=weight: w)()
        found += local.untyped_storage().nbytes()
        if hasattr(weight, "ds_tensor"):
            found += weight.untyped_storage().nbytes()  # nothing, unless DeepSpeed keeps it whole as well
    return found
