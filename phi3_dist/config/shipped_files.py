"""The files that come with the package: run files, sweep files, Accelerate and DeepSpeed configs, launch scripts.

They lie in `configs/` and `launch/` at the top of the repository. `shipped/` holds a link to each, so that the package
finds them there in a clone; a wheel has copies in their place (`package-data` in pyproject.toml).
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from phi3_dist.errors import MachineError, Problem

__all__ = ["SHIPPED_ROOT", "here_or_shipped", "shipped_file", "shipped_files", "shipped_of"]

SHIPPED_ROOT = Path(__file__).parent / "shipped"
_PATTERNS = (
    "configs/accelerate/*.yaml",
    "configs/deepspeed/*.json",
    "configs/run/*.yaml",
    "configs/run/*.jsonl",
    "configs/sweep/*.yaml",
    "launch/*.sh",
    "launch/slurm/*.sbatch",
)
"""The same as in pyproject.toml, which says what a wheel takes; a test compares the two."""


def shipped_files() -> dict[PurePosixPath, Path]:
    """Each shipped file by its path in the repository, sorted. Raises MachineError where they are not there."""
    found = {
        PurePosixPath(path.relative_to(SHIPPED_ROOT).as_posix()): path
        for pattern in _PATTERNS
        for path in SHIPPED_ROOT.glob(pattern)
    }
    if not found:
        raise _missing(SHIPPED_ROOT)
    return dict(sorted(found.items()))


def shipped_file(name: str | PurePosixPath) -> Path:
    """Where a shipped file lies, by its path in the repository. Raises MachineError where it is not there."""
    path = SHIPPED_ROOT / name
    if not path.is_file():
        raise _missing(path)
    return path


def here_or_shipped(path: Path) -> Path:
    """`path` where it exists; else the shipped file of that name, if there is one; else `path`.

    Messages name `configs/accelerate/ddp.yaml` and its like, which a folder without a clone or a project does not hold.
    """
    shipped = shipped_of(path)
    try:
        return path if shipped is None or path.exists() else shipped
    except OSError:  # a folder that may not be looked into: whoever opens the file says so
        return path


def shipped_of(path: Path) -> Path | None:
    """The shipped file that a relative path names, counted from the repository; None where it names none."""
    name = PurePosixPath(path.as_posix())
    if path.is_absolute() or not any(name.match(pattern) for pattern in _PATTERNS):
        return None
    return shipped_files().get(name)


def _missing(path: Path) -> MachineError:
    fix = "install phi3-dist again; a clone needs symbolic links (git config core.symlinks true)"
    return MachineError(Problem(str(path), "comes with the package and is not there", fix))
