"""`phi3-dist` on a rank that shares one GPU with others: NCCL is told that each rank is a host of its own.

    accelerate launch --config_file configs/accelerate/fsdp2.yaml --num_processes 2 -m phi3_dist.bench.card.one_card \
        train RUN.yaml …

They talk over loopback sockets. For checks alone: the memory of one card holds all of them.
"""

from __future__ import annotations

import dataclasses
import os
import runpy

from phi3_dist.machine import probe as machine

__all__ = ["share"]

RANKS = 8


def share() -> None:
    """Let this rank believe that it has a card to itself. Before torch is asked for one."""
    os.environ |= {
        "NCCL_HOSTID": f"rank{os.environ['RANK']}",
        "NCCL_P2P_DISABLE": "1",
        "NCCL_SHM_DISABLE": "1",
        "NCCL_IB_DISABLE": "1",
        "NCCL_SOCKET_IFNAME": "lo",
        "LOCAL_RANK": "0",  # DeepSpeed and Accelerate take the device from it
    }
    seen = machine.probe
    machine.probe = lambda **asked: dataclasses.replace(seen(**asked), devices_per_node=RANKS)


if __name__ == "__main__":
    share()
    runpy.run_module("phi3_dist", run_name="__main__")
