"""A benchmark's table in a page of docs/, between two comments that name it."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["put_table"]


def put_table(page: Path, name: str, table: str) -> None:
    """Replace what lies between `<!-- NAME -->` and `<!-- end of NAME -->`. Raises ValueError where that is missing."""
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    whole, count = re.subn(
        rf"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}{table}{end}", text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{page} has no table {name}: {begin.strip()} … {end}")
    page.write_text(whole, encoding="utf-8")
