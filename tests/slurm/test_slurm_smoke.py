"""What `make test` runs of Slurm, where root and the packages are: a job over two nodes, and one that fails."""

from __future__ import annotations

import re
from dataclasses import replace

from tests.slurm.conftest import Desk

# what a rank of a real launch knows, and whether it reaches the others
WORLD = """
exec "$REAL" - "$@" <<'PY'
import os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
print(f"rank {dist.get_rank()} of {dist.get_world_size()} sum {total.item():.0f} args {sys.argv[1:]}", flush=True)
dist.destroy_process_group()
PY
"""


def test_two_nodes_two_ranks(desk: Desk) -> None:
    desk.stand_in(WORLD)
    desk.job = replace(desk.job, arguments=("optim.lr=1e-4", "name=a b"))
    job_id = desk.submit(nodes=2, processes_per_node=None, gpus_per_node=2)
    assert desk.wait(job_id) == ["COMPLETED"], desk.output(job_id)
    args = "args ['run.yaml', 'optim.lr=1e-4', 'name=a b']"
    assert f"rank 0 of 4 sum 10 {args}" in desk.output(job_id)
    assert "rank 1 of 4" not in desk.output(job_id)
    logs = desk.rank_logs(job_id)
    assert list(logs) == ["rank_001.node1.log", "rank_002.node2.log", "rank_003.node2.log"]
    for rank, text in enumerate(logs.values(), start=1):
        assert f"rank {rank} of 4 sum 10 {args}" in text
    master = re.search(r"master (\S+):(\d+)", desk.output(job_id))
    assert master is not None
    assert master[1] == desk.cluster.address("node1")
    assert int(master[2]) == 20000 + int(job_id) % 10000


def test_failure_is_failed(desk: Desk) -> None:
    desk.stand_in('echo "about to fail" >&2; exit 7')
    job_id = desk.submit()
    assert desk.wait(job_id) == ["FAILED"]
    assert "ExitCode=7:0" in desk.cluster.client("scontrol", "show", "job", job_id)
