"""What a test costs: its own CPU time, its children's, and that of processes which the warm server forked for it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests import cpu_seconds, warm

TEST = "tests/unit/test_cpu_seconds.py::test_x[two words]"


def test_a_tests_seconds_hold_its_own_and_those_of_forked_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = f"imports\n  1.50 s of CPU time\t{TEST}\t-m phi3_dist train\n  9.00 s of CPU time\t-\t-c pass\n"
    monkeypatch.setattr(warm, "log", lambda: log)
    monkeypatch.setattr(cpu_seconds, "NOTED", tmp_path / "noted.json")
    (tmp_path / "noted.json").write_text(json.dumps({TEST: 99.0, "tests/unit/test_gone.py::test_y": 5.0}))
    costs = cpu_seconds.Costs()
    with costs.of(TEST):
        until_s = time.process_time() + 0.1
        while time.process_time() < until_s:
            pass
    costs.note()
    noted = json.loads((tmp_path / "noted.json").read_text())
    assert 1.6 <= noted[TEST] < 2.5
    assert list(cpu_seconds.of_files(noted)) == ["tests/unit/test_cpu_seconds.py"], "a file that is gone has no place"


def test_the_server_says_for_which_test_it_forked() -> None:
    running = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
    subprocess.run([warm.python(), "-c", "pass"], env=warm.environment(), check=True)
    found = [cpu_seconds.SERVERS_LINE.match(line) for line in warm.log().splitlines()]
    assert running in {one[2] for one in found if one}
