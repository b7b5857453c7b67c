"""A rank that is killed leads to a restart from the last checkpoint, without a person and without a trace."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import warm
from tests.ranks.launcher import REPO, free_port
from tests.ranks.processes import descendants, lives, ranks_below
from tests.ranks.test_resume import same_bits
from tests.ranks.test_strategies import RUN, SAME, clean_environment

pytestmark = pytest.mark.ranks
LONG = ("train.max_steps=30", "save.every=2")


def address() -> str:
    """One that is not loopback, which multinode.sh refuses."""
    found = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout.split()
    if not found:
        pytest.skip("this machine has no address but loopback")
    return found[0]


def started(
    script: str, folder: Path, log: Path, *options: str, more: tuple[str, ...] = (), warmed: bool = False
) -> subprocess.Popen[bytes]:
    """One launch script; with `warmed`, the Python that it finds is `warm.python()`."""
    command = ["bash", f"launch/{script}", *options, RUN, *SAME, *LONG, *more, f"save.folder={folder}"]
    env = clean_environment() | {"VIRTUAL_ENV": "active", "ACCELERATE_USE_CPU": "true"}
    if warmed:
        env["PATH"] = f"{Path(warm.python()).parent}{os.pathsep}{env['PATH']}"
    with log.open("w") as out:
        return subprocess.Popen(command, cwd=REPO, env=env, stdout=out, stderr=out, start_new_session=True)


def kill_a_rank(process: subprocess.Popen[bytes], log: Path, *, after: str) -> None:
    """SIGKILL one of its ranks as soon as the run has logged step `after`."""
    until_s = time.monotonic() + 150
    while f"step {after}/" not in log.read_text():
        if time.monotonic() > until_s:
            end(process)
            raise AssertionError(log.read_text())
        time.sleep(0.02)
    os.kill(ranks_below(process.pid)[-1], signal.SIGKILL)


def ended(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(timeout=200)
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Nothing of it is left."""
    for pid in (*descendants(process.pid), process.pid):
        if lives(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = started("local.sh", folder / "run", folder / "log", "--config", "cpu_2", warmed=True)
    assert ended(process) == 0, (folder / "log").read_text()
    return folder / "run"


def test_a_killed_rank_is_restarted_on_one_machine(undisturbed: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = started("local.sh", tmp_path / "run", log, "--config", "cpu_2", "--restarts", "2", warmed=True)
    kill_a_rank(process, log, after="9")
    assert ended(process) == 0, log.read_text()
    assert "restart 1 of 2, from the last checkpoint" in log.read_text()
    assert "resumed after step" in log.read_text()
    same_bits(tmp_path / "run", undisturbed)


def test_without_restarts_the_end_is_told_in_a_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    more = ("train.max_steps=300",)
    process = started("local.sh", tmp_path / "run", log, "--config", "cpu_2", more=more, warmed=True)
    kill_a_rank(process, log, after="3")
    assert ended(process) == 128 + signal.SIGKILL, log.read_text()
    last = log.read_text().splitlines()[-1]
    assert last == "phi3-dist launch: rank 1 was killed by SIGKILL, and the others were stopped"
    assert "ChildFailedError" not in log.read_text()


def test_a_mistake_that_ranks_find_has_its_own_exit_code_and_no_traceback(tmp_path: Path) -> None:
    """lora.targets are compared with the model, which no launcher opens."""
    log = tmp_path / "log"
    process = started(
        "local.sh", tmp_path / "run", log, "--config", "cpu_2", "--restarts", "2",
        more=("lora.targets=[q_proj]",), warmed=True,
    )  # fmt: skip
    assert ended(process) == 4
    assert "name qkv_proj" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert "restart" not in log.read_text()


@pytest.mark.full
def test_a_killed_rank_is_restarted_on_two_nodes(undisturbed: Path, tmp_path: Path) -> None:
    """Both launchers end, and both start again."""
    options = ("--nodes", "2", "--master", address(), "--port", str(free_port()), "--processes-per-node", "1")
    logs = [tmp_path / f"log_{rank}" for rank in range(2)]
    both = [
        started("multinode.sh", tmp_path / "run", log, *options, "--restarts", "2", "--node-rank", str(rank))
        for rank, log in enumerate(logs)
    ]
    kill_a_rank(both[1], logs[0], after="9")
    codes = [ended(process) for process in both]
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)
    assert all("restart 1 of 2" in log.read_text() for log in logs)
    assert "resumed after step" in logs[0].read_text()
    same_bits(tmp_path / "run", undisturbed)
