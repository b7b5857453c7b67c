"""Small file systems that are full when a test wants them to be."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

PAGE = 4096


class Disk:
    """A tmpfs at `path`; it takes another size while it is in use."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mount(self, kib: int = 4096, inodes: int = 10_000) -> None:
        self.unmount()
        self._call("mount", "-t", "tmpfs", "-o", f"size={kib}k,nr_inodes={inodes}", "none", str(self.path))

    def resize(self, kib: int = 65536, inodes: int = 10_000) -> None:
        self._call("mount", "-o", f"remount,size={kib}k,nr_inodes={inodes}", str(self.path))

    def leave(self, pages: int) -> None:
        """Fill it but for so many pages."""
        filler = self.path / "filler"
        filler.unlink(missing_ok=True)
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"\0" * PAGE) == PAGE:  # what a tmpfs says is free may be off by some pages
                pass
        os.truncate(filler, max(0, filler.stat().st_size - pages * PAGE))

    def unmount(self) -> None:
        while subprocess.run(["umount", "-l", str(self.path)], check=False, capture_output=True).returncode == 0:
            pass

    def _call(self, *command: str) -> None:
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("this kernel lets no tmpfs be mounted")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Disk]:
    """A disk below `folder`, not mounted yet. Skips where mounting is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    disk = Disk(folder / "disk")
    disk.path.mkdir()
    try:
        yield disk
    finally:
        disk.unmount()


def unfinished(folder: Path) -> list[str]:
    """What a writer that failed has left."""
    return sorted(p.name for p in folder.rglob("*") if ".tmp" in p.name or p.name.endswith(".partial"))
