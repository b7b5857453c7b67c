"""The demo as a newcomer runs it: its own exit code says whether the LoRA learned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks.launcher import REPO
from tests.ranks.test_strategies import clean_environment

pytestmark = [pytest.mark.ranks, pytest.mark.full, pytest.mark.timeout(900)]


def test_the_demo_learns_the_tickets(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "phi3_dist.demo", "--folder", str(tmp_path / "demo")]
    done = subprocess.run(
        command, cwd=REPO, env=clean_environment(), text=True, capture_output=True, timeout=880, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "exact match" in done.stdout
    assert (tmp_path / "demo" / "run" / "curves.png").is_file()
    page = (tmp_path / "demo" / "run" / "report.html").read_text(encoding="utf-8")
    assert "✓ right" in page
    assert str(tmp_path / "demo" / "run" / "report.html") in done.stdout.replace("\n", "")
    assert "Traceback" not in done.stderr
