"""The kernels of a layer on one card: right against float32, and timed beside what they would replace.

    python -m phi3_dist.bench.kernels                          # on CUDA, Phi-3-mini's layer, 4,096 tokens, bf16
    TRITON_INTERPRET=1 python -m phi3_dist.bench.kernels --toy # the same at toy sizes in Triton's interpreter, on a CPU

One JSON line a check; a check that fails says so in its line and the others go on. Each group is a process of its own
with a limit of its own, since an error on the device spoils what follows in its process. `rel` is the norm of the
difference over the norm of the float32 result; `by` holds milliseconds (medians, the cache flushed before each run);
`gb_s` counts the bytes that the pass must move, `tflops` the base's products alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from phi3_dist.bench.kernel_checks import compiled, fp8_checks, loss, passes
from phi3_dist.bench.kernel_table import Table
from phi3_dist.bench.lora_checks import lora, sweep

__all__ = ["GROUPS", "main", "rates"]

_LIMITS_S = {"rates": 40, "passes": 60, "lora": 90, "fp8": 60, "loss": 40, "compiled": 90, "sweep": 90}


def rates(table: Table) -> None:
    """The memory's and the matrix units' rates, by which everything else is judged."""

    def copy() -> dict[str, Any]:
        source = torch.empty(2**16 if table.toy else 2**29, dtype=torch.uint8, device=table.device)
        target = torch.empty_like(source)
        ms = table.ms(lambda: target.copy_(source))
        return {"gb_s": round(2 * source.numel() / ms / 1e6, 1)}

    def products() -> dict[str, Any]:
        found, total_ms, total = {}, 0.0, 0.0
        for name, (outputs, inputs) in table.sizes.linears.items():
            x, weight = table.make(table.sizes.tokens, inputs), table.make(outputs, inputs)
            grad, flops = table.make(table.sizes.tokens, outputs), 2.0 * table.sizes.tokens * outputs * inputs
            for way, call in (("forward", lambda: F.linear(x, weight)), ("backward", lambda: grad @ weight)):  # noqa: B023
                ms = table.ms(call)
                found[f"{name} {way}"] = round(flops / ms / 1e9, 1)
                total_ms, total = total_ms + ms, total + flops
        return {"tflops": found, "tflops_together": round(total / total_ms / 1e9, 1), "layer_ms": round(total_ms, 3)}

    table.check("copy bandwidth", copy)
    table.check("matrix rate", products)


GROUPS: dict[str, Callable[[Table], None]] = {
    "rates": rates,
    "passes": passes,
    "lora": lora,
    "fp8": fp8_checks,
    "loss": loss,
    "sweep": sweep,
    "compiled": compiled,
}


def main(arguments: list[str] | None = None) -> None:
    """Run every group, each in a process. Ends with 1 where there is no CUDA device and no `--toy`."""
    parser = argparse.ArgumentParser(prog="python -m phi3_dist.bench.kernels", description=__doc__)
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU, with TRITON_INTERPRET=1")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="bf16; with --toy fp32")
    parser.add_argument("--groups", default=",".join(GROUPS), help="which groups, joined by commas")
    parser.add_argument("--checks", default="", help="a regular expression: the checks whose names it finds; --here")
    parser.add_argument("--here", action="store_true", help="in this process")
    options = parser.parse_args(arguments)
    if not options.toy and not torch.cuda.is_available():
        sys.stdout.write("no CUDA device: TRITON_INTERPRET=1 and --toy rehearse on a CPU\n")
        sys.exit(1)
    dtype_name = options.dtype or ("fp32" if options.toy else "bf16")
    names = options.groups.split(",")
    if options.here:
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype_name]
        table = Table(toy=options.toy, dtype=dtype, checks=options.checks)
        for name in names:
            table.group = name
            GROUPS[name](table)
        return
    for name in names:
        command = [sys.executable, "-m", "phi3_dist.bench.kernels", "--here", "--groups", name, "--dtype", dtype_name]
        try:
            done = subprocess.run([*command, *(["--toy"] if options.toy else [])], timeout=_LIMITS_S[name], check=False)
            ended = f"ended with {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            ended = f"stopped after {_LIMITS_S[name]} s"
        if ended:
            sys.stdout.write(f"{json.dumps({'group': name, 'ok': False, 'error': ended})}\n")


if __name__ == "__main__":
    main()
