"""The profile of a few steps, and the line that says where the start's time went."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from phi3_dist.training.monitor.profiling import StepProfile
from phi3_dist.training.monitor.start_clock import StartClock


def _step(number: int) -> None:
    with torch.profiler.record_function(f"number_{number}"):
        torch.randn(8, 8) @ torch.randn(8, 8)


def test_a_profile_records_as_many_steps_as_asked_from_the_second_on(tmp_path: Path) -> None:
    said = []
    with StepProfile(2, tmp_path / "profile", active=True) as profile:
        for number in range(5):
            _step(number)
            said.append(profile.step())
    assert said == [False, False, True, False, False]
    events = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"number_1", "number_2"} <= names
    assert not {"number_0", "number_3", "number_4"} & names
    table = (tmp_path / "profile" / "table.txt").read_text()
    assert "aten::mm" in table
    assert "number_1" in table


def test_a_run_that_ends_while_it_records_writes_what_it_has(tmp_path: Path) -> None:
    with StepProfile(9, tmp_path, active=True) as profile:
        for number in range(3):
            _step(number)
            assert not profile.step()
    assert "number_2" in (tmp_path / "table.txt").read_text()


@pytest.mark.parametrize(("steps", "active"), [(0, True), (2, False)])
def test_without_steps_or_on_another_rank_nothing_is_written(steps: int, active: bool, tmp_path: Path) -> None:
    with StepProfile(steps, tmp_path, active=active) as profile:
        for number in range(4):
            _step(number)
            assert not profile.step()
    assert list(tmp_path.iterdir()) == []


def test_the_spans_of_the_start_add_up_to_the_time_since_the_process_began() -> None:
    clock = StartClock()
    clock.mark("imports")
    time.sleep(0.06)
    clock.mark("data")
    clock.mark("data")
    assert list(clock.spans_s) == ["imports", "data"]
    assert 0.05 < clock.spans_s["data"] < 5
    assert clock.line().startswith(f"start: first step done {clock.total_s:.1f} s after the command began (imports ")


def test_the_time_of_the_launcher_counts_and_a_restart_s_does_not(tmp_path: Path) -> None:
    """A stand-in for the launcher, told by its name: it does nothing for a second and then starts the rank."""
    clock = (
        "from phi3_dist.training.monitor.start_clock import StartClock; print(StartClock().spans_s.get('launcher', 0))"
    )
    launcher = tmp_path / "launch"
    launcher.write_text("import subprocess, sys, time; time.sleep(1); subprocess.run(sys.argv[1:], check=True)")
    for restarts, (low, high) in (("0", (1.0, 30.0)), ("1", (0.0, 0.0))):
        command = [sys.executable, str(launcher), sys.executable, "-c", clock]
        env = {**os.environ, "TORCHELASTIC_RESTART_COUNT": restarts}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert low <= float(done.stdout) <= high
