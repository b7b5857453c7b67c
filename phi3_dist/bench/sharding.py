"""What ZeRO-3's and FSDP2's prefetch settings are worth: the time of a step under each, in turns.

    python -m phi3_dist.bench.sharding [--rounds N] [--size mini]

LoRA r=16 on every linear layer of a random Phi-3, one pack of at most 1,024 tokens a rank and step. On GPUs one rank
each, in bf16, with Phi-3-mini's shape; without GPUs two CPU ranks of one thread each, in float32, over gloo, with 47 M
parameters. In each round every setting of a strategy takes three steps; the first round is warm-up, medians are of the
others. The last line names the fastest ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from phi3_dist.bench.console import say
from phi3_dist.bench.gpu import MINI
from phi3_dist.bench.scaling import SIZES, ranks, rows_of_length, shape_of, together
from phi3_dist.bench.throughput import side_process
from phi3_dist.bench.throughput_sides import PACK_LENGTH, Round, Stand, make_token_packs, save_base
from phi3_dist.machine.print_encoding import print_in_any_encoding
from phi3_dist.planning.launch_configs import deepspeed_json

__all__ = ["SETTINGS", "Setting", "main", "prefetch_layers", "table"]

STEPS = 3


@dataclass(frozen=True)
class Setting:
    """A strategy with what differs from the shipped config: keys of `zero_optimization`, or FSDP2's layers ahead."""

    name: str
    strategy: str
    zero: Mapping[str, Any] = field(default_factory=dict)
    ahead: int = 0


SETTINGS = (
    Setting("zero3 as shipped", "zero3"),
    Setting("zero3 without prefetch", "zero3", {"stage3_prefetch_bucket_size": 0}),
    Setting("zero3 prefetch 200 M values", "zero3", {"stage3_prefetch_bucket_size": 200_000_000}),
    Setting("zero3 overlap_comm false", "zero3", {"overlap_comm": False}),
    Setting("fsdp2 as shipped", "fsdp2"),
    Setting("fsdp2 1 layer ahead", "fsdp2", ahead=1),
    Setting("fsdp2 2 layers ahead", "fsdp2", ahead=2),
)


def serve(pipe: Connection, folder: Path, environment: dict[str, str], world: int, setting: Setting) -> None:
    """A rank under `setting`, which takes STEPS steps for each word received."""
    os.environ.update(environment)
    import torch

    use_cpu = not torch.cuda.is_available()
    zero = None
    if setting.strategy == "zero3":
        zero = json.loads(deepspeed_json("zero3"))
        zero["zero_optimization"].update(setting.zero)
    model = {"precision": "fp32" if use_cpu else "bf16"}
    stand = Stand(folder, world=world, use_cpu=use_cpu, model=model, strategy=setting.strategy, zero=zero)
    if setting.ahead:
        prefetch_layers(stand.model, setting.ahead)
    pack = rows_of_length(PACK_LENGTH)
    packs = make_token_packs(pack * (STEPS * world))
    pipe.send("ready")
    while pipe.recv() != "stop":
        pipe.send(stand.round(packs))


def prefetch_layers(model: Any, ahead: int) -> None:
    """Let each FSDP2 layer ask for the next `ahead` ones before it computes, forward and backward.

    Without it each layer's weights are asked for once the host has queued the layer before, which on a GPU is early.
    """
    layers = list(model.causal_lm.model.layers)
    for number, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[number + 1 : number + 1 + ahead])
        layer.set_modules_to_backward_prefetch(layers[max(number - ahead, 0) : number][::-1])


def measure(rounds: int, world: int, size: str, *, cpu: bool) -> dict[str, list[Round]]:
    """The rounds of each setting that count; one strategy after the other, since each setting holds a model."""
    found: dict[str, list[Round]] = {setting.name: [] for setting in SETTINGS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "bases"
        with side_process(save_base, 1, folder, {size: MINI if size == "mini" else shape_of(size)}) as maker:
            maker.recv()
        for strategy in dict.fromkeys(setting.strategy for setting in SETTINGS):
            of = [setting for setting in SETTINGS if setting.strategy == strategy]
            _take_turns(found, of, folder / size, rounds, world, cpu=cpu)
    return found


def _take_turns(
    found: dict[str, list[Round]],
    settings: list[Setting],
    base: Path,
    rounds: int,
    world: int,
    *,
    cpu: bool,
) -> None:
    started = {}
    with ExitStack() as stack:
        for setting in settings:  # one after the other: together they would all build DeepSpeed's operators
            as_cpu = cpu and setting.strategy != "zero3"  # DeepSpeed finds out by itself, and minds being told
            group = ranks(base, world, serve, setting, cpu=as_cpu)
            started[setting.name] = stack.enter_context(group)
        for number in range(rounds + 1):
            for name, pipes in started.items():
                done = together(pipes, "round")
                if number:
                    found[name].append(done)


def table(found: Mapping[str, list[Round]]) -> list[str]:
    """A line for each setting: time of a step, lowest to highest, and beside the shipped one of its kind."""
    lines = [f"{'setting':<30} {'step_s':>8}   {'lowest … highest':<18} {'of shipped':>10}"]
    shipped: dict[str, float] = {}
    best: dict[str, tuple[float, str]] = {}
    for name, rounds in found.items():
        times = [one.seconds / STEPS for one in rounds]
        kind, median = name.split(" ", 1)[0], statistics.median(times)
        first = shipped.setdefault(kind, median)
        best[kind] = min(best.get(kind, (median, name)), (median, name))
        span = f"{min(times):.3f} … {max(times):.3f}"
        lines.append(f"{name:<30} {median:8.3f}   {span:<18} {median / first:10.2f}")
    fastest = "; ".join(f"{name}, {median / shipped[kind]:.2f} of shipped" for kind, (median, name) in best.items())
    return [*lines, f"fastest: {fastest}"]


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the table."""
    print_in_any_encoding()
    parser = argparse.ArgumentParser(prog="python -m phi3_dist.bench.sharding", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--size", choices=(*SIZES, "mini"), help="the base (default: mini on GPUs, else 47M)")
    options = parser.parse_args(arguments)
    import torch

    gpus = torch.cuda.device_count()
    if gpus == 1:
        sys.exit("one GPU shards nothing: this benchmark needs two, or none (CUDA_VISIBLE_DEVICES= for two CPU ranks)")
    where = f"{gpus} x {torch.cuda.get_device_name()}" if gpus else "2 CPU ranks of one thread"
    say(f"{where}; others' load {os.getloadavg()[0]:.1f} at the start")
    for line in table(measure(options.rounds, gpus or 2, options.size or ("mini" if gpus else "47M"), cpu=not gpus)):
        say(line)


if __name__ == "__main__":
    main()
