"""Versions of installed distributions, read without importing any."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import metadata

__all__ = ["version_of", "versions_of"]


@cache
def version_of(distribution: str) -> str | None:
    """Its version, None where it is not installed.

    Read once in a process: reading parses all of the package's metadata, and a run asks some eighty times.
    """
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions_of(distributions: Iterable[str]) -> dict[str, str]:
    """Version of each that is installed."""
    found = {name: version_of(name) for name in distributions}
    return {name: version for name, version in found.items() if version is not None}
