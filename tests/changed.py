"""Print the unit tests that are nearest to what changed, for `make check`: `python -m tests.changed [COMMIT]`.

Changed is what differs from the commit (HEAD, unless one is named) and what is new. A changed test file of
`tests/unit` is run itself. A changed module is run by the test files that import it: of those the ones that import the
fewest other modules of the package, since what all of them share would be the whole of `make test`. A module that no
test file imports, such as a verb's, is run by those that import the modules that import it. Together they take
no more CPU time than `BUDGET_S` says, by what `tests/cpu_seconds.txt` has of each; what is left out is named.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests import cpu_seconds

REPO = Path(__file__).resolve().parents[1]
NEAREST = 4  # test files for each changed module
BUDGET_S = 60.0  # of CPU time, which two workers share
UNKNOWN_S = 3.0  # what a file that nobody has measured is taken to cost
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


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def users_of(module: str, imports: Mapping[str, set[str]], package: Mapping[str, set[str]]) -> list[str]:
    """Test files that import a module, or else the modules that import it, the nearest first."""
    reached, wanted = {module}, {module}
    while wanted and not any(wanted & names for names in imports.values()):
        wanted = {user for user, names in package.items() if names & wanted} - reached
        reached |= wanted
    return [test for _, test in sorted((len(names), test) for test, names in imports.items() if wanted & names)]


def nearest(
    changed: Iterable[str],
    imports: Mapping[str, set[str]],
    cost_s: Mapping[str, float],
    package: Mapping[str, set[str]] | None = None,
) -> tuple[list[str], list[str]]:
    """Test files to run, of those whose imports are given, and those left out for their CPU time.

    `package`: what each module of the package imports. Always the house's and those that are changed themselves; then
    the nearest of each module, the second nearest, …
    """
    chosen = {ALWAYS, *(path for path in changed if path in imports)}
    users: list[list[str]] = []
    for path in changed:
        if path.startswith("phi3_dist/") and path.endswith(".py"):
            users.append(users_of(module_of(path), imports, package or {})[:NEAREST])
    left_out = set[str]()
    for place in range(NEAREST):
        for test in [tests[place] for tests in users if place < len(tests)]:
            fits = sum(cost_s.get(one, UNKNOWN_S) for one in {*chosen, test}) <= BUDGET_S
            (chosen if fits or test in chosen else left_out).add(test)
    return sorted(chosen), sorted(left_out)


if __name__ == "__main__":
    tests, package = (
        {path.relative_to(REPO).as_posix(): imported(path.read_text(encoding="utf-8")) for path in paths}
        for paths in ((REPO / "tests" / "unit").glob("test_*.py"), (REPO / "phi3_dist").rglob("*.py"))
    )
    package = {module_of(path): names for path, names in package.items()}
    cost_s = cpu_seconds.kept()
    chosen, left_out = nearest(changed_files((sys.argv[1:] or ["HEAD"])[0]), tests, cost_s, package)
    said = f"[check] {len(chosen)} test files, about {sum(cost_s.get(test, UNKNOWN_S) for test in chosen):.0f} s of CPU"
    more = f"; left to make test: {', '.join(Path(test).stem for test in left_out)}" if left_out else ""
    print(said + more, file=sys.stderr)
    print(*chosen, sep="\n")
