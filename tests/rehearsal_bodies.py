"""What the tests of the rehearsal look at, as one process finds it: `python -m tests.rehearsal_bodies` prints JSON.

One process, since a fake CUDA device stays in the process that has it, and imports are most of the time. Each cell is
forked off.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from phi3_dist.bench.cells import Cell, cells, forked, rehearse_cells
from phi3_dist.bench.counting import Watch
from phi3_dist.bench.fake_device import fake_cuda
from phi3_dist.bench.rehearsal import import_all, rehearse
from phi3_dist.bench.rehearse import config_of_source, report_json
from phi3_dist.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig

CUDA = torch.device("cuda")


def _adamw(step_on: str) -> None:
    param = nn.Parameter(torch.zeros(4, device=CUDA))
    param.grad = torch.ones(4, device=CUDA)
    optimizer = torch.optim.AdamW([param], fused=True)
    moments = {name: torch.zeros(4, device=CUDA) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[param] = {"step": torch.zeros((), device=step_on), **moments}
    optimizer.step()


def _backward(view: Callable[[Tensor], Tensor]) -> None:
    rows = torch.ones(1, 4, 4, device=CUDA, requires_grad=True)
    view(rows * 2).sum().backward()  # type: ignore[no-untyped-call]


def _peak() -> None:
    held = torch.zeros(1024, device=CUDA)
    for _ in range(3):
        more = held + 1
        del more


PROBES: dict[str, Callable[[], Any]] = {
    "a number": lambda: torch.ones(3, device=CUDA).sum().item(),
    "a condition": lambda: bool(torch.ones(3, device=CUDA).isfinite().all()),
    "nonzero": lambda: torch.ones(3, device=CUDA).nonzero(),
    "a list": lambda: torch.tensor([1, 2, 3], device=CUDA),
    "pageable to device": lambda: torch.ones(3).to(CUDA),
    "pageable, not blocking": lambda: torch.ones(3).to(CUDA, non_blocking=True),
    "pinned to device": lambda: torch.ones(3).pin_memory().to(CUDA, non_blocking=True),
    "pinned, blocking": lambda: torch.ones(3).pin_memory().to(CUDA),
    "to host": lambda: torch.ones(3, device=CUDA).cpu(),
    "to pinned host": lambda: torch.empty(3, pin_memory=True).copy_(torch.ones(3, device=CUDA), non_blocking=True),
    "synchronize": torch.cuda.synchronize,
    "two devices": lambda: torch.ones(3, device=CUDA) + torch.ones(3),
    "Adam's step on the host": lambda: _adamw("cpu"),
    "Adam's step on the device": lambda: _adamw("cuda"),
    "select": lambda: _backward(lambda rows: rows[0]),
    "squeeze": lambda: _backward(lambda rows: rows.squeeze(0)),
    "product": lambda: torch.empty(4, 8, device=CUDA) @ torch.empty(8, 16, device=CUDA),
    "in place": lambda: torch.empty(8, device=CUDA).add_(torch.empty(8, device=CUDA)),
    "copy": lambda: torch.empty(8, device=CUDA).copy_(torch.empty(8, device=CUDA)),
    "expanded": lambda: torch.empty(1, device=CUDA).expand(8) + torch.empty(8, device=CUDA),
    "views": lambda: torch.empty(4, 8, device=CUDA).t().unsqueeze(0).squeeze(0)[1:].view(7, 4),
    "rows of a table": lambda: torch.empty(100, 8, device=CUDA).index_select(0, torch.empty(2, device=CUDA).long()),
    "on the host": lambda: torch.ones(3) + torch.ones(3),
    "peak": _peak,
}
"""What a watch sees of each; the calls on `torch.cuda` are looked up inside."""


def probe(name: str) -> dict[str, Any]:
    """What a watch saw in a forward phase."""
    watch = Watch()
    with fake_cuda(watch.wait), watch:
        watch.phase = "forward" if name not in {"select", "squeeze"} else "backward"
        if name == "synchronize":
            torch.cuda.synchronize()
        else:
            PROBES[name]()
    tally = watch.tallies.get(watch.phase)
    return {
        "waits": [wait.what for wait in watch.waits],
        "faults": [fault.what for fault in watch.faults],
        "moved": [tally.launches, tally.read_bytes, tally.written_bytes] if tally else [0, 0, 0],
        "peak": dict(watch.live.peak["cuda"]),
    }


def mini(precision: str, **model: Any) -> dict[str, Any]:
    """One decoder layer of Phi-3-mini between two others, 4,096 tokens, one GPU, LoRA and dropout as by default."""
    cfg = RunConfig(
        model=ModelConfig(source="microsoft/Phi-3-mini-4k-instruct", precision=precision, **model),
        data=DataConfig(train="none", pack_length=4096),
        train=TrainConfig(global_batch=1),
    )
    config = config_of_source(cfg.model.source)
    config.num_hidden_layers = 3
    return report_json(rehearse(cfg, config, "single", world=1))


LAYERS: dict[str, Callable[[], dict[str, Any]]] = {
    "bf16": lambda: mini("bf16"),
    "nf4": lambda: mini("bf16", quantization="nf4"),
    "recomputed": lambda: mini("bf16", activation_checkpointing=True),
    "fp8": lambda: mini("bf16", fp8=True),
}


def _probes() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in PROBES:
        try:
            found[name] = probe(name)
        except RuntimeError as error:  # of fake tensors, on two devices
            found[name] = {"error": type(error).__name__}
    return found


def main(which: str) -> None:
    """Print everything; `short` leaves cells out that others stand for, `table` prints the tests' `LAYER` alone."""
    import_all()
    *layers, probes = forked([*LAYERS.values(), _probes], jobs=2)
    if which == "table":
        for kind, found in zip(LAYERS, layers, strict=True):
            for part, kernels in found["kernels"].items():
                sizes = (kernels["launches"], kernels["read_bytes"] // 2**20, kernels["written_bytes"] // 2**20)
                sys.stdout.write(f"    {(kind, part)}: {sizes},\n" if part.startswith("layer ") else "")
        return
    chosen = cells() if which == "full" else [cell for cell in cells() if in_short(cell)]
    outcomes = [
        {**vars(outcome), "cell": vars(outcome.cell), "not_rehearsed": outcome.not_rehearsed}
        for outcome in rehearse_cells(chosen, jobs=2)
    ]
    everything = {"cells": outcomes, "probes": probes, "layers": dict(zip(LAYERS, layers, strict=True))}
    sys.stdout.write(json.dumps(everything))


def in_short(cell: Cell) -> bool:
    """Every strategy, every quantisation where it is whole and where it is sharded or refused so, each precision.

    A quantised base under DDP is the same as on one device; fp32 is computed in with a base of 16 bits alone. FSDP2's
    NF4 stands for ZeRO-3's, which takes as long as three other cells.
    """
    if cell.device == "cpu" or (cell.strategy == "single" and cell.quantization == "none"):
        return True
    sharded = {"fsdp2"} if cell.quantization == "nf4" else {"zero3", "fsdp2"}
    return cell.precision == "bf16" and (cell.quantization == "none" or cell.strategy in {"single", *sharded})


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "short")
