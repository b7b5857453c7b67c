"""SIGKILL at random moments of a run that saves often: nothing that was saved is lost, and the end is the same.

After every kill the newest checkpoint verifies and lies at most one save interval behind the last logged step; the
next start goes on from it; the finished adapter and every row of metrics.jsonl equal those of the undisturbed run.
A kill counts as amid a save when a `step_NNNNNN.tmp` was left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from phi3_dist.training.checkpoints.files import find_checkpoint
from tests import warm
from tests.ranks.launcher import REPO
from tests.ranks.processes import lives, ranks_below
from tests.ranks.test_resume import same_bits
from tests.ranks.test_strategies import RUN, clean_environment
from tests.torture.group import Group, nursery

pytestmark = pytest.mark.ranks

EVERY, WORLD, SURVIVORS_S = 2, 2, 4.0
# a rank this large makes a state of some 20 MiB: writing, hashing and syncing it is most of a step
ARGUMENTS = (
    "train", str(REPO / RUN), "model.precision=fp32", "lora.r=1024", "lora.alpha=1024", "lora.dropout=0.1",
    "optim.lr=1e-4", "train.micro_batch=1", "train.max_steps=24", f"save.every={EVERY}", "save.keep=3",
    "log.trackers=[]",
)  # fmt: skip


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    return nursery()


@pytest.fixture(scope="module")
def undisturbed(context: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The run that nobody kills, and its seconds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    Group(context, ("train", "--help"), 1, folder / "help.log").wait(120)  # the server's imports are not the run's
    start = time.monotonic()
    group = Group(context, (*ARGUMENTS, f"save.folder={folder / 'run'}"), WORLD, folder / "log")
    group.wait(120)
    assert group.exit_codes == [0, 0], group.output()
    return folder / "run", time.monotonic() - start


class Victim:
    """One run folder that is started, killed and started again until it has finished."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.starts, self.expected = folder, 0, 0
        folder.mkdir()

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def arguments(self) -> tuple[str, ...]:
        return (*ARGUMENTS, f"save.folder={self.run}", "--resume")

    def next_log(self) -> Path:
        self.starts += 1
        return self.folder / f"log_{self.starts}"

    def temporary(self) -> bool:
        return any((self.run / "checkpoints").glob("step_*.tmp"))

    def check_start(self, output: str) -> None:
        """The run went on from the checkpoint that stood there when it was killed."""
        found = re.search(r"resumed after step (\d+) of", output)
        if found is not None:
            assert int(found[1]) == self.expected, output

    def check_kill(self) -> None:
        found, passed = find_checkpoint(self.run / "checkpoints")
        self.expected = found.step if found else 0
        assert not passed, "a checkpoint under its final name didn't verify"
        last = last_step(self.run)
        assert last - self.expected <= EVERY, f"step {last} was logged and step {self.expected} is the newest saved"


