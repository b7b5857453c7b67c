"""Print the unit tests that are nearest to what changed, for `make check`: `python -m tests.changed [COMMIT]`.

Changed is what differs from the commit (HEAD, unless one is named) and what is new. A changed test file of
`tests/unit` is run itself. A changed module is run by the test files that import it: of those the ones that import the
fewest other modules of the package, since what all of them share would be the whole of `make test`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
NEAREST = 4  # test files for each changed module
ALWAYS = "tests/unit/test_house.py"


def changed_files(commit: str) -> list[str]:
    """Paths below the repository's root, without those that are gone."""
    asked = (("diff", "--name-only", commit, "--"), ("ls-files", "--others", "--exclude-standard"))
    lines: list[str] = []
    for words in asked:
        done = subprocess.run(["git", *words], cwd=REPO, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr.strip())
        lines += done.stdout.splitlines()
    return sorted({line for line in lines if (REPO / line).is_file()})


def imported(source: str) -> set[str]:
    """Modules and names of the package that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.startswith("phi3_dist")}


def nearest(changed: Iterable[str], imports: Mapping[str, set[str]]) -> list[str]:
    """Test files to run, of those whose imports are given."""
    chosen = {path for path in changed if path in imports}
    for path in changed:
        if path.startswith("phi3_dist/") and path.endswith(".py"):
            module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            users = sorted((len(names), test) for test, names in imports.items() if module in names)
            chosen |= {test for _, test in users[:NEAREST]}
    return sorted({ALWAYS, *chosen})


if __name__ == "__main__":
    tests = {
        path.relative_to(REPO).as_posix(): imported(path.read_text(encoding="utf-8"))
        for path in (REPO / "tests" / "unit").glob("test_*.py")
    }
    print(*nearest(changed_files((sys.argv[1:] or ["HEAD"])[0]), tests), sep="\n")
