"""A signal in every phase of a run, a terminal that goes, and a folder that is moved: nothing is lost or mixed.

A run ends with 75 (130 after Ctrl-C) and without a traceback; with a checkpoint where it had trained, and as if nothing
had come where it was done. What goes on from there has the bits of the undisturbed run.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from phi3_dist.training.signals import state_of_stop
from tests import warm
from tests.ranks.launcher import REPO
from tests.ranks.processes import descendants, lives
from tests.ranks.test_resume import same_bits
from tests.ranks.test_strategies import ENDLESS, RUN, SAME, clean_environment
from tests.torture.group import Group, nursery

pytestmark = pytest.mark.ranks

SMALL = (
    "train", str(REPO / RUN), "model.precision=fp32", f"data.train={REPO / 'configs/run/debug_chats.jsonl'}",
    "lora.dropout=0.1", "train.max_steps=6", "save.every=2", "log.trackers=[]",
)  # fmt: skip
BEFORE = {
    "the base": "inputs.find_base",
    "the data": "inputs.prepare",
    "the processes": "whole_run.start_runtime",
    "the agreement": "whole_run.check_same_on_all_ranks",
    "the model": "whole_run.build_model",
    "the optimizer": "whole_run.make_engine",
}
STEPS = "step_loop"
DURING = {
    "a step": f"{STEPS}.train_step",
    "an evaluation": f"{STEPS}.held_out_loss",
    "a checkpoint": "checkpoints.saver.write_checkpoint",
}
AFTER = {"the adapter": "final_adapter.save_adapter", "the end": "run_folder.RunFolder.record_exit"}
NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    return nursery()


@pytest.fixture(scope="module")
def undisturbed(context: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    group = Group(context, (*SMALL, f"save.folder={folder / 'run'}"), 1, folder / "log")
    group.wait(120)
    assert group.exit_codes == [0], group.output()
    return folder / "run"


def signal_in(place: str, number: int, call: int) -> None:
    """From the given call on, this process gets the signal just as the function at `place` begins."""
    module, *names, last = place.split(".")
    owner: Any = importlib.import_module(f"phi3_dist.training.{module}")
    for name in names:
        owner = getattr(owner, name)
    original, calls = getattr(owner, last), []

    def signalled(*args: Any, **options: Any) -> Any:
        calls.append(place)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **options)

    setattr(owner, last, signalled)


def cells(places: dict[str, str]) -> list[Any]:
    """Each place with one signal, in turns; with all of them in `make torture` and `make test-full`."""
    return [
        pytest.param(place, number, marks=() if at % len(NUMBERS) == which else pytest.mark.full, id=f"{name}-{sent}")
        for at, (name, place) in enumerate(places.items())
        for which, (number, sent) in enumerate((number, number.name) for number in NUMBERS)
    ]


def signalled(
    context: ForkServerContext, folder: Path, place: str, number: int, call: int = 1, *more: str, world: int = 1
) -> Group:
    before = functools.partial(signal_in, place, int(number), call)
    group = Group(context, (*SMALL, f"save.folder={folder / 'run'}", *more), world, folder / "log", before=before)
    group.wait(90)
    group.kill()
    assert "Traceback" not in group.output(), group.output()
    return group


def finished(context: ForkServerContext, folder: Path, undisturbed: Path) -> str:
    group = Group(context, (*SMALL, f"save.folder={folder / 'run'}", "--resume"), 1, folder / "log_2")
    group.wait(90)
    assert group.exit_codes == [0], group.output()
    same_bits(folder / "run", undisturbed)
    return group.output()


def code_of(number: signal.Signals) -> int:
    return 130 if number == signal.SIGINT else 75


@pytest.mark.parametrize(("place", "number"), cells(BEFORE))
def test_before_the_first_step(
    place: str, number: signal.Signals, context: ForkServerContext, undisturbed: Path, tmp_path: Path
) -> None:
    group = signalled(context, tmp_path, place, number)
    assert group.exit_codes == [code_of(number)]
    assert f"stopped by {number.name} before its first step" in group.output()
    if (tmp_path / "run" / "config.yaml").exists():
        assert json.loads((tmp_path / "run" / "exit.json").read_text())["state"] == state_of_stop(number)
    finished(context, tmp_path, undisturbed)


@pytest.mark.parametrize(("place", "number"), cells(DURING))
def test_while_it_trains(
    place: str, number: signal.Signals, context: ForkServerContext, undisturbed: Path, tmp_path: Path
) -> None:
    more = ("train.eval_every=3",) if "held_out" in place else ()
    group = signalled(context, tmp_path, place, number, 1, *more)
    assert group.exit_codes == [code_of(number)], group.output()
    assert f"stopped by {number.name} after step" in group.output()
    if not more:
        assert "resumed after step" in finished(context, tmp_path, undisturbed)


@pytest.mark.parametrize(("place", "number"), cells(AFTER))
def test_once_the_last_step_is_made(
    place: str, number: signal.Signals, context: ForkServerContext, undisturbed: Path, tmp_path: Path
) -> None:
    group = signalled(context, tmp_path, place, number)
    assert group.exit_codes == [0], group.output()
    assert (tmp_path / "run" / "curves.png").is_file()
    same_bits(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("place", ["whole_run.start_runtime", "whole_run.build_model", f"{STEPS}.train_step"])
def test_a_run_that_was_to_be_replaced_is_there_until_the_new_one_has_made_a_step(
    place: str, context: ForkServerContext, undisturbed: Path, tmp_path: Path
) -> None:
    group = Group(context, (*SMALL, f"save.folder={tmp_path / 'run'}"), 1, tmp_path / "log_0")
    group.wait(90)
    signalled(context, tmp_path, place, signal.SIGTERM, 1, "--overwrite", "train.seed=5")
    begun = place.endswith("train_step")
    assert (tmp_path / "run" / "adapter").is_dir() is not begun
    if not begun:
        same_bits(tmp_path / "run", undisturbed)


# --- the launchers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "number"),
    [
        (("launch/local.sh", "--processes", "2", "--restarts", "1"), signal.SIGTERM),
        pytest.param(("launch/local.sh", "--processes", "2"), signal.SIGUSR1, marks=pytest.mark.full),
        pytest.param(("launch/local.sh", "--processes", "1"), signal.SIGHUP, marks=pytest.mark.full),
        pytest.param(("launch/local.sh", "--processes", "2", "--restarts", "1"), signal.SIGINT, marks=pytest.mark.full),
    ],
)
def test_a_signal_to_a_launcher_is_one_to_its_ranks(
    command: tuple[str, ...], number: signal.Signals, tmp_path: Path
) -> None:
    words = ("bash", *command, RUN, *SAME, *ENDLESS, "save.every=0", f"save.folder={tmp_path / 'run'}")
    env = clean_environment() | {"VIRTUAL_ENV": "active"}  # the script takes the Python that it finds
    env["PATH"] = f"{Path(warm.python()).parent}{os.pathsep}{env['PATH']}"
    with (tmp_path / "log").open("wb") as out:
        process = subprocess.Popen(words, cwd=REPO, env=env, stdout=out, stderr=out)
    left: list[int] = []
    try:
        await_line(tmp_path / "log", "step 3/", process)
        left = descendants(process.pid)
        process.send_signal(number)
        code = process.wait(timeout=60)
        text = (tmp_path / "log").read_text()
        assert code == code_of(number), text
        assert "Traceback" not in text
        assert any((tmp_path / "run" / "checkpoints").glob("step_*/manifest.json"))
        state = "interrupted" if number == signal.SIGINT else "preempted"
        assert json.loads((tmp_path / "run" / "exit.json").read_text())["state"] == state
    finally:
        left += descendants(process.pid)
        process.kill()
        process.wait()
        for pid in left:
            if lives(pid):
                os.kill(pid, signal.SIGKILL)


def await_line(log: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 200
    while text not in log.read_text(errors="replace"):
        assert process.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < until, log.read_text(errors="replace")
        time.sleep(0.1)


# --- terminals ------------------------------------------------------------------------------------------------------


def test_a_full_log_loses_lines_and_no_run(context: ForkServerContext, undisturbed: Path, tmp_path: Path) -> None:
    group = Group(context, (*SMALL, f"save.folder={tmp_path / 'run'}"), 1, Path("/dev/full"))
    group.wait(90)
    assert group.exit_codes == [0]
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["unsaid_lines"] > 10
    same_bits(tmp_path / "run", undisturbed)


def test_a_reader_that_goes_loses_lines_and_no_run(
    context: ForkServerContext, undisturbed: Path, tmp_path: Path
) -> None:
    """`phi3-dist train … | head`."""
    read, write = os.pipe()
    group = Group(context, (*SMALL, f"save.folder={tmp_path / 'run'}"), 1, Path(f"/proc/{os.getpid()}/fd/{write}"))
    seen = b""
    while b"step 1/" not in seen:
        seen += os.read(read, 4096)
    os.close(read)
    os.close(write)
    group.wait(90)
    assert group.exit_codes == [0]
    same_bits(tmp_path / "run", undisturbed)


# --- moved folders --------------------------------------------------------------------------------------------------


def move(folder: str, call: int) -> None:
    """Before the given step the run folder gets another name."""
    module: Any = importlib.import_module(f"phi3_dist.training.{STEPS}")
    original: Callable[..., Any] = module.train_step
    calls: list[int] = []

    def train_step(*args: Any, **options: Any) -> Any:
        calls.append(call)
        if len(calls) == call and os.environ["RANK"] == "0":
            Path(folder).rename(f"{folder}_moved")
            while not Path(folder, "config.yaml").exists():  # another run has begun under the name
                time.sleep(0.01)
        return original(*args, **options)

    module.train_step = train_step


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.full)])
def test_two_runs_one_name(world: int, context: ForkServerContext, undisturbed: Path, tmp_path: Path) -> None:
    """A folder is moved away under its run and another run takes the name: each ends in its own folder, whole."""
    arguments = (*SMALL, f"save.folder={tmp_path / 'run'}")
    before = functools.partial(move, str(tmp_path / "run"), 4)
    first = Group(context, arguments, world, tmp_path / "log_1", before=before)
    while first.alive() and not (tmp_path / "run_moved").exists():
        time.sleep(0.01)
    second = Group(context, (*arguments, "train.seed=0"), 1, tmp_path / "log_2")
    first.wait(90)
    second.wait(90)
    assert (first.exit_codes, second.exit_codes) == ([0] * world, [0]), first.output() + second.output()
    assert f"was moved to {tmp_path / 'run_moved'}" in first.output()
    same_bits(tmp_path / "run", undisturbed)
    if world == 1:
        same_bits(tmp_path / "run_moved", undisturbed)
    assert (tmp_path / "run_moved" / "report.html").is_file()
