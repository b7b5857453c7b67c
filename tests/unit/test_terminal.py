"""A single run on a real terminal: `breakpoint()` has it to itself, the progress line fits 80 columns."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time
from pathlib import Path

from tests import warm
from tests.ranks.test_strategies import REPO, clean_environment

STOPPED_AT_STEP_3 = """
import phi3_dist.training.step_loop as step_loop
original = step_loop.train_step
def train_step(engine, runtime, packs, order, step, **rest):
    if step == 2:
        breakpoint()
    return original(engine, runtime, packs, order, step, **rest)
step_loop.train_step = train_step
from phi3_dist.cli import main
main()
"""


def test_breakpoint_works_and_the_progress_line_fits(tmp_path: Path) -> None:
    arguments = ["-c", STOPPED_AT_STEP_3, "train", "configs/run/debug.yaml", f"save.folder={tmp_path / 'run'}"]
    arguments += ["model.precision=fp32", "train.max_steps=5", "log.trackers=[]"]
    python = warm.python()
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(REPO)
        os.execve(python, [python, *arguments], {**clean_environment(), "TERM": "xterm"})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    seen, answered, deadline = b"", False, time.monotonic() + 90
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 1)[0]:
            try:
                seen += os.read(terminal, 4096)
            except OSError:  # the other end has closed
                break
        if b"(Pdb)" in seen and not answered:
            answered = True
            os.write(terminal, b"p step * 21\nc\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, seen.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    after = text.split("(Pdb)", 1)[1]
    assert "42" in after
    assert re.search(r"step +5/5 +loss [\d.]+ +lr [\d.e+-]+ +[\d,]+ supervised tok/s +left", text)
    assert "adapter:" in after
