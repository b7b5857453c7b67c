"""A run that was interrupted and resumed equals one that was not: to the bit, or to 1e-4 on another topology."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import warm
from tests.ranks.processes import ranks_below
from tests.ranks.test_strategies import ENDLESS, RUN, SAME, clean_environment, compare, launch, rows

pytestmark = pytest.mark.ranks

SAVES = ("save.every=7", "save.keep=9")
STRATEGIES = (None, "cpu_2", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp2")
TWO = ("--num_processes", "2")


def interrupted(finished: Path, copy: Path, step: int = 14) -> Path:
    """The run folder as a kill after `step`'s checkpoint would have left it, some steps later and amid a save."""
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "adapter")
    (copy / "exit.json").unlink()
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    (copy / "checkpoints" / "step_000021.tmp").mkdir()
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 2')
    return copy


def same_bits(ours: Path, theirs: Path) -> None:
    for our, their in zip(rows(ours), rows(theirs), strict=True):
        for key in ("step", "loss", "grad_norm", "lr"):
            assert our[key] == their[key], (our["step"], key)
    saved, expected = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (ours, theirs))
    assert set(saved) == set(expected)
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


def options_of(strategy: str | None) -> tuple[str, ...]:
    return () if strategy is None else TWO


def matrix(*in_make_test: str | None) -> list[object]:
    return [pytest.param(s, marks=() if s in in_make_test else pytest.mark.full, id=str(s)) for s in STRATEGIES]


DROPOUT = (*SAVES, "lora.dropout=0.1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Path]:
    """The run of a strategy that nothing interrupts, made once. Tests copy its folder."""

    @functools.cache
    def made(strategy: str | None) -> Path:
        folder = tmp_path_factory.mktemp(str(strategy)) / "whole"
        done = launch(strategy, folder, *DROPOUT, options=options_of(strategy))
        assert done.returncode == 0, done.stderr
        return folder

    return made


@pytest.mark.parametrize("strategy", matrix("zero3", "fsdp2"))
def test_resume_on_the_same_topology_is_bit_for_bit(
    strategy: str | None, whole: Callable[[str | None], Path], tmp_path: Path, deepspeed_ops: Path
) -> None:
    """With dropout, accumulation, and an interruption between two checkpoints."""
    again = interrupted(whole(strategy), tmp_path / "again")
    done = launch(strategy, again, *DROPOUT, "--resume", options=options_of(strategy))
    assert done.returncode == 0, done.stderr
    assert "resumed after step 14 of 20" in done.stdout
    same_bits(again, whole(strategy))


@pytest.mark.full
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resume_in_bf16_is_bit_for_bit_too(strategy: str | None, tmp_path: Path, deepspeed_ops: Path) -> None:
    """Where the weights that train are rounded copies of float32 masters."""
    overrides = (*SAVES, "lora.dropout=0.1", "model.precision=bf16")
    done = launch(strategy, tmp_path / "whole", *overrides, options=options_of(strategy))
    assert done.returncode == 0, done.stderr
    again = interrupted(tmp_path / "whole", tmp_path / "again")
    done = launch(strategy, again, *overrides, "--resume", options=options_of(strategy))
    assert done.returncode == 0, done.stderr
    same_bits(again, tmp_path / "whole")


CHAINS = (("zero3", "cpu_2"), ("fsdp2", "zero2"), ("cpu_2", "fsdp2"), ("zero2", None), (None, "zero3"))


@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param(b, a, marks=() if i < 2 else pytest.mark.full, id=f"{b}-{a}") for i, (b, a) in enumerate(CHAINS)],
)
def test_resume_on_another_topology_sees_the_same_samples(
    before: str | None, after: str | None, whole: Callable[[str | None], Path], tmp_path: Path, deepspeed_ops: Path
) -> None:
    again = interrupted(whole(before), tmp_path / "again", step=7)
    done = launch(after, again, *DROPOUT, "--resume", options=options_of(after))
    assert done.returncode == 0, done.stderr
    compare(again, whole(before))


