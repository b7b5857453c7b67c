from __future__ import annotations

import io
import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from phi3_dist.errors import RunFolderError
from phi3_dist.machine.processes import who
from phi3_dist.report.logs import find_log, follow_log
from phi3_dist.report.runs import STALE_S, list_runs, read_run, runs_table

NOW = 1_000_000.0
HERE = socket.gethostname()


def _run(folder: Path, *, heartbeat: dict[str, Any] | None = None, ended: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: x\n")
    (folder / "plan.json").write_text('{"steps": 20}')
    if heartbeat is not None:
        beat = {"pid": os.getpid(), "host": HERE, "time": NOW, "step": 0, "job_id": None, **heartbeat}
        (folder / "heartbeat.json").write_text(json.dumps(beat))
    if ended is not None:
        (folder / "exit.json").write_text(json.dumps(ended))
    return folder


@pytest.mark.parametrize(
    ("heartbeat", "ended", "state"),
    [
        (None, None, "starting"),
        ({}, None, "running"),
        ({"pid": 2**30}, None, "lost"),
        ({"host": "elsewhere", "time": NOW - 10}, None, "running"),
        ({"host": "elsewhere", "time": NOW - STALE_S - 1}, None, "lost"),
        ({}, {"code": 0, "state": "finished", "time": NOW + 1}, "finished"),
        ({}, {"code": 9, "state": "failed", "time": NOW + 1}, "failed"),
        ({}, {"code": 0, "state": "preempted", "time": NOW + 1}, "preempted"),
        ({}, {"code": 0, "state": "preempted", "time": NOW - 60}, "running"),  # resumed since
    ],
)
def test_state(tmp_path: Path, heartbeat: dict[str, Any] | None, ended: dict[str, Any] | None, state: str) -> None:
    assert read_run(_run(tmp_path / "a", heartbeat=heartbeat, ended=ended), now=NOW).state == state


def test_numbers_come_from_the_last_whole_training_row(tmp_path: Path) -> None:
    folder = _run(tmp_path / "a", heartbeat={"job_id": "12_3", "nodes": "node[1-2]", "step": 8})
    for name in ("step_000003", "step_000006", "step_000009.tmp"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 6, "loss": 2.0, "tokens_per_s": 10}\n'
        '{"kind": "train", "step": 7, "loss": 1.5, "tokens_per_s": 2000}\n'
        '{"kind": "eval", "step": 7, "heldout_loss": 9.0}\n'
        '{"kind": "train", "step": 8, "lo'
    )
    row = read_run(folder, now=NOW + 90)
    assert (row.step, row.steps, row.loss, row.tokens_per_s) == (7, 20, 1.5, 2000)
    assert (row.checkpoint, row.job_id, row.nodes, row.age_s) == ("step_000006", "12_3", "node[1-2]", 90)
    out = io.StringIO()
    Console(file=out, width=200).print(runs_table([row], base=tmp_path))
    assert out.getvalue().splitlines()[1].split() == (
        ["a", "running", "7/20", "1.5000", "2,000", "6", "12_3", "node[1-2]", "2", "min", "ago"]
    )


def test_list_finds_run_folders_only(tmp_path: Path) -> None:
    _run(tmp_path / "deep" / "b", heartbeat={})
    _run(tmp_path / "a", heartbeat={})
    _run(tmp_path / "a" / "inner")  # part of the run it lies in
    (tmp_path / "slurm").mkdir()
    assert sorted(row.folder.name for row in list_runs(tmp_path)) == ["a", "b"]
    with pytest.raises(RunFolderError, match="is not a folder"):
        list_runs(tmp_path / "nowhere")


def shown(folder: Path, width: int | None = None) -> list[str]:
    """The lines of the table, as a terminal of this width shows them."""
    out = io.StringIO()
    Console(file=out, width=width or 1000).print(runs_table(list_runs(folder), base=folder, width=width))
    return out.getvalue().splitlines()


def test_the_newest_sign_of_life_comes_first(tmp_path: Path) -> None:
    _run(tmp_path / "a", heartbeat={"time": NOW})
    _run(tmp_path / "b", heartbeat={"time": NOW + 50})
    _run(tmp_path / "c", heartbeat={"time": NOW - 50}, ended={"state": "failed", "time": NOW + 20})
    assert [row.folder.name for row in list_runs(tmp_path)] == ["b", "c", "a"]


def test_names_are_shown_as_they_are_and_move_no_cursor(tmp_path: Path) -> None:
    _run(tmp_path / "a[/]b", heartbeat={"host": "elsewhere", "nodes": "[red]node[1-2]"})
    _run(tmp_path / "e\x1b[2Jf", ended={"state": "\x1b]0;title\x07", "time": NOW})
    text = "\n".join(shown(tmp_path))
    assert "a[/]b" in text
    assert "[red]node[1-2]" in text
    assert r"e\x1b[2Jf" in text
    assert "\x1b" not in text
    assert "\x07" not in text


@pytest.mark.parametrize("name", ["heartbeat.json", "exit.json", "plan.json"])
@pytest.mark.parametrize("content", [b"", b'{"time": 1', b"[1]", b"[" * 100_000, b"\xff\xfe", b'"text"'])
def test_one_damaged_file_is_named_below_and_hides_no_run(tmp_path: Path, name: str, content: bytes) -> None:
    _run(tmp_path / "whole", heartbeat={})
    (_run(tmp_path / "torn", heartbeat={}) / name).write_bytes(content)
    lines = shown(tmp_path)
    assert any(line.startswith("whole") for line in lines)
    assert any(line.startswith("torn ") for line in lines)
    assert len(lines) == 4
    assert lines[-1].startswith(f"torn: {name} ")


