"""What a run prints is kept in its folder: without escapes, without what was drawn over, with how it ended."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from phi3_dist.errors import MachineError, Problem
from phi3_dist.report import logs
from phi3_dist.report.logs import find_log, follow_log
from phi3_dist.training.monitor import transcript as module
from phi3_dist.training.monitor.transcript import Transcript


def kept(run: Path, rank: int = 0) -> list[str]:
    lines = "".join(follow_log(find_log(run, rank))).splitlines()
    return lines[1:] if rank == 0 else lines


def test_reader_and_writer_agree_on_the_place() -> None:
    assert module.TRANSCRIPTS == logs.TRANSCRIPTS


def test_both_streams_are_kept_from_the_first_word_on_and_shown_as_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Transcript() as transcript:
        print("before there is a folder")
        handler = logging.StreamHandler()
        transcript.into(tmp_path, 0)
        sys.stderr.write("a warn")
        sys.stderr.write("ing\nand the end")
    print("not of the run")
    handler.stream.write("nor this\n")  # a library that holds the stream
    assert kept(tmp_path) == ["before there is a folder", "a warning", "and the end"]
    shown = capsys.readouterr()
    assert shown.out == "before there is a folder\nnot of the run\n"
    assert shown.err == "a warning\nand the endnor this\n"


def test_a_second_start_adds_to_it_under_its_own_head(tmp_path: Path) -> None:
    for word in ("first", "second"):
        with Transcript() as transcript:
            transcript.into(tmp_path, 0)
            print(word)
    lines = find_log(tmp_path).read_text().splitlines()
    assert lines[1::2] == ["first", "second"]
    assert all(line.startswith("--- 2") for line in lines[::2])


def test_colours_titles_and_bars_leave_only_their_text(tmp_path: Path) -> None:
    with Transcript() as transcript:
        transcript.into(tmp_path, 0)
        print("\x1b[31mred\x1b[0m \x1b]0;title\x07text\x00\x9b")
        sys.stderr.write("10 %\r50 %\r100 %\n")
        with Progress(console=Console(file=sys.stdout, force_terminal=True, width=60), auto_refresh=False) as bar:
            task = bar.add_task("steps", total=3)
            for step in range(3):
                bar.console.print(f"said in step {step}")
                bar.update(task, advance=1, refresh=True)
    lines = kept(tmp_path)
    assert lines[:2] == ["red text\x9b", "100 %"]
    assert [line for line in lines if "said" in line] == [f"said in step {step}" for step in range(3)]
    assert not any(c in "".join(lines) for c in "\x1b\r\x07\x00")
    assert len(lines) <= 7


def test_how_it_ended_is_kept(tmp_path: Path) -> None:
    for error in (MachineError(Problem("here", "is wrong", "mend it")), ValueError("a bug"), KeyboardInterrupt()):
        transcript = Transcript()
        transcript.into(tmp_path, 0)
        with pytest.raises(type(error)), transcript:
            raise error
    text = find_log(tmp_path).read_text()
    assert "MachineError:\n  here: is wrong\n    fix: mend it\n" in text
    assert "Traceback" in text
    assert text.endswith("ValueError: a bug\n" + text[text.rindex("--- 2") :])
    assert text.endswith("ended by KeyboardInterrupt\n")


def test_other_ranks_have_files_of_their_own_where_they_said_something(tmp_path: Path) -> None:
    for rank in (1, 2):
        with Transcript() as transcript:
            transcript.into(tmp_path, rank)
            if rank == 2:
                print("rank 2 here")
    assert kept(tmp_path, 2) == ["rank 2 here"]
    assert [p.name for p in (tmp_path / logs.TRANSCRIPTS).iterdir()] == ["rank_002.log"]


def test_without_a_run_folder_nothing_is_made(tmp_path: Path) -> None:
    with Transcript() as transcript:
        transcript.into(tmp_path / "of another node", 1)
        print("a word")
    assert list(tmp_path.iterdir()) == []


def test_a_stream_that_fails_fails_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    with Transcript() as transcript:
        transcript.into(tmp_path, 0)
        with pytest.raises(OSError, match="No space"):
            print("a word")
    assert kept(tmp_path) == ["a word"]
