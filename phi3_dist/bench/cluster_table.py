"""The tables of docs/scaling.md: what the planner says of 8, 64 and 1,024 GPUs for each model of the family.

    python -m phi3_dist.bench.cluster_table [--gpu h100-80gb] [--shared-gbps 20] [--local-gbps 2]

Nothing is measured: steps and memory are the planner's, a checkpoint's and a start's seconds its bytes over the rates
that are given here. No torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from phi3_dist.config.schema import DataConfig, LoraConfig, ModelConfig, RunConfig, TrainConfig
from phi3_dist.family.variants import FAMILIES, Family
from phi3_dist.machine.print_encoding import print_in_any_encoding
from phi3_dist.planning.advice import Advice, Cluster, Option, advise
from phi3_dist.planning.advice_table import seconds
from phi3_dist.planning.gpus import Gpu, find_gpu
from phi3_dist.planning.memory import GIB, adapter_parameters
from phi3_dist.planning.timing import rates_of_gpu

__all__ = ["choices", "main", "start_up", "steps"]

GPUS = (8, 64, 1024)
LENGTH = 4096
SHOWN = ("ddp", "fsdp2", "zero3")
NAMES = ("mini-4k", "medium-4k", "Phi-4-mini", "Phi-4")
PACKAGES = {"torch": "2.13.0", "deepspeed": "0.19", "bitsandbytes": "0.50", "triton": "3.6"}
CHECKPOINT_BYTES = 4 + 8
"""Of a trained value: the adapter in float32 and two moments."""
CACHED_REQUESTS = 1
"""Of a rank for a base that is in the hub's cache: which commit its name means. A folder asks nothing."""


@dataclass(frozen=True)
class Storage:
    """GB/s of all nodes together on a shared file system, and of one node's own disk."""

    shared_gbps: float
    local_gbps: float


def _families() -> list[Family]:
    by_name = {family.name: family for family in FAMILIES}
    return [by_name[name] for name in NAMES]


def _run(family: Family, gpus: int) -> RunConfig:
    return RunConfig(
        model=ModelConfig(source=family.hub_ids[0], precision="bf16"),
        data=DataConfig(train="rows.jsonl", pack_length=LENGTH),
        lora=LoraConfig(r=16, dropout=0.05),
        train=TrainConfig(global_batch=max(64, gpus), micro_batch=1),
    )


def advice_for(family: Family, gpus: int, card: Gpu) -> Advice:
    cluster = Cluster(gpus // 8, 8, card.memory_gib, float("inf"), rates_of_gpu(card), card)
    return advise(_run(family, gpus), cluster, family, PACKAGES)


def _table(heads: list[str], rows: Iterator[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _share(option: Option) -> str:
    assert option.time is not None
    return f"{option.time.network_s / option.time.total_s:.0%}"


def steps(card: Gpu) -> str:
    """Memory, network and time of DDP, FSDP2 and ZeRO-3, unquantised."""
    heads = ["model", "GPUs", "strategy", "peak GiB", "host GiB a node", "network GiB", "step", "network", "binds"]

    def rows() -> Iterator[list[str]]:
        for family in _families():
            for gpus in GPUS:
                advice = advice_for(family, gpus, card)
                for one in advice.options:
                    if one.name not in SHOWN or one.time is None or one.traffic is None:
                        continue
                    cells = [family.name, f"{gpus:,}", one.name, f"{one.peak_gib:.1f}", f"{one.host_gib:.0f}"]
                    cells += [f"{one.traffic.network / GIB:.2f}", seconds(one.time.total_s), _share(one)]
                    note = "recommended" if one is advice.best else "" if one.state == "fits" else "too large"
                    yield [*cells, one.time.binds, f"{one.tokens_s:,.0f}", note]

    return _table([*heads, "tokens/s", ""], rows())


def choices(cards: tuple[str, ...]) -> str:
    """What is recommended on each card."""
    heads = ["card", "model", *(f"{gpus:,} GPUs" for gpus in GPUS)]

    def rows() -> Iterator[list[str]]:
        for name in cards:
            for family in _families():
                best = [advice_for(family, gpus, find_gpu(name)).best for gpus in GPUS]
                words = [f"{one.name}, {one.peak_gib:.1f} GiB" if one is not None else "nothing fits" for one in best]
                yield [name, family.name, *words]

    return _table(heads, rows())


def start_up(storage: Storage) -> str:
    """What the nodes read before the first step, and what a checkpoint writes."""
    heads = ["model", "GPUs", "nodes read", "from the shared file system", "from their own disks", "asks of the hub"]

    def rows() -> Iterator[list[str]]:
        for family in _families():
            base = family.shape.parameters * 2
            trainable = adapter_parameters(family.shape, 16)
            checkpoint = trainable * CHECKPOINT_BYTES
            for gpus in GPUS:
                whole = base * (gpus // 8)
                cells = [family.name, f"{gpus:,}", f"{whole / GIB:,.0f} GiB"]
                cells += [seconds(whole / (storage.shared_gbps * 1e9)), seconds(base / (storage.local_gbps * 1e9))]
                cells += [f"{gpus * CACHED_REQUESTS:,}", f"{checkpoint / GIB:.2f} GiB"]
                yield [*cells, seconds(checkpoint / (storage.local_gbps * 1e9))]

    return _table([*heads, "a checkpoint", "its writing"], rows())


def main(arguments: list[str] | None = None) -> None:
    """Print the page's tables."""
    print_in_any_encoding()
    parser = argparse.ArgumentParser(prog="python -m phi3_dist.bench.cluster_table", description=__doc__)
    parser.add_argument("--gpu", default="h100-80gb")
    parser.add_argument("--shared-gbps", type=float, default=20.0, help="GB/s of the shared file system, all nodes")
    parser.add_argument("--local-gbps", type=float, default=2.0, help="GB/s of a node's own disk")
    options = parser.parse_args(arguments)
    card = find_gpu(options.gpu)
    storage = Storage(options.shared_gbps, options.local_gbps)
    tables = (steps(card), choices((card.name, "a100-40gb", "l4")), start_up(storage))
    sys.stdout.write("\n".join(tables))


if __name__ == "__main__":
    main()
