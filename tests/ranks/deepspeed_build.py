"""Compile (or load) DeepSpeed's CPU operators: rank 0 shm_comm, rank 1 cpu_adam. Run by the fixture `deepspeed_ops`."""

from __future__ import annotations

import os


def build() -> str:
    """Name of the operator that this process built."""
    from deepspeed.ops.op_builder.cpu import CPUAdamBuilder
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

    builder = (ShareMemCommBuilder, CPUAdamBuilder)[int(os.environ["RANK"])]()
    builder.load(verbose=False)
    return str(builder.name)
