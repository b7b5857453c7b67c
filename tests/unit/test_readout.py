"""A step's numbers are read while the next one runs, and nothing of the run depends on when."""

from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from phi3_dist.training.engines.backward_and_update import TorchEngine
from tests import warm
from tests.ranks.launcher import REPO
from tests.ranks.test_bad_numbers import OPTIONS, material  # noqa: F401 -- a fixture
from tests.ranks.test_strategies import RUN, SAME, clean_environment, rows

# What a GPU does, on a CPU: numbers read a step late, and an update in one kernel that leaves out a bad one by itself.
# The loop's own calls stand in a mode that sees each operator: reading a tensor's value is one of them.
AS_ON_A_GPU = """
import os, signal, sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from phi3_dist.cli import main
from phi3_dist.training.monitor import readout
from phi3_dist.training import step_loop
from phi3_dist.training.engines import backward_and_update as strategy

behind, fused, killed_in = (int(word) for word in sys.argv[1:4])
del sys.argv[1:4]
readout.STEPS_BEHIND["cpu"] = behind
made, stepped, added = strategy.make_optimizer, step_loop.train_step, step_loop.StepReadout.add

class Reads(TorchDispatchMode):
    count = 0
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        Reads.count += operator is torch.ops.aten._local_scalar_dense.default
        return operator(*args, **kwargs or {})

def make_optimizer(*args):
    optimizer = made(*args)
    for group in optimizer.param_groups:
        group["fused"] = bool(fused)
    return optimizer

def train_step(engine, runtime, packs, order, step, **rest):
    if step + 1 == killed_in:
        os.kill(os.getpid(), signal.SIGTERM)
    with Reads():
        return stepped(engine, runtime, packs, order, step, **rest)

def add(self, *args):
    with Reads():
        added(self, *args)

strategy.make_optimizer, step_loop.train_step, step_loop.StepReadout.add = make_optimizer, train_step, add
try:
    main()
finally:
    print("values read:", Reads.count)
"""


def run(
    folder: Path, *overrides: str, behind: int, fused: bool = False, killed_in: int = 0
) -> subprocess.CompletedProcess[str]:
    again = () if "--resume" in overrides else ("--overwrite",)
    command = [warm.python(), "-c", AS_ON_A_GPU, str(behind), str(int(fused)), str(killed_in), "train", RUN, *SAME]
    command += ["train.max_steps=12", "log.trackers=[]", f"save.folder={folder}", *again, *overrides]
    return subprocess.run(
        command, cwd=REPO, env=clean_environment(), text=True, capture_output=True, timeout=120, check=False
    )


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in their order, without the clock's and the memory's."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.endswith(("_s", "_gib"))}
        for row in found
        if row["kind"] in {"train", "eval", "skipped", "save"}
    ]


def reads(done: subprocess.CompletedProcess[str]) -> int:
    assert done.returncode == 0, done.stderr
    found = re.search(r"values read: (\d+)", done.stdout)
    assert found is not None
    return int(found[1])


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("at_once") / "run"
    assert reads(run(folder, "train.eval_every=5", "save.every=4", behind=0)) >= 12, "the norm, before each update"
    return folder


def test_late_numbers_are_the_same_numbers_in_the_same_order(at_once: Path, tmp_path: Path) -> None:
    reads(run(tmp_path / "run", "train.eval_every=5", "save.every=4", behind=1))
    assert numbers(tmp_path / "run") == numbers(at_once)


def test_no_value_is_read_in_a_step_of_one_kernel(at_once: Path, tmp_path: Path) -> None:
    assert reads(run(tmp_path / "run", "train.eval_every=5", "save.every=4", behind=1, fused=True)) == 0
    for ours, theirs in zip(rows(tmp_path / "run"), rows(at_once), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_a_stop_comes_a_step_later_and_loses_nothing(at_once: Path, tmp_path: Path) -> None:
    options = ("train.eval_every=5", "save.every=4")
    done = run(tmp_path / "run", *options, behind=1, killed_in=6)
    assert done.returncode == 75, done.stderr
    assert "after step 7" in done.stdout
    assert reads(run(tmp_path / "run", *options, "--resume", behind=1)) > 0
    kept = [row for row in numbers(tmp_path / "run") if row["kind"] != "save"]
    assert kept == [row for row in numbers(at_once) if row["kind"] != "save"]


@pytest.mark.parametrize("fused", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_bad_step_is_left_out_and_named_when_read_late(
    fused: bool,
    material: tuple[str, str],  # noqa: F811
    tmp_path: Path,
) -> None:
    for name, how in (("at_once", {"behind": 0}), ("late", {"behind": 1, "fused": fused})):
        done = run(tmp_path / name, *material, *OPTIONS, **how)  # type: ignore[arg-type]
        assert done.returncode == 0, done.stderr
    ours, theirs = numbers(tmp_path / "late"), numbers(tmp_path / "at_once")
    assert [row["kind"] for row in ours].count("skipped") == 1
    for our, their in zip(ours, theirs, strict=True):
        assert (our["kind"], our["step"], our.get("rows")) == (their["kind"], their["step"], their.get("rows"))
        if our["kind"] == "train":
            assert our["loss"] == pytest.approx(their["loss"], rel=1e-5)
    done = run(tmp_path / "ended", *material, *OPTIONS, "train.max_bad_steps=1", behind=1, fused=fused)
    assert done.returncode == 9
    assert "rows.jsonl:13" in done.stderr


@pytest.mark.parametrize("fused", [False, True])
def test_no_update_without_a_finite_norm(fused: bool) -> None:
    """Weights, moments and Adam's count of steps stay, so that the next update is that of a run without this step."""

    def train(bad: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        engine = TorchEngine(model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused), 1, 1.0)
        x = torch.arange(8.0).reshape(2, 4)
        for scale in [1.0, 2.0, *([math.inf] if bad else []), 3.0]:
            engine.backward(model(x).square().sum() * scale)
            assert math.isfinite(float(engine.update(0.1))) == math.isfinite(scale)
        state = [engine.optimizer.state[p] for p in model.parameters()]
        return [*(p.detach() for p in model.parameters()), *(t for s in state for t in s.values())]

    for ours, theirs in zip(train(bad=True), train(bad=False), strict=True):
        assert torch.equal(ours, theirs)
