"""What each test costs in CPU seconds: `python -m tests.cpu_seconds` lists the files of the last runs, dearest first.

Every session notes it in `.cache/test_cpu_seconds.json`, the newest figure for each test: this process's time, that
of the children it waited for and of multiprocessing's fork server, and what processes took that the warm server forked
for the test (`tests/warm`). What a fixture of a module takes is the first test's that asks for it. CPU time and not the
clock's: another program that runs beside the tests does not change it much. Tests that are gone keep their figures
until the file is deleted.

`python -m tests.cpu_seconds FILE ...` lists the tests of files, and `--keep` writes the sums of files to
`tests/cpu_seconds.txt`, by which workers of xdist take the dearest files first (`tests/conftest.py`).
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

from filelock import FileLock

from tests import warm

REPO = Path(__file__).resolve().parents[1]
NOTED = REPO / ".cache" / "test_cpu_seconds.json"
KEPT = Path(__file__).with_suffix(".txt")
SERVERS_LINE = re.compile(r" *(\d+\.\d+) s of CPU time\t([^\t]+)\t")


class Costs:
    """Seconds of the tests of one session, or of one worker of it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def of(self, test: str) -> Iterator[None]:
        before_s = _used_s()
        yield
        self.seconds[test] += _used_s() - before_s

    def note(self) -> None:
        """Write them down beside those of other tests."""
        for line in warm.log().splitlines():
            if (found := SERVERS_LINE.match(line)) and found[2] in self.seconds:
                self.seconds[found[2]] += float(found[1])
        with FileLock(f"{NOTED}.flock"):
            noted = json.loads(NOTED.read_text(encoding="utf-8")) if NOTED.exists() else {}
            noted |= {test: round(s, 2) for test, s in self.seconds.items()}
            partial = NOTED.with_suffix(".partial")
            partial.write_text(json.dumps(noted, indent=0), encoding="utf-8")
            partial.replace(NOTED)


def _used_s() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used) + _forkserver_s()


def _forkserver_s() -> float:
    """Of multiprocessing's fork server and the processes it has waited for, which are none of our children."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)  # type: ignore[attr-defined]
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, after_name[11:15])) / os.sysconf("SC_CLK_TCK")  # utime, stime, cutime, cstime


def of_files(noted: Mapping[str, float]) -> dict[str, float]:
    """Sums of the files that are still there, dearest first."""
    sums: Counter[str] = Counter()
    for test, s in noted.items():
        sums[test.partition("::")[0]] += s
    return {file: s for file, s in sums.most_common() if (REPO / file).exists()}


def kept() -> dict[str, float]:
    lines = KEPT.read_text(encoding="utf-8").splitlines() if KEPT.exists() else []
    return {file: float(s) for s, file in (line.split() for line in lines)}


def main(words: list[str]) -> None:
    noted: dict[str, float] = json.loads(NOTED.read_text(encoding="utf-8"))
    sums = of_files(noted)
    if words == ["--keep"]:
        KEPT.write_text("".join(f"{s:.0f} {file}\n" for file, s in sums.items()), encoding="utf-8")
    elif words:
        for test, s in sorted(noted.items(), key=lambda pair: -pair[1]):
            if test.startswith(tuple(words)):
                print(f"{s:8.2f} {test}")
    else:
        for file, s in sums.items():
            print(f"{s:8.1f} {file}")
        print(f"{sum(sums.values()):8.1f} all, of them {os.path.commonpath([*sums])}")


if __name__ == "__main__":
    main(sys.argv[1:])