@pytest.mark.parametrize("value", [None, "x", [], {}, True, -1, 10**400, float("nan"), float("inf")])
def test_numbers_that_are_none_are_left_out(tmp_path: Path, value: Any) -> None:
    row = {"kind": "train", "step": value, "loss": value, "tokens_per_s": value}
    folder = _run(tmp_path / "a", heartbeat={"time": value, "step": value}, ended={"state": value, "time": value})
    (folder / "metrics.jsonl").write_text(json.dumps(row))
    (folder / "plan.json").write_text(json.dumps({"steps": value}))
    (folder / "checkpoints").write_text("no folder")
    assert len(shown(tmp_path)) == 2
    assert len(shown(tmp_path, 80)) == 2


def test_a_number_given_to_another_process_is_not_the_run(tmp_path: Path) -> None:
    """The pid lives: it is this process's, which began at another tick than the one that wrote the heartbeat."""
    me = who()
    assert read_run(_run(tmp_path / "a", heartbeat=me), now=NOW).state == "running"
    other = {**me, "pid_began_at_tick": me["pid_began_at_tick"] - 1}
    assert read_run(_run(tmp_path / "b", heartbeat=other), now=NOW).state == "lost"
    elsewhere = {**me, "pid_counts_in": "another boot"}
    assert read_run(_run(tmp_path / "c", heartbeat=elsewhere), now=NOW + 10).state == "running"
    assert read_run(_run(tmp_path / "d", heartbeat=elsewhere), now=NOW + STALE_S).state == "lost"


def test_a_process_that_has_ended_is_lost_before_anybody_has_waited_for_it(tmp_path: Path) -> None:
    with subprocess.Popen(["true"], stdin=subprocess.PIPE) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        mark = {**who(), "pid": process.pid, "pid_began_at_tick": None}
        assert read_run(_run(tmp_path / "a", heartbeat=mark), now=NOW).state == "lost"


def test_how_a_run_ended_does_not_hang_on_the_clock(tmp_path: Path) -> None:
    """It was set back by an hour between the last heartbeat and the end."""
    ended = {"state": "finished", "time": NOW - 3600, **who()}
    assert read_run(_run(tmp_path / "a", heartbeat=who(), ended=ended), now=NOW - 3600).state == "finished"
    before = {
        **ended,
        "pid_began_at_tick": 1,
        "time": NOW + 3600,
    }  # the start before this one
    assert read_run(_run(tmp_path / "b", heartbeat=who(), ended=before), now=NOW).state == "running"


def test_the_table_fits_80_columns(tmp_path: Path) -> None:
    ended = {"code": 0, "state": "preempted", "time": NOW + 1}
    folder = _run(
        tmp_path / "a_sweep_of_rates_1e-3", heartbeat={"job_id": "123456_12", "nodes": "n[1-16]"}, ended=ended
    )
    (folder / "checkpoints" / "step_012000").mkdir(parents=True)
    (folder / "plan.json").write_text('{"steps": 100000}')
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 12345, "loss": 1.5, "tokens_per_s": 123456}\n')
    wide, narrow = shown(tmp_path), shown(tmp_path, 80)
    assert wide[0].split() == ["run", "state", "step", "loss", "tokens/s", "saved", "job", "nodes", "seen"]
    assert len(narrow) == 2
    assert max(map(len, narrow)) <= 80
    for word in ("a_sweep_of_rates_1e-3", "preempted", "12345/100000", "1.5000", "ago"):
        assert word in narrow[1]
    _run(tmp_path / ("long" * 20), heartbeat={})
    assert max(map(len, shown(tmp_path, 80))) <= 80


def test_logs_by_rank(tmp_path: Path) -> None:
    folder = _run(tmp_path / "story", heartbeat={"job_id": "12"})
    ranks = tmp_path / "slurm" / "story-12.ranks"
    ranks.mkdir(parents=True)
    (tmp_path / "slurm" / "story-12.out").write_text("rank 0 here\n")
    (tmp_path / "slurm" / "story-112.out").write_text("another job\n")
    (ranks / "rank_003.node2.log").write_text("rank 3 here\n")
    assert "".join(follow_log(find_log(folder))) == "rank 0 here\n"
    assert "".join(follow_log(find_log(folder, 3))) == "rank 3 here\n"
    with pytest.raises(RunFolderError, match=r"no log of rank 2 of job 12(.|\n)*ranks with a log: 0, 3"):
        find_log(folder, 2)
    with pytest.raises(RunFolderError, match="no log of rank 0 in"):
        find_log(_run(tmp_path / "other", heartbeat={}))
    with pytest.raises(RunFolderError, match="is not a run folder"):
        find_log(tmp_path)


def test_a_sweep_and_its_candidates_share_their_jobs_log(tmp_path: Path) -> None:
    for name, job in (("a", "12"), ("b", "13")):
        _run(tmp_path / "sweep" / name, heartbeat={"job_id": job})
    os.utime(tmp_path / "sweep" / "a" / "heartbeat.json", (1, 1))
    said = {"candidates": [{"name": name, "folder": name} for name in "abc"]}
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(said))
    (tmp_path / "slurm").mkdir()
    for job in ("12", "13"):
        (tmp_path / "slurm" / f"sweep-{job}.out").write_text(f"job {job}\n")
    assert find_log(tmp_path / "sweep" / "a").read_text() == "job 12\n"
    assert find_log(tmp_path / "sweep").read_text() == "job 13\n"


def test_follow_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\n")
    pieces = follow_log(log, follow=True, every_s=0.01)
    assert next(pieces) == "one\n"
    with log.open("a") as file:
        file.write("two\n")
    assert next(pieces) == "two\n"
