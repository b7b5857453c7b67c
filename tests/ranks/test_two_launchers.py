"""Two nodes, played by two launchers on this machine: the same numbers, one config, and an end to all when one dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import warm
from tests.ranks.launcher import REPO, free_port
from tests.ranks.processes import descendants, lives, ranks_below
from tests.ranks.test_strategies import ENDLESS, RUN, SAME, clean_environment, compare, launch

pytestmark = pytest.mark.ranks
END_S = 60  # within which the others must have stopped after a rank has died


class Node:
    """One launcher and its ranks. Output goes to a file; `trainers` are the ranks' own processes."""

    def __init__(
        self, config: str, options: tuple[str, ...], log: Path, *overrides: str, program: str = sys.executable
    ) -> None:
        command = [program, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
        command += [f"configs/accelerate/{config}.yaml", *options, "-m", "phi3_dist", "train", RUN, *SAME, *overrides]
        self.log = log
        # CPU ranks with a GPU config: DeepSpeed and FSDP2 find the CPU themselves, DDP asks Accelerate
        env = clean_environment() | ({"ACCELERATE_USE_CPU": "true"} if config.startswith("ddp") else {})
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, cwd=REPO, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def trainers(self) -> list[int]:
        return ranks_below(self.process.pid)

    def reached(self, step: int, timeout_s: float = 120) -> None:
        """Wait for the line of this step."""
        until_s = time.monotonic() + timeout_s
        while f"step {step}/" not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < until_s, self.output
            time.sleep(0.1)


@contextmanager
def nodes(
    config: str,
    folder: Path,
    *overrides: str,
    processes: int = 1,
    of_second: tuple[str, ...] = (),
    program: str = sys.executable,
) -> Iterator[tuple[Node, Node]]:
    """Two launchers with `processes` ranks each; none of their processes outlives the block."""
    folder.mkdir(exist_ok=True)
    port = str(free_port())
    common = ("--num_machines", "2", "--num_processes", str(2 * processes))
    common += ("--main_process_ip", "127.0.0.1", "--main_process_port", port)
    started = []
    try:
        for rank in range(2):
            extra = (f"save.folder={folder / 'run'}", *overrides, *(of_second if rank else ()))
            options = (*common, "--machine_rank", str(rank))
            started.append(Node(config, options, folder / f"node_{rank}.log", *extra, program=program))
        yield started[0], started[1]
    finally:
        for node in started:
            for pid in (*descendants(node.process.pid), node.process.pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            node.process.wait()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_process") / "run"
    done = launch(None, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("config", "processes"),
    [
        ("ddp_multinode", 1),
        ("zero3_multinode", 1),
        pytest.param("ddp_multinode", 2, marks=pytest.mark.full),
        pytest.param("zero3_multinode", 2, marks=pytest.mark.full),
        *(
            pytest.param(f"{name}_multinode", 1, marks=pytest.mark.full)
            for name in ("zero1", "zero2", "zero2_offload", "zero3_offload", "fsdp2")
        ),
    ],
)
def test_two_nodes_give_one_process_numbers(
    config: str, processes: int, reference: Path, tmp_path: Path, deepspeed_ops: Path
) -> None:
    program = warm.python() if processes == 1 else sys.executable
    with nodes(config, tmp_path / "two", processes=processes, program=program) as two:
        for node in two:
            assert node.process.wait(timeout=150) == 0, node.output
        assert f"strategy: {config.removesuffix('_multinode')}" in two[0].output
    compare(tmp_path / "two" / "run", reference)


def test_nodes_with_different_configs_are_told_so_before_step_1(tmp_path: Path) -> None:
    with nodes("ddp_multinode", tmp_path / "two", of_second=("optim.lr=0.002",), program=warm.python()) as two:
        for node in two:
            assert node.process.wait(timeout=END_S) != 0
            assert re.search(r"rank 1:? optim.lr is 0.002, on rank 0 it is 0.001", node.output), node.output
            assert "step 1/" not in node.output


@pytest.mark.parametrize(
    ("config", "real"),
    [
        ("fsdp2", False),
        pytest.param("zero3", True, marks=pytest.mark.full),
        pytest.param("fsdp2", True, marks=pytest.mark.full),
    ],
)
def test_a_sharded_rank_that_dies_ends_the_others(config: str, real: bool, tmp_path: Path, deepspeed_ops: Path) -> None:
    """On one node: the launcher ends with an error that names the signal, and no rank is left."""
    folder = tmp_path / "one"
    folder.mkdir()
    options = ("--num_processes", "2")
    program = sys.executable if real else warm.python()
    node = Node(config, options, folder / "node.log", *ENDLESS, f"save.folder={folder / 'run'}", program=program)
    try:
        node.reached(3)
        trainers = node.trainers
        assert len(trainers) == 2
        os.kill(trainers[1], signal.SIGKILL)
        assert node.process.wait(timeout=END_S) != 0
        assert "SIGKILL" in node.output or "Signal 9" in node.output
        assert not any(lives(pid) for pid in trainers)
    finally:
        for pid in (*descendants(node.process.pid), node.process.pid):
            if lives(pid):
                os.kill(pid, signal.SIGKILL)
        node.process.wait()


@pytest.mark.parametrize("config", ["zero3_multinode", pytest.param("ddp_multinode", marks=pytest.mark.full)])
def test_a_rank_that_dies_ends_the_other_node_too(config: str, tmp_path: Path, deepspeed_ops: Path) -> None:
    with nodes(config, tmp_path / "two", *ENDLESS, program=warm.python()) as two:
        two[0].reached(3)
        trainers = [pid for node in two for pid in node.trainers]
        assert len(trainers) == 2
        os.kill(two[1].trainers[0], signal.SIGKILL)
        until_s = time.monotonic() + END_S
        for node in two:
            assert node.process.wait(timeout=max(0.1, until_s - time.monotonic())) != 0
        assert not any(lives(pid) for pid in trainers)