def last_step(run: Path) -> int:
    """The last step of metrics.jsonl, whose last line may be torn."""
    steps = [0]
    if (run / "metrics.jsonl").exists():
        for line in (run / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                steps += [row["step"]] if row["kind"] == "train" else []
    return max(steps)


def await_save(victim: Victim, group: Group, rng: random.Random) -> None:
    """Until a save after some others is under way, then a moment more."""
    saves = rng.randrange(4)
    seen = victim.temporary()
    while group.alive():
        now = victim.temporary()
        if now and not seen:
            saves -= 1
            if saves < 0:
                time.sleep(rng.uniform(0, 0.02))
                return
        seen = now
        time.sleep(0.0005)


def torture(
    kills: int, seed: int, context: ForkServerContext, undisturbed: tuple[Path, float], tmp_path: Path, *, amid: int
) -> Counter[str]:
    """Kill `kills` times, half of them once a save is seen to begin, and more until `amid` of them have hit one.

    All of them once a save begins, if `amid` is all. Counts by kind, and those amid a save. How many hit depends on
    the disk, so that there is no end to it but twice the number and ten.
    """
    reference, run_s = undisturbed
    rng, counts = random.Random(seed), Counter[str]()
    victim = Victim(tmp_path / "run_0")
    while counts["kills"] < kills or (counts["amid a save"] < amid and counts["kills"] < 2 * kills + 10):
        group = Group(context, victim.arguments(), WORLD, victim.next_log())
        try:
            if amid >= kills or rng.random() < 0.5:
                await_save(victim, group, rng)
            else:
                group.wait(rng.uniform(0, run_s))
            if group.alive():
                kind = rng.choice(("one rank", "all ranks"))
                if kind == "one rank":
                    group.kill(rng.randrange(WORLD))
                    group.wait(SURVIVORS_S)  # a launcher would end the others; most end by themselves
                counts.update(("kills", kind))
        finally:
            group.kill()
        victim.check_start(group.output())
        if group.exit_codes == [0, 0]:
            same_bits(victim.run, reference)
            victim = Victim(tmp_path / f"run_{victim.folder.name[4:]}{counts['kills']}")
            continue
        counts["amid a save"] += victim.temporary()
        victim.check_kill()
    finish(victim, context, reference)
    return counts


def finish(victim: Victim, context: ForkServerContext, reference: Path) -> None:
    group = Group(context, victim.arguments(), WORLD, victim.next_log())
    group.wait(120)
    group.kill()
    assert group.exit_codes == [0, 0], group.output()
    victim.check_start(group.output())
    same_bits(victim.run, reference)
    assert not victim.temporary()


def test_a_few_kills_lose_nothing(context: ForkServerContext, undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    counts = torture(1, 0, context, undisturbed, tmp_path, amid=1)
    assert counts["amid a save"] >= 1, counts


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_ninety_kills_of_ranks_lose_nothing(
    context: ForkServerContext,
    undisturbed: tuple[Path, float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    counts = torture(90, 1, context, undisturbed, tmp_path, amid=20)
    with capsys.disabled():
        print(f"\n[torture] {dict(counts)}")
    assert counts["amid a save"] >= 20, counts
    assert min(counts["one rank"], counts["all ranks"]) >= 20, counts


def launched(victim: Victim) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A launcher with its two ranks, which are ended whatever comes."""
    command = [warm.python(), "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    command += ["configs/accelerate/cpu_2.yaml", "-m", "phi3_dist", *victim.arguments()]
    log = victim.next_log()
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=REPO, env=clean_environment(), stdout=out, stderr=out)
    ranks: list[int] = []
    try:
        while process.poll() is None and "step " not in log.read_text(errors="replace"):
            time.sleep(0.02)
        ranks += ranks_below(process.pid)
        yield process, ranks
    finally:
        process.kill()
        process.wait()
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while any(map(lives, ranks)):
            time.sleep(0.01)


def kill_launchers(
    kills: int, seed: int, context: ForkServerContext, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    """Ranks whose launcher was killed train on: while they do, nobody else may go on in their folder."""
    rng, victim = random.Random(seed), Victim(tmp_path / "run_0")
    with contextlib.ExitStack() as stack:
        for _ in range(kills):
            process, ranks = stack.enter_context(contextlib.contextmanager(launched)(victim))
            assert len(ranks) == WORLD
            time.sleep(rng.uniform(0, 0.2))
            os.kill(ranks[0], signal.SIGSTOP)  # so that the run doesn't end while the other is refused
            process.kill()
            process.wait()
            second = Group(context, victim.arguments(), 1, victim.folder / "second.log")
            second.wait(60)
            assert second.exit_codes == [7], second.output()
            assert "another process trains in here" in second.output()
            os.kill(ranks[0], signal.SIGCONT)
            time.sleep(rng.uniform(0, 0.2))
            stack.close()
            victim.check_kill()
    finish(victim, context, undisturbed[0])


def test_a_killed_launcher_leaves_ranks_that_nobody_disturbs(
    context: ForkServerContext, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    kill_launchers(1, 0, context, undisturbed, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_ten_killed_launchers_lose_nothing(
    context: ForkServerContext, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    for number in range(10):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        kill_launchers(1, number, context, undisturbed, folder)
