"""What is said never stops what is done: full, closed and gone logs; characters that an encoding lacks."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_dist.errors import Problem, plain, redacted
from phi3_dist.machine.terminal import Unfailing, lost_lines, unfailing, unfailing_streams
from phi3_dist.training.monitor.metrics import Metrics
from phi3_dist.training.run_folder import RunFolder
from tests.ranks.launcher import REPO


@pytest.mark.parametrize("words", [["config", "schema"], ["lint", "recipe.yml"]])
def test_a_full_disk_behind_the_answer_of_a_verb_is_one_message(words: list[str], tmp_path: Path) -> None:
    """More text than a buffer holds, and less: as long as it is not written, it is not a success either."""
    (tmp_path / "recipe.yml").write_text("base_model: microsoft/Phi-3-mini-4k-instruct\nadapter: lora\n")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "phi3_dist", *words],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPO)},
        )  # fmt: skip
    said = "MachineError:\n  standard output: cannot be written: No space left on device\n    fix: make room"
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 3
    assert done.returncode == 8


class Tracker:
    def log(self, values: dict[str, object], step: int | None = None) -> None:
        del values, step


class Full(io.StringIO):
    """Fails so many writes, as a disk does until somebody makes room."""

    def __init__(self, fails: int, error: OSError | ValueError) -> None:
        super().__init__()
        self.fails, self.error = fails, error

    def write(self, text: str) -> int:
        self.fails -= 1
        if self.fails >= 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), BrokenPipeError(), ValueError("I/O operation on closed file")]
)
def test_lines_that_are_lost_are_counted_and_told_once_there_is_room(error: OSError | ValueError) -> None:
    stream = Full(2, error)
    out = Unfailing(stream)
    print("one", file=out)
    print("two\nthree", file=out)
    print("four", file=out)
    print("five", file=out)
    assert stream.getvalue() == "\n[2 lines could not be written here]\nthree\nfour\nfive\n"
    assert out.lost == 2
    assert unfailing(out) is out


def test_a_full_device_leaves_nothing_to_fail_at(tmp_path: Path) -> None:
    """Text left in Python's buffers would turn the exit code into 120."""
    script = """
import sys
from phi3_dist.machine.terminal import lost_lines, open_standard_streams, unfailing_streams
open_standard_streams()
with unfailing_streams():
    for _ in range(3000):
        print("a line")
    print("to the other", file=sys.stderr)
    lost = lost_lines()
open(sys.argv[1], "w").write(str(lost))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "lost")]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=REPO, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "to the other\n")
    assert (tmp_path / "lost").read_text() == "3000"
    done = subprocess.run([*command[:3], f"{command[3]}_2"], cwd=REPO, text=True, check=False, preexec_fn=_close_both)
    assert done.returncode == 0
    assert (tmp_path / "lost_2").read_text() == "0"


def _close_both() -> None:
    os.close(1)
    os.close(2)


def test_a_reader_that_goes_stops_nothing() -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        out = Unfailing(stream)
        print("heard", file=out)
        os.close(read)
        print("not heard", file=out)
    assert out.lost == 1


def test_an_encoding_without_the_character_shows_its_number(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w", encoding="ascii") as file:
        print("2 × 8", file=Unfailing(file))
    assert (tmp_path / "log").read_text() == "2 x 8\n"


def test_a_run_speaks_into_a_closed_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rich would end the process at a broken pipe. What was lost stands in exit.json."""
    folder = RunFolder(tmp_path / "run")
    folder.claim(overwrite=False)
    monkeypatch.setattr(sys, "stdout", Full(2, BrokenPipeError()))
    with unfailing_streams(), Metrics(folder.metrics, 2, Tracker(), active=True) as metrics:
        metrics.say("lost")
        metrics.say("lost, too")
        metrics.say("\x1b[31mheard")
        assert lost_lines() == 2
        folder.record_exit(0, "finished")
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["unsaid_lines"] == 2
    assert sys.stdout.getvalue().endswith("\\x1b[31mheard\n")  # type: ignore[attr-defined]


def test_what_a_row_holds_reaches_no_terminal() -> None:
    problem = Problem("rows.jsonl:3\x1b]0;title\x07", "holds 'a\x9b31mb\u202ec\r\x08'", "line\n    two")
    assert str(problem) == (
        "rows.jsonl:3\\x1b]0;title\\x07: holds 'a\\x9b31mb\\u202ec\\r\\x08'\n    fix: line\n    two"
    )
    assert plain("tab\tand\nnewline × ü 你") == "tab\tand\nnewline × ü 你"


def test_what_a_library_logs_of_an_address_is_told_without_its_password() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(Unfailing(stream))  # type: ignore[type-var]
    handler.emit(logging.makeLogRecord({"msg": "Retrying https://me:secret@mirror.example/api/models/x"}))
    assert stream.getvalue() == "Retrying https://***@mirror.example/api/models/x\n"


def test_what_was_trusted_is_told_to_nobody() -> None:
    text = "https://me:pass@word@host.example/a?b=c, hf_abcdefghijKLMNOP1234, ghp_0123456789abcdefghij"
    assert redacted(text) == "https://***@host.example/a?b=c, hf_***, ghp_***"
    assert "pass" not in str(Problem("hub", text))
    harmless = (
        "runs/hf_datasets, git@host:x, http://host:8080/a@b, my_hf_abcdefghijKLMNOP1234, sk-learn-2024-experiments"
    )
    assert redacted(harmless) == harmless
