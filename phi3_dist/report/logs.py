"""What the ranks of a run have printed: `phi3-dist logs`.

Every run keeps it in its folder (training/monitor/transcript.py); a Slurm job has files of its own, which also hold
what no Python printed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from phi3_dist.errors import Problem, RunFolderError
from phi3_dist.report.plain_values import read_object
from phi3_dist.report.sweep_file import is_sweep, read_sweep

__all__ = ["TRANSCRIPTS", "find_log", "follow_log"]

TRANSCRIPTS = Path("logs", "terminal")
"""Where in its folder a run keeps the text of its ranks: `rank_000.log`, …"""
PIECE_BYTES = 65536


def find_log(folder: Path, rank: int = 0) -> Path:
    """The log of one rank: of a run's newest Slurm job, else what the run kept in its folder.

    Jobs of `phi3-dist slurm` log beside the run folder in `slurm/`, those of launch/slurm/train.sbatch where they
    were submitted. A sweep and its candidates share one log. Raises RunFolderError where there is none, naming the
    ranks that have one.
    """
    if not folder.is_dir():
        raise RunFolderError(Problem(str(folder), "is not a run folder", "see phi3-dist runs"))
    if is_sweep(folder):
        folder = _newest_candidate(folder)
    job = str(read_object(folder / "heartbeat.json")[0].get("job_id") or "")
    job = job if re.fullmatch(r"\w+", job) else ""
    above = folder.resolve().parent
    beside = above.parent if is_sweep(above) else above
    places: tuple[Path, ...] = (beside / "slurm", Path.cwd()) if job else ()
    pattern = f"*-{job}.out" if rank == 0 else f"*-{job}.ranks/rank_{rank:03d}.*.log"
    for place in places:
        if found := sorted(place.glob(pattern)):
            return found[-1]
    kept = folder / TRANSCRIPTS / f"rank_{rank:03d}.log"
    if kept.is_file():
        return kept
    logs = [log for place in places for log in (*place.glob(f"*-{job}.ranks/rank_*.log"), *place.glob(f"*-{job}.out"))]
    ranks = _ranks([*logs, *(folder / TRANSCRIPTS).glob("rank_*.log")])
    searched = ", ".join(map(str, (*places, folder / TRANSCRIPTS)))
    if not ranks and not (folder / "config.yaml").is_file():
        raise RunFolderError(Problem(str(folder), "is not a run folder", "see phi3-dist runs"))
    what = f"no log of rank {rank}{f' of job {job}' if job else ''} in {searched}"
    fix = f"ranks with a log: {', '.join(map(str, ranks))}" if ranks else f"its numbers are in {folder}/metrics.jsonl"
    raise RunFolderError(Problem(str(folder), what, fix))


def _newest_candidate(folder: Path) -> Path:
    """The candidate of a sweep that has written last; the folder itself where none has."""
    beats = [folder / one["folder"] / "heartbeat.json" for one in read_sweep(folder)[1]]
    there = [(beat.stat().st_mtime_ns, beat.parent) for beat in beats if beat.is_file()]
    return max(there)[1] if there else folder


def _ranks(logs: Sequence[Path]) -> list[int]:
    """Rank 0 is the one that writes to a job's output."""
    found = [re.match(r"rank_(\d+)\.", log.name) for log in logs]
    return sorted({int(match[1]) if match else 0 for match in found})


def follow_log(path: Path, *, follow: bool = False, every_s: float = 0.5) -> Iterator[str]:
    """Pieces of the log as it stands; with `follow` also what is appended, for ever. Raises RunFolderError."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            while True:
                if piece := file.read(PIECE_BYTES):
                    yield piece
                elif follow:
                    time.sleep(every_s)
                else:
                    return
    except OSError as error:
        raise RunFolderError(Problem(str(path), f"cannot be read: {error.strerror}", "")) from error
