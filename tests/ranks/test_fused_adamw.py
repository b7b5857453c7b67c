"""torch's fused AdamW, which GPUs take, over FSDP2's shards on two CPU ranks: one process's numbers, no bad step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from phi3_dist.training.engines.backward_and_update import TorchEngine
from tests.ranks.launcher import run_ranks

pytestmark = pytest.mark.ranks
STEPS, BAD, RANKS = 5, 2, 2


def _model() -> nn.Sequential:
    """Odd sizes, so that the ranks' shards differ and one is short."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))


def _optimizer(model: nn.Module, *, fused: bool) -> torch.optim.AdamW:
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) is matrix] for matrix in (True, False))
    return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], fused=fused)


def train(model: nn.Module, engine: TorchEngine, rank: int, world: int) -> dict[str, Any]:
    """`STEPS` steps over this rank's rows, of which step `BAD` has an infinite gradient on the last rank."""
    norms, weights = [], []
    for step in range(STEPS):
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        if step == BAD:
            x[-1] = math.inf
        loss = engine.model(x[rank::world]).square().sum()
        engine.start_micro_batch(last=True)
        engine.backward(loss)
        norms.append(float(engine.update(1e-2)))
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
        weights.append([p.detach().flatten().tolist() for p in whole])
    return {"norms": norms, "weights": weights}


def sharded() -> dict[str, Any]:
    """What one of two ranks finds, whose optimizer is the fused one."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo")
    model = _model()
    fully_shard(model)
    optimizer = _optimizer(model, fused=True)
    engine = TorchEngine(model, optimizer, RANKS, 1.0)
    assert engine.fused
    found = train(model, engine, dist.get_rank(), RANKS)
    assert all(isinstance(state["exp_avg"], DTensor) for state in optimizer.state.values())
    dist.barrier()
    dist.destroy_process_group()
    return found


def test_over_shards_it_steps_as_one_process_does_and_leaves_a_bad_step_out() -> None:
    model = _model()
    want = train(model, TorchEngine(model, _optimizer(model, fused=False), 1, 1.0), 0, 1)
    assert not math.isfinite(want["norms"][BAD])
    assert want["weights"][BAD] == want["weights"][BAD - 1]
    for found in run_ranks("tests.ranks.test_fused_adamw:sharded", RANKS):
        assert not math.isfinite(found["norms"].pop(BAD))
        assert found["norms"] == pytest.approx([norm for norm in want["norms"] if math.isfinite(norm)], rel=1e-5)
        assert found["weights"][BAD] == found["weights"][BAD - 1]
        for got, expected in zip(found["weights"], want["weights"], strict=True):
            for a, b in zip(got, expected, strict=True):
                assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
