"""Disks that fill up, or have no inode left, at every file that a run writes: one message, and nothing is lost.

Cache and run folder lie on one small disk. From no room at all to room for everything, in steps that hit each file: the
run ends well or with one message; with room, the same command line ends in the adapter of the undisturbed run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from phi3_dist.training.checkpoints.files import find_checkpoint
from tests.disks import Disk, small_disk, unfinished
from tests.ranks.launcher import REPO
from tests.ranks.test_resume import same_bits
from tests.ranks.test_strategies import RUN
from tests.torture.group import Group, nursery

pytestmark = pytest.mark.ranks

ARGUMENTS = (
    "train", str(REPO / RUN), "model.precision=fp32", "lora.init=pissa", "optim.lr=1e-4", "train.micro_batch=1",
    "train.max_steps=6", "train.eval_every=3", "train.profile=1", "save.every=2", "save.keep=2",
)  # fmt: skip
ENOUGH_KIB, ENOUGH_INODES = 16384, 10_000
OWN_CODES = range(2, 10)
Fill = Callable[[list[dict[str, int]]], Counter[int]]


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    return nursery()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path) as made:
        yield made


def run(context: ForkServerContext, where: Path, log: Path, *more: str) -> tuple[int | None, str]:
    """The exit code and what was printed, of one process whose cache lies beside its run folder."""
    places = (f"save.folder={where / 'run'}",)
    group = Group(context, (*ARGUMENTS, *places, *more), 1, log, more={"XDG_CACHE_HOME": str(where / "cache")})
    group.wait(300)
    group.kill()
    return group.exit_codes[0], group.output()


@pytest.fixture(scope="module")
def undisturbed(context: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    Group(context, ("train", "--help"), 1, folder / "help.log").wait(120)
    code, output = run(context, folder, folder / "log")
    assert code == 0, output
    return folder / "run"


def fill(
    sizes: list[dict[str, int]], *, context: ForkServerContext, undisturbed: Path, disk: Disk, tmp_path: Path
) -> Counter[int]:
    """One run on a disk of each size; counts by exit code."""
    counts: Counter[int] = Counter()
    for number, size in enumerate(sizes):
        disk.mount(**{"kib": ENOUGH_KIB, "inodes": ENOUGH_INODES, **size})
        code, output = run(context, disk.path, tmp_path / f"full_{number}.log")
        assert code == 0 or code in OWN_CODES, (size, code, output)
        assert "Traceback" not in output, (size, output)
        assert code == 0 or "No space left" in output or "its file system is full" in output, (size, output)
        assert not unfinished(disk.path), size
        _, passed = find_checkpoint(disk.path / "run" / "checkpoints")
        assert not passed, "a checkpoint under its final name didn't verify"
        if code == 0:
            assert (disk.path / "run" / "adapter" / "checksums.json").is_file()
        disk.resize(ENOUGH_KIB, ENOUGH_INODES)
        again, output = run(context, disk.path, tmp_path / f"again_{number}.log", "--resume")
        assert again == 0, (size, output)
        assert "Traceback" not in output, (size, output)
        if code:
            same_bits(disk.path / "run", undisturbed)
        counts[code or 0] += 1
    return counts


def needed(undisturbed: Path) -> tuple[int, int]:
    """KiB and inodes of the undisturbed run and its cache."""
    files = [p for p in undisturbed.parent.rglob("*") if p.is_file()]
    return sum(-(-p.stat().st_size // 4096) * 4 for p in files), len(list(undisturbed.parent.rglob("*")))


@pytest.fixture
def filled(context: ForkServerContext, undisturbed: Path, disk: Disk, tmp_path: Path) -> Fill:
    return partial(fill, context=context, undisturbed=undisturbed, disk=disk, tmp_path=tmp_path)


@pytest.mark.timeout(900)
def test_a_few_disks_that_fill_up(filled: Fill, undisturbed: Path) -> None:
    kib, inodes = needed(undisturbed)
    sizes = [{"kib": kib * 2 // 3}, {"inodes": inodes - 8}]
    assert sum(filled(sizes).values()) == 2


@pytest.mark.full
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("lacks", ["kib", "inodes"])
def test_a_disk_that_fills_up_at_every_file(
    lacks: str, filled: Fill, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kib, inodes = needed(undisturbed)
    sizes = (
        [{"kib": size} for size in range(8, kib + 64, max(4, kib // 60 // 4 * 4))]
        if lacks == "kib"
        else [{"inodes": count} for count in range(2, inodes + 4)]
    )
    counts = filled(sizes)
    with capsys.disabled():
        print(f"\n[torture] full disks by {lacks}: exit codes {dict(counts)}")
    assert counts[0] >= 1
    assert len(counts) >= 3
