"""The Markdown pages that readers see, and the fenced blocks in them.

A block of commands (`bash`) or Python is run by `tests/ranks/test_page_commands.py`. The line above its fence may say
why not, or how it ends:

    <!-- needs a GPU -->
    <!-- not run: REASON -->
    <!-- run by tests/unit/test_x.py::test_y -->
    <!-- exits with 2 -->

A fence with a title (` ```yaml title="axolotl.yml" `) is a file, which the commands of all pages find beside them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).resolve().parent.parent
RUN = ("bash", "python")
_FENCE = re.compile(
    r'(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)
_MARK = re.compile(r"needs a GPU|not run: .+|run by (?P<place>\S+)::(?P<test>\w+)|exits with (?P<code>\d+)")


@dataclass(frozen=True)
class Block:
    """One fenced block: its page, its language, the comment above it (may be empty), its title and its text."""

    page: str
    language: str
    mark: str
    title: str
    text: str

    @property
    def runs(self) -> bool:
        return self.language in RUN and not self.title and (not self.mark or self.mark.startswith("exits with"))

    @property
    def exit_code(self) -> int:
        return int(self.mark.removeprefix("exits with ")) if self.mark.startswith("exits with") else 0

    @property
    def commands(self) -> list[str]:
        """Each command of a `bash` block; a backslash at the end joins lines, a comment is none."""
        lines = [line.strip() for line in self.text.replace("\\\n", " ").splitlines()]
        return [line for line in lines if line and not line.startswith("#")]


def navigation(entry: Any = None) -> Iterator[str]:
    """The pages of the docs site in their order, such as `docs/install.md`."""
    if entry is None:
        entry = yaml.safe_load((REPO / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    if isinstance(entry, str):
        yield f"docs/{entry}"
        return
    for one in entry.values() if isinstance(entry, dict) else entry:
        yield from navigation(one)


def pages() -> list[str]:
    """README.md first, since what it makes the others may use, then the site's pages, then CONTRIBUTING.md."""
    return ["README.md", *navigation(), "CONTRIBUTING.md"]


def text_of(page: str) -> str:
    return (REPO / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    return [
        Block(page, found["language"], found["mark"] or "", found["title"] or "", found["text"])
        for found in _FENCE.finditer(text_of(page))
    ]


def understood(mark: str) -> bool:
    """Whether a mark is one of those above. The test that `run by` names has to be there."""
    found = _MARK.fullmatch(mark)
    if found is None or not found["place"]:
        return found is not None
    path = REPO / found["place"]
    return path.is_file() and f"def {found['test']}(" in path.read_text(encoding="utf-8")
