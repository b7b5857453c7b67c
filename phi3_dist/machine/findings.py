"""What was looked at, how it was found, and what mends it: the rows of `phi3-dist doctor` and of `train --dry-run`."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from phi3_dist.errors import Phi3DistError, plain, redacted

__all__ = ["Finding", "Level", "as_json", "as_table", "exit_code", "merged", "named", "of_error", "tried"]

Level = Literal["ok", "warn", "bad"]
_WIDTH = 160
"""Of a table in a file or a pipe."""
_STYLES = {"ok": "green", "warn": "yellow", "bad": "red"}


@dataclass(frozen=True)
class Finding:
    """`ok`: as it should be. `warn`: works, but worth knowing. `bad`: something will fail. `fix` may be empty.

    `check` names what was looked at; `code` is the exit code that a run would end with, of what is bad.
    """

    level: Level
    what: str
    fix: str = ""
    check: str = ""
    code: int = 1


def named(check: str, findings: Iterable[Finding]) -> list[Finding]:
    """The findings, of this check where they name none."""
    return [one if one.check else replace(one, check=check) for one in findings]


def of_error(check: str, error: Phi3DistError) -> list[Finding]:
    """Each problem of an error as a finding."""
    return [
        Finding("bad", f"{one.where}: {one.what}" if one.where else one.what, one.fix, check, error.exit_code)
        for one in error.problems
    ]


def tried(check: str, ask: Callable[[], str]) -> list[Finding]:
    """What `ask` says is ok; what it raises is bad."""
    try:
        return [Finding("ok", ask(), check=check)]
    except Phi3DistError as error:
        return of_error(check, error)


def merged(by_rank: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Rank 0's findings, and what is not as it should be on others and rank 0 has not said."""
    found = list(by_rank[0])
    known = {(one.level, one.what) for one in found}
    for rank, findings in enumerate(by_rank[1:], start=1):
        for one in findings:
            if one.level != "ok" and (one.level, one.what) not in known:
                known.add((one.level, one.what))
                found.append(replace(one, what=f"rank {rank}: {one.what}"))
    return found


def exit_code(findings: Iterable[Finding]) -> int:
    """That of the first bad finding; 0 where none is."""
    return next((one.code for one in findings if one.level == "bad"), 0)


def as_json(findings: Iterable[Finding]) -> str:
    """A list of objects with check, state, found and fix."""
    rows = [
        {"check": one.check, "state": one.level, "found": redacted(one.what), "fix": redacted(one.fix)}
        for one in findings
    ]
    return json.dumps(rows, indent=2)


def as_table(findings: Sequence[Finding], *, width: int | None = None, colour: bool = False) -> str:
    """Check, state and what was found, with the fix below it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("check", "state", "found"):
        table.add_column(name, overflow="fold", no_wrap=name != "found")
    before = ""
    for one in findings:
        found = plain(redacted(one.what)) + (f"\nfix: {plain(redacted(one.fix))}" if one.fix else "")
        check = "" if one.check == before else one.check
        table.add_row(check, Text(one.level, _STYLES[one.level]), Text(found))
        before = one.check
    out = io.StringIO()
    Console(file=out, width=width or _WIDTH, highlight=False, force_terminal=colour).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