@pytest.mark.full
def test_four_two_one_four_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    done = launch(None, tmp_path / "one", *SAVES)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "one"
    for number, world in enumerate(("4", "2", "1", "4")):
        again = interrupted(folder, tmp_path / f"{number}", step=7 * (number % 2 + 1))
        done = launch("ddp", again, *SAVES, "--resume", options=("--num_processes", world))
        assert done.returncode == 0, done.stderr
        compare(again, tmp_path / "one")
        folder = again


def damage(checkpoint: Path) -> None:
    state = checkpoint / "state.safetensors"
    raw = bytearray(state.read_bytes())
    raw[-100] ^= 1
    state.write_bytes(raw)


def test_a_damaged_checkpoint_is_passed_over_by_name_and_a_changed_run_is_refused(tmp_path: Path) -> None:
    done = launch(None, tmp_path / "whole", *SAVES)
    assert done.returncode == 0, done.stderr
    again = interrupted(tmp_path / "whole", tmp_path / "again")
    damage(again / "checkpoints" / "step_000014")
    refused = launch(None, again, *SAVES, "--resume", "train.seed=5", "lora.r=4")
    assert refused.returncode == 9
    assert "train.seed: was 0" in refused.stderr
    assert "lora.r: was 8" in refused.stderr
    assert "--allow-changed" in refused.stderr
    done = launch(None, again, *SAVES, "--resume")
    assert done.returncode == 0, done.stderr
    assert "passed over step_000014: state.safetensors has changed" in done.stdout
    assert "resumed after step 7" in done.stdout
    same_bits(again, tmp_path / "whole")
    newest = sorted((again / "checkpoints").glob("step_*"))[-1]
    damage(newest)
    said = launch(None, again, *SAVES, "--resume").stdout
    assert "has finished already" in said
    assert f"passed over {newest.name}: state.safetensors has changed" in said


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.full) for n in (signal.SIGUSR1, signal.SIGTERM))]
)
def test_a_signal_leads_to_a_checkpoint_and_its_exit_code(number: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = [*SAME, *ENDLESS, f"save.folder={folder}", "save.every=0"]
    process = subprocess.Popen(
        [warm.python(), "-m", "phi3_dist", "train", RUN, *overrides],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == (130 if number == signal.SIGINT else 75), output
    assert f"stopped by {number.name} after step" in output
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step_")) == rows(folder)[-1]["step"]
    state = "interrupted" if number == signal.SIGINT else "preempted"
    assert json.loads((folder / "exit.json").read_text())["state"] == state


def test_one_rank_that_gets_the_signal_stops_both_at_the_same_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launcher = [warm.python(), "-m", "accelerate.commands.accelerate_cli", "launch"]
    launcher += ["--config_file", "configs/accelerate/cpu_2.yaml", "-m", "phi3_dist", "train", RUN]
    process = subprocess.Popen(
        [*launcher, *SAME, *ENDLESS, f"save.folder={folder}"],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    os.kill(ranks_below(process.pid)[1], signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    assert "stopped by SIGUSR1 after step" in output
    assert any((folder / "checkpoints").glob("step_*/manifest.json"))
    assert process.returncode != 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_is_told_and_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "none", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("this kernel lets no tmpfs be mounted")
    try:
        done = launch(None, small / "run", "save.every=2", "save.keep=100", "log.trackers=[]")
        assert done.returncode != 0
        assert "checkpoint of step" in done.stdout + done.stderr
        assert "No space left" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        whole = sorted((small / "run" / "checkpoints").iterdir())
        assert whole
        assert all((path / "manifest.json").is_file() for path in whole)
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.full
def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    """SIGKILL at a few moments of a run that saves at every step; `make torture` does it a hundred times."""
    reference = tmp_path / "reference"
    assert launch(None, reference, "save.every=1").returncode == 0
    folder = tmp_path / "killed"
    command = [warm.python(), "-m", "phi3_dist", "train", RUN, *SAME, f"save.folder={folder}", "save.every=1"]
    for wait_s in (0.0, 0.05, 0.11):
        process = subprocess.Popen(
            [*command, "--resume"], env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        steps = 0
        for line in process.stdout:
            steps += line.startswith("step ")
            if steps == 3:
                break
        time.sleep(wait_s)
        process.kill()
        process.communicate()
    done = launch(None, folder, "save.every=1", "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed after step" in done.stdout
    same_bits(folder, reference)
