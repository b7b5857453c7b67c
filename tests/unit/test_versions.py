"""`--version` for a bug report, and Tab in a real bash."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from phi3_dist import __version__
from phi3_dist.cli import app
from phi3_dist.machine.versions import torch_version, version_lines

CUDA = "__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
ROCM = "__version__ = '2.13.0+rocm7'\ncuda: Optional[str] = None\nhip: Optional[str] = '7.0.1'\n"


def test_the_versions_of_a_bug_report(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = (("NVIDIA H100 80GB HBM3", 79.6), ("NVIDIA H100 80GB HBM3", 79.6), ("NVIDIA L4", 22.5))
    monkeypatch.setattr("phi3_dist.machine.versions.own_cards", lambda: cards)
    lines = CliRunner().invoke(app, ["--version"]).output.splitlines()
    assert lines == version_lines()
    assert lines[0] == f"phi3-dist {__version__}"
    said = {name: value for name, _, value in (line.strip().partition(" ") for line in lines[1:])}
    assert list(said) == [
        "Python", "torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "flash-attn", "GPUs",
    ]  # fmt: skip
    assert said["peft"].strip() == metadata.version("peft")
    assert said["torch"].strip().startswith(metadata.version("torch").partition("+")[0])
    assert said["GPUs"].strip() == "2 x NVIDIA H100 80GB HBM3, 1 x NVIDIA L4"


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phi3_dist.machine.versions.own_cards", tuple)
    monkeypatch.setattr("phi3_dist.machine.versions._PACKAGES", ("no-such-distribution",))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [line.split(maxsplit=1)[1] for line in version_lines()[2:]] == [
        "not installed",
        "not installed",
        "none seen",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [(CUDA, "2.13.0+cu130 (CUDA 13.0)"), (ROCM, "2.13.0+rocm7 (ROCm 7.0.1)"), ("cuda = '13.0'", ""), ("", "")],
)
def test_torch_is_read_and_not_imported(text: str, says: str) -> None:
    assert torch_version(text) == says


# --- Tab ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shells_script_calls_this_program(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_PHI3_DIST_COMPLETE", f"source_{shell}")
    shown = CliRunner().invoke(app, [], prog_name="phi3-dist").output
    assert "_PHI3_DIST_COMPLETE=complete_" in shown
    assert "phi3-dist" in shown


class Bash:
    """An interactive bash on a terminal of its own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._terminal, ends = pty.openpty()
        self._process = subprocess.Popen(
            ["bash", "--norc", "--noprofile", "-i"], stdin=ends, stdout=ends, stderr=ends, cwd=folder, env=environment,
            start_new_session=True,
        )  # fmt: skip
        os.close(ends)

    def says(self, typed: str, wanted: str, patience_s: float = 60) -> str:
        """What it shows after `typed`, read until `wanted` is in it."""
        os.write(self._terminal, typed.encode())
        shown, end_s = "", time.monotonic() + patience_s
        while wanted not in shown and time.monotonic() < end_s:
            if select.select([self._terminal], [], [], 0.2)[0]:
                shown += os.read(self._terminal, 4096).decode(errors="replace")
        assert wanted in shown, shown
        return shown

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_verbs_and_run_files(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "phi3-dist"
    program.write_text(f'#!/bin/bash\nexec "{sys.executable}" -m phi3_dist "$@"\n')
    program.chmod(0o755)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "my_own.yaml").write_text("")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PROMPT_COMMAND", "INPUTRC", "_PHI3_DIST_COMPLETE")
    } | {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "PS1": "$ ", "TERM": "dumb", "INPUTRC": "/dev/null"}
    script = subprocess.run(
        [program], env={**environment, "_PHI3_DIST_COMPLETE": "source_bash"}, capture_output=True, text=True, check=True
    ).stdout
    (tmp_path / "completion.sh").write_text(script)
    bash = Bash(tmp_path, environment)
    try:
        bash.says(". ./completion.sh; echo rea''dy\n", "ready")
        bash.says("phi3-dist trai\t", "train ")
        bash.says("con\t", "configs/")  # a folder, without a space after it
        bash.says("my\t", "my_own.yaml ")
        bash.says("\x15phi3-dist config accelerate fsdp2_\t", "fsdp2_offload ")
    finally:
        bash.close()
