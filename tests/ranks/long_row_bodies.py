"""What each rank does in test_long_rows_ranks.py."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from phi3_dist.config.load import load_run
from phi3_dist.machine.probe import probe
from phi3_dist.modeling.attention.backend import attend, packed_sdpa
from phi3_dist.modeling.attention.kernel_interface import Documents, Settings
from phi3_dist.modeling.attention.sequence_parallel import Rows, Share, equal_parts
from phi3_dist.planning.facts import LaunchFacts
from phi3_dist.planning.launch_configs import deepspeed_json
from phi3_dist.training import whole_run
from tests.ranks.launcher import REPO

LENGTHS, HEADS, KV_HEADS, SIZE = (5, 1, 7), 4, 2, 8
"""Three documents, of which the last crosses the border between two ranks, and 13 tokens, which two don't divide."""


def train(folder: str, strategy: str, overrides: Sequence[str], *, resume: bool = False) -> None:
    """A run of debug.yaml with these overrides, as `accelerate launch` would start it."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    zero = json.loads(deepspeed_json(strategy)) if strategy.startswith("zero") else {}
    asked = (world, "this test") if world > 1 else (None, "")
    facts = LaunchFacts(world, 1, strategy, *asked, zero, True, rank)
    cfg = load_run(REPO / "configs" / "run" / "debug.yaml", [*overrides, f"save.folder={folder}"])
    whole_run.train(cfg, probe(use_cpu=True), facts, resume=resume, cache=Path(folder).parent / f"cache_{rank}")


def _share(rank: int, world: int, tokens: int) -> tuple[slice, Share]:
    counts = equal_parts(tokens, world)
    start = sum(counts[:rank])
    rows = Rows(start, start + counts[rank], tokens)
    return slice(rows.start, rows.stop), Share(dist.group.WORLD, counts, rows, rows)


def _inputs(dtype: torch.dtype, tokens: int) -> list[torch.Tensor]:
    torch.manual_seed(3)
    made = [torch.randn(tokens, heads, SIZE).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [tensor.requires_grad_() for tensor in made]


def _gradients(out: torch.Tensor, inputs: list[torch.Tensor], mine: slice | None = None) -> list[torch.Tensor]:
    towards = torch.sin(torch.arange(float(HEADS * SIZE * sum(LENGTHS)))).view(-1, HEADS, SIZE).to(out.dtype)
    towards = towards[: inputs[0].shape[0]] if mine is None else towards[mine]
    return list(torch.autograd.grad(out, inputs, towards))


def exchanged(dtype: str, window: int | None) -> None:
    """Attention over a shared pack is attention over the whole of it, forward and backward."""
    kind, tokens = getattr(torch, dtype), sum(LENGTHS)
    mine, share = _share(dist.get_rank(), dist.get_world_size(), tokens)
    rest: dict[str, Any] = {"documents": Documents(LENGTHS), "settings": Settings(SIZE**-0.5, window)}
    whole = _inputs(kind, tokens)
    expected = attend("sdpa", *whole, **rest)
    parts = [tensor.detach()[mine].requires_grad_() for tensor in whole]
    out = attend("sdpa", *parts, **rest, share=share)
    tolerance = {"atol": 1e-6, "rtol": 1e-6} if kind == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    torch.testing.assert_close(out, expected[mine], **tolerance)
    wanted = _gradients(expected, whole)
    for ours, theirs in zip(_gradients(out, parts, mine), wanted, strict=True):
        torch.testing.assert_close(ours, theirs[mine], **tolerance)


def exchanges_then_trains(folder: str, runs: Sequence[tuple[str, str, int, Sequence[str]]]) -> None:
    """Attention by itself, then each run of (name, strategy, port, overrides) in this launch's processes."""
    from accelerate.state import AcceleratorState

    dist.init_process_group("gloo")
    for dtype, window in (("float32", None), ("float32", 3), ("bfloat16", None)):
        exchanged(dtype, window)
    dist.destroy_process_group()
    for name, strategy, port, overrides in runs:
        os.environ["MASTER_PORT"] = str(port)
        AcceleratorState._reset_state(reset_partial_state=True)
        train(f"{folder}/{name}", strategy, overrides)


def as_deepspeeds() -> None:
    """Our exchange beside DeepSpeed's `UlyssesSPAttentionHF`, both around this toolkit's kernel."""
    import deepspeed.comm
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.comm.init_distributed("gloo")
    lengths = (5, 7)  # DeepSpeed's wants as many tokens on each rank
    rank, world, tokens = dist.get_rank(), dist.get_world_size(), sum(lengths)
    mine, share = _share(rank, world, tokens)
    theirs = UlyssesSPAttentionHF(
        packed_sdpa, 1, HEADS, SIZE, KV_HEADS, 1, dist.group.WORLD, seq_length_is_variable=True
    )
    parts = [tensor.detach()[mine].requires_grad_() for tensor in _inputs(torch.float32, tokens)]
    settings = Settings(SIZE**-0.5)
    out = attend("sdpa", *parts, documents=Documents(lengths), settings=settings, share=share)
    positions = torch.cat([torch.arange(n) for n in lengths])[mine][None]
    heads_first = [tensor.transpose(0, 1)[None] for tensor in parts]
    options: dict[str, Any] = {"scaling": settings.scale, "lengths": lengths, "position_ids": positions}
    module = torch.nn.Module()
    other = theirs(module, *heads_first, None, **options)[0].view(-1, HEADS, SIZE)
    torch.testing.assert_close(out, other, atol=1e-6, rtol=1e-6)
    for a, b in zip(_gradients(out, parts, mine), _gradients(other, parts, mine), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
