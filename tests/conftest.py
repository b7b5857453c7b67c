"""What every test session shares: the order of tests, what they cost, one folder for DeepSpeed's compiled operators."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from tests import cpu_seconds
from tests.ranks.launcher import run_ranks

REPO = Path(__file__).resolve().parent.parent
# A folder for each Python and torch: torch asks neither which one an operator was compiled for
EXTENSIONS = REPO / ".cache" / f"torch_extensions_py{sys.version_info[0]}{sys.version_info[1]}_{version('torch')}"
ORDER = ("unit", "ranks")  # quick ones first; folders not named here come last
UNKNOWN_S = 10.0  # what a file that nobody has measured is taken to cost
FIRST_BUILD_TIMEOUT_S = 900
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # as machines may be
settings.load_profile("busy")
settings.register_profile("fuzz", max_examples=2500)  # of each kind of input: see tests/unit/test_fuzz.py
_SESSION_LOCK = pytest.StashKey[IO[str]]()
_COSTS = cpu_seconds.Costs()


def _hear_ctrl_c() -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Give this session and the ranks it starts one extension cache, free of locks left by killed builds.

    torch waits for ever, silently, on a `lock` file whose owner is dead. Every session holds a shared flock; only one
    that is alone (it gets the exclusive one) may say that the locks it finds are stale.
    """
    EXTENSIONS.mkdir(parents=True, exist_ok=True)
    session_lock = (EXTENSIONS.parent / "pytest.flock").open("w")
    try:
        fcntl.flock(session_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass
    else:
        for stale in EXTENSIONS.rglob("lock"):
            stale.unlink()
    fcntl.flock(session_lock, fcntl.LOCK_SH)
    config.stash[_SESSION_LOCK] = session_lock
    os.environ["TORCH_EXTENSIONS_DIR"] = str(EXTENSIONS)
    _hear_ctrl_c()  # a script's background ignores it, and tests send this signal


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay with one worker, and those of tests/torture all do: they share a fork server's imports."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class OneWorkerForTorture(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "tests/torture" if file.startswith("tests/torture/") else file

    return OneWorkerForTorture(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with _COSTS.of(item.nodeid):
        return (yield)


def pytest_sessionfinish() -> None:
    _COSTS.note()


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_SESSION_LOCK].close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unit tests first, then ranks, each in the order they stand in; workers of xdist take the dearest files first.

    So the last files that workers take are small, and all workers end at about the same time. The first user of
    `deepspeed_ops` in each file may have to build, or to wait for a worker that does.
    """
    kept = cpu_seconds.kept()

    def place(item: pytest.Item) -> float:
        if "PYTEST_XDIST_WORKER" in os.environ:
            return -kept.get(item.path.relative_to(REPO).as_posix(), UNKNOWN_S)
        folder = item.path.relative_to(REPO / "tests").parts[0]
        return ORDER.index(folder) if folder in ORDER else len(ORDER)

    items.sort(key=place)
    first = {item.path: item for item in reversed(items) if "deepspeed_ops" in getattr(item, "fixturenames", ())}
    for item in first.values():
        item.add_marker(pytest.mark.timeout(FIRST_BUILD_TIMEOUT_S))


@pytest.fixture(scope="module", autouse=True)
def what_lives_is_not_searched_for_garbage() -> None:
    """A run ends with three collections of garbage, which would look through all that the session has imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def no_accelerator_is_left_over() -> None:
    """One that the last file's tests have made, of another precision: a run in this process would be refused."""
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module", autouse=True)
def ctrl_c_is_not_ignored() -> None:
    """A file's tests may have left it so, and what the next ones start would inherit it."""
    _hear_ctrl_c()


@pytest.fixture(scope="session")
def deepspeed_ops(pytestconfig: pytest.Config) -> Path:
    """DeepSpeed's CPU operators, built once into this clone's cache; the folder they lie in.

    The two compile beside each other, one process each, since a first build takes minutes. Other workers wait for it.
    """
    built = EXTENSIONS / f"built_by_deepspeed_{version('deepspeed')}"
    start_s = time.perf_counter()
    with FileLock(EXTENSIONS / "build.flock"):
        if not built.exists():
            run_ranks("tests.ranks.deepspeed_build:build", 2, deepspeed=True, timeout_s=FIRST_BUILD_TIMEOUT_S - 60)
            built.touch()
    took_s = time.perf_counter() - start_s
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    if took_s > 30 and capture is not None:
        with capture.global_and_fixture_disabled():
            print(f"\n[deepspeed_ops] shm_comm and cpu_adam compiled in {took_s:.0f} s, kept in {EXTENSIONS.name}/")
    return EXTENSIONS
