"""The launcher for tests on ranks: results, what it says of a failing rank, and that nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks.launcher import REPO, Rank, run_ranks, wait_for

pytestmark = pytest.mark.ranks

HERE = "tests.ranks.test_launcher"


# --- bodies -------------------------------------------------------------------------------------------------------


def body_facts(word: str, folder: str) -> dict[str, str | int | None]:
    keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "ACCELERATE_USE_CPU")
    time.sleep(0.2 if os.environ["RANK"] == "0" else 0)  # ends last, still comes first
    facts: dict[str, str | int | None] = {
        key: os.environ.get(key) for key in (*keys, "DS_ACCELERATOR", "EXTRA", "HOME")
    }
    return facts | {"word": word, "folder": folder, "pid": os.getpid()}


def body_second_fails_first() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("the cause, on rank 1")
    time.sleep(60)


def body_dies_without_a_word() -> None:
    print("last words on stdout", flush=True)
    if os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def body_leaves_early() -> None:
    sys.exit(0)


def body_not_json() -> object:
    return object()


def body_hangs_here(folder: str) -> None:
    Path(folder, os.environ["RANK"]).write_text(str(os.getpid()))
    if os.environ["RANK"] == "1":
        child = subprocess.Popen(["sleep", "300"])
        Path(folder, "grandchild").write_text(str(child.pid))
        signal.pause()


# --- tests --------------------------------------------------------------------------------------------------------


def is_running(pid: int) -> bool:
    """Whether the process lives; one that waits to be reaped does not."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pid: int) -> None:
    deadline_s = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline_s, f"process {pid} outlived its launcher"
        time.sleep(0.02)


def test_results_come_in_the_order_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "left by an outer launcher")
    results = run_ranks(
        f"{HERE}:body_facts", 3, args={"word": "ids", "folder": tmp_path}, env={"EXTRA": "yes", "HOME": None}
    )
    assert [r["RANK"] for r in results] == ["0", "1", "2"]
    assert [r["LOCAL_RANK"] for r in results] == ["0", "1", "2"]
    assert len({r["pid"] for r in results} | {os.getpid()}) == 4
    for result in results:
        assert result["WORLD_SIZE"] == result["LOCAL_WORLD_SIZE"] == "3"
        assert result["OMP_NUM_THREADS"] == "1"
        assert (result["ACCELERATE_USE_CPU"], result["DS_ACCELERATOR"]) == ("true", None)
        assert (result["EXTRA"], result["HOME"], result["word"]) == ("yes", None, "ids")
        assert result["folder"] == str(tmp_path)


def test_deepspeed_replaces_accelerates_cpu_mode() -> None:
    (result,) = run_ranks(f"{HERE}:body_facts", 1, args={"word": "", "folder": ""}, deepspeed=True)
    assert (result["ACCELERATE_USE_CPU"], result["DS_ACCELERATOR"]) == (None, "cpu")


def test_a_failing_rank_shows_its_traceback_and_stops_the_others() -> None:
    start_s = time.monotonic()
    with pytest.raises(AssertionError, match="rank 1 failed first") as caught:
        run_ranks(f"{HERE}:body_second_fails_first", 2)
    assert "ValueError: the cause, on rank 1" in str(caught.value)
    assert 'raise ValueError("the cause, on rank 1")' in str(caught.value)
    assert time.monotonic() - start_s < 30  # rank 0 would have slept for a minute


def test_the_first_failure_in_time_is_shown_not_the_first_rank(tmp_path: Path) -> None:
    failures = [(12.5, "ConnectionError: peer has gone"), (12.0, "ValueError: the cause")]
    for number, (at_s, text) in enumerate(failures):
        (tmp_path / f"error_{number}").write_text(json.dumps({"at_s": at_s, "traceback": f"Traceback …\n{text}\n"}))
    with pytest.raises(AssertionError) as caught:
        wait_for([Rank(number, tmp_path) for number in range(2)], "module:train", timeout_s=1)
    assert str(caught.value).splitlines() == [
        "module:train: rank 1 failed first",
        "Traceback …",
        "ValueError: the cause",
        "rank 0, 0.50 s later: ConnectionError: peer has gone",
    ]


def test_a_death_without_traceback_names_the_signal_and_the_last_output() -> None:
    with pytest.raises(AssertionError, match="rank 0 failed first") as caught:
        run_ranks(f"{HERE}:body_dies_without_a_word", 2)
    assert "killed by SIGKILL" in str(caught.value)
    assert "last words on stdout" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "says"), [("body_leaves_early", "SystemExit"), ("body_not_json", "not JSON serializable")]
)
def test_no_result_is_a_failure(body: str, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        run_ranks(f"{HERE}:{body}", 1)


def test_a_hanging_rank_is_named_with_its_stack_and_nothing_stays_behind(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"still running after 3 s: rank 1 \(of 2\)") as caught:
        run_ranks(f"{HERE}:body_hangs_here", 2, args={"folder": tmp_path}, timeout_s=3)
    assert "in body_hangs_here" in str(caught.value)
    wait_until_gone(int((tmp_path / "1").read_text()))
    wait_until_gone(int((tmp_path / "grandchild").read_text()))


def test_ranks_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "from tests.ranks.launcher import run_ranks\n"
        f"run_ranks('{HERE}:body_hangs_here', 2, args={{'folder': {str(tmp_path)!r}}}, timeout_s=60, real=True)"
    )
    files = [tmp_path / name for name in ("0", "1", "grandchild")]
    with subprocess.Popen([sys.executable, "-c", code], cwd=REPO) as parent:
        deadline_s = time.monotonic() + 30
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        parent.kill()
    for file in files:
        wait_until_gone(int(file.read_text()))
