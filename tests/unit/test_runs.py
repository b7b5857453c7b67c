from __future__ import annotations

import io
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from phi3_dist.errors import RunFolderError
from phi3_dist.report.runs import STALE_S, find_log, follow_log, list_runs, read_run, runs_table

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
        ["a", "running", "7/20", "1.5000", "2,000", "step_000006", "12_3", "node[1-2]", "2", "min", "ago"]
    )


def test_list_finds_run_folders_only(tmp_path: Path) -> None:
    _run(tmp_path / "deep" / "b", heartbeat={})
    _run(tmp_path / "a", heartbeat={})
    _run(tmp_path / "a" / "inner")  # part of the run it lies in
    (tmp_path / "slurm").mkdir()
    assert [row.folder.name for row in list_runs(tmp_path)] == ["a", "b"]
    with pytest.raises(RunFolderError, match="is not a folder"):
        list_runs(tmp_path / "nowhere")


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
    with pytest.raises(RunFolderError, match="was not run by Slurm"):
        find_log(_run(tmp_path / "other", heartbeat={}))


def test_follow_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\n")
    pieces = follow_log(log, follow=True, every_s=0.01)
    assert next(pieces) == "one\n"
    with log.open("a") as file:
        file.write("two\n")
    assert next(pieces) == "two\n"
