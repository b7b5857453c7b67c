"""What keeps the house liveable: sizes, what help may import, no path of a machine, one oldest Python."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "phi3_dist"
MODULE_LINES = 400
FUNCTION_LINES = 60
# path, or path:function, and why it may be longer. Empty is how it should be.
LONGER: dict[str, str] = {
    "phi3_dist/cli/slurm.py:slurm": "one line an option",
}


@cache
def project_files() -> list[Path]:
    """What is or will be committed."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPO, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return sorted(REPO / line for line in listed.stdout.splitlines() if (REPO / line).is_file())


@cache
def pyproject() -> dict[str, Any]:
    return tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


# --- sizes --------------------------------------------------------------------------------------------------------


def test_modules_fit_in_the_head() -> None:
    lengths = {p.relative_to(REPO).as_posix(): len(p.read_text("utf-8").splitlines()) for p in modules()}
    assert len(lengths) > 10
    too_long = {path: n for path, n in lengths.items() if n > MODULE_LINES and path not in LONGER}
    assert not too_long


def test_functions_fit_on_a_screen() -> None:
    too_long = {}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                name = f"{path.relative_to(REPO).as_posix()}:{node.name}"
                if lines > FUNCTION_LINES and name not in LONGER:
                    too_long[name] = lines
    assert not too_long


# --- rooms --------------------------------------------------------------------------------------------------------


def contributing(title: str) -> str:
    """A section of CONTRIBUTING.md, up to the next title."""
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.split(r"^#+ ", text.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


@pytest.mark.parametrize(
    ("title", "lines", "count"),
    [
        ("One batch, from the row to the loss", r"^\d+\. `", 10),
        ("One adapter, from the run file to its folder", r"^\d+\. `", 10),
        ("Where would I change …", r"^\| .*\? \| `", 25),
    ],
)
def test_a_new_reader_is_led_to_files_that_exist(title: str, lines: str, count: int) -> None:
    section = contributing(title)
    assert len(re.findall(lines, section, flags=re.MULTILINE)) == count
    named = re.findall(r"`([a-z_0-9/]+\.py)`", section)
    assert len(set(named)) >= 10
    assert not [name for name in named if not (PACKAGE / name).is_file()]


def test_what_the_walks_name_in_a_file_is_defined_there() -> None:
    """The names beside a file, such as `Order` in `data/batch.py`, and the sections of the run file."""
    found = []
    for title in ("One batch, from the row to the loss", "One adapter, from the run file to its folder"):
        for line in re.split(r"^\d+\. ", contributing(title), flags=re.MULTILINE)[1:]:
            file, *names = re.findall(r"`([^`]+)`", line)
            source = (PACKAGE / file).read_text(encoding="utf-8")
            for name in names:
                if not name.endswith(".py"):
                    found.append(name)
                    assert re.search(rf"\b{name.split('.')[0]}\b", source), f"{file} has no {name}"
    assert "Order" in found


def test_the_loop_says_in_which_order_a_step_is_read() -> None:
    text = ast.get_docstring(ast.parse((PACKAGE / "training" / "whole_run.py").read_text("utf-8"))) or ""
    named = re.findall(r"^\d\. (\S+)  ", text.replace("this file", "whole_run.py"), flags=re.MULTILINE)
    assert named == ["whole_run.py", "step_loop.py", "train_step.py", "engines/backward_and_update.py"]
    beside = re.findall(r"[a-z_]+(?:\.py|/)", text.partition("Once a run:")[2])
    assert len(beside) == 5
    assert all((PACKAGE / "training" / name).exists() for name in (*named, *beside))
    source = "".join((PACKAGE / "training" / name).read_text("utf-8") for name in named[:3])
    for name in (*named[1:], *beside):  # each is called by what comes before it
        module = name.removesuffix(".py").rstrip("/").replace("/", ".")
        assert re.search(rf"^from phi3_dist\.training\.{module}\b", source, flags=re.MULTILINE), name


def test_every_package_says_in_two_lines_what_it_holds_and_where_to_begin() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        text, package = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "", path.relative_to(PACKAGE)
        assert len(text.split("\n\n")[0].splitlines()) <= 2, package
        first = re.search(r"(?:Begin with|Read in this order:) (\w+\.py)", text)
        assert first, f"{package} does not say where to begin"
        for name in re.findall(r"(?<![\w/*])[\w/]+\.py", text):
            assert (path.parent / name).is_file() or (PACKAGE / name).is_file(), f"{package}: {name}"


def test_every_package_has_its_room_and_its_layer() -> None:
    layers = next(c for c in pyproject()["tool"]["importlinter"]["contracts"] if c["type"] == "layers")["layers"]
    for package in (path.parent for path in PACKAGE.glob("*/__init__.py")):
        assert f"phi3_dist.{package.name}" in re.findall(r"[\w.]+", " ".join(layers)), package.name
        assert f"`{package.name}/`" in contributing("Rooms") or package.name == "cli", package.name


def test_nothing_is_handed_on_under_a_second_name() -> None:
    """A module's `__all__` holds what it defines: a name that is imported is imported from where it was made."""
    found, seen = [], 0
    for path in modules():
        if path.name == "__init__.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        ours = (n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("phi3_dist"))
        imported = {alias.asname or alias.name for node in ours for alias in node.names}
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                seen += 1
                names = imported & set(ast.literal_eval(node.value))
                found += [f"{path.relative_to(REPO)}: {name}" for name in sorted(names)]
    assert seen > 100
    assert not found


# --- what a verb may import -----------------------------------------------------------------------------------------

HEAVY = {"torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "datasets", "tokenizers"}
HEAVY |= {"numpy", "pandas", "pyarrow", "matplotlib", "tensorboard", "safetensors"}
ALSO_NOT_FOR_HELP = {"pydantic", "yaml", "jinja2", "rich.progress", "rich.console", "importlib.metadata"}


def imported_by(*words: str) -> set[str]:
    """Modules in a fresh interpreter after `phi3-dist WORDS`, without those that starting Python itself brings."""
    code = (
        "import json, sys\n"
        "before = set(sys.modules)\n"
        "from phi3_dist.cli import main\n"
        "sys.argv[0] = 'phi3-dist'\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print(json.dumps(sorted(set(sys.modules) - before)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("words", [("--help",), ("--version",)])
def test_help_imports_next_to_nothing(words: tuple[str, ...]) -> None:
    """An import check and not a stopwatch, which a busy machine would stop: `--help` owes its speed to this."""
    imported = imported_by(*words)
    assert "phi3_dist.cli" in imported
    read = {"importlib.metadata"} if words == ("--version",) else set()  # the packages' versions
    assert not imported & ((HEAVY | ALSO_NOT_FOR_HELP) - read)


@pytest.mark.parametrize("words", [("train", "--help"), ("report", "--help"), ("config", "schema")])
def test_neither_a_verbs_help_nor_a_run_file_needs_torch(words: tuple[str, ...]) -> None:
    imported = imported_by(*words)
    assert "phi3_dist.cli" in imported
    assert not imported & HEAVY


# --- what is committed ----------------------------------------------------------------------------------------------


def test_no_file_holds_a_path_of_a_machine() -> None:
    """Nor of what lies beside the clone. The home of `me`, in examples, is nobody's."""
    folders = "|".join(("work", "root", "home"))  # in pieces, so that this file does not find itself
    machine_path = re.compile(rf"(?<![\w./-])/(?:{folders})/(?!me/)|\.\./" + "shared")
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if machine_path.search(line):
                found.append(f"{path.relative_to(REPO)}:{number}: {line.strip()[:80]}")
    assert not found


def test_no_large_file_is_committed() -> None:
    large = {path.relative_to(REPO).as_posix(): path.stat().st_size for path in project_files()}
    assert not {path: size for path, size in large.items() if size > 512 * 1024}


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in (REPO / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


# --- versions -------------------------------------------------------------------------------------------------------


def test_the_oldest_python_is_the_same_everywhere() -> None:
    oldest = pyproject()["project"]["requires-python"].removeprefix(">=")
    assert pyproject()["tool"]["mypy"]["python_version"] == oldest
    assert pyproject()["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert f"OLDEST := {oldest}\n" in (REPO / "Makefile").read_text(encoding="utf-8")
    page = (REPO / "docs/install.md").read_text(encoding="utf-8")
    assert f"Python {oldest} or newer" in page
    assert f"Python {oldest} or newer" in (REPO / "README.md").read_text(encoding="utf-8")
    assert f"The tests run on {oldest}" in page


def test_every_file_is_in_the_oldest_pythons_syntax() -> None:
    oldest = tuple(int(part) for part in pyproject()["tool"]["mypy"]["python_version"].split("."))
    for path in project_files():
        if path.suffix == ".py":
            ast.parse(path.read_text(encoding="utf-8"), filename=str(path), feature_version=oldest)


def test_the_lock_pins_every_dependency_inside_its_range() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pins), "one exact version a line"
    lock = {canonicalize_name(name): version for name, version in pins}
    project = pyproject()["project"]
    wanted = [*project["dependencies"]]
    for extra in ("deepspeed", "qlora", "demo", "docs", "test", "dev"):
        wanted += project["optional-dependencies"][extra]
    for text in wanted:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name != "phi3-dist":
            assert lock.get(name) is not None, f"{name} has no line in constraints.txt"
            assert requirement.specifier.contains(lock[name]), f"{text}, but constraints.txt has {lock[name]}"
    assert lock["torch"] == "2.13.0"  # without a local part: the CPU build and the CUDA build both fit


def test_each_range_has_an_oldest_version() -> None:
    """`make test-oldest` takes it from here; without one uv would take the first release there ever was."""
    from packaging.requirements import Requirement

    project = pyproject()["project"]
    promised = project["dependencies"] + [
        line
        for extra, lines in project["optional-dependencies"].items()
        if extra not in {"docs", "test", "dev"}
        for line in lines
    ]
    floors = {line: [part for part in Requirement(line).specifier if part.operator == ">="] for line in promised}
    assert len(floors) > 20
    assert all(floors.values()), floors


def test_the_version_is_one() -> None:
    import phi3_dist

    version = pyproject()["project"]["version"]
    assert phi3_dist.__version__ == version
    assert f"\n## {version}" in (REPO / "CHANGELOG.md").read_text(encoding="utf-8")


# --- make, hooks, CI ------------------------------------------------------------------------------------------------


def test_ci_runs_make_test_and_nothing_else() -> None:
    script = REPO / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    lines = [line for line in script.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."', "make test"]


def test_make_lists_its_targets() -> None:
    shown = subprocess.run(["make", "--no-print-directory"], cwd=REPO, capture_output=True, text=True, check=True)
    text = (REPO / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)
    assert re.findall(r"^  make ([a-z0-9-]+) ", shown.stdout, flags=re.MULTILINE) == phony.split()


def test_a_python_that_is_not_here_is_told_with_what_brings_it() -> None:
    """A make target for each other Python that is promised; there will be no 3.99."""
    done = subprocess.run(["tests/versions/run.sh", "py399"], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Python 3.99 is not here" in done.stderr
    assert "apt install python3.99-venv python3.99-dev" in done.stderr
    assert "make test-py399 PYTHON399=/path/to/python3.99" in done.stderr
    assert not (REPO / ".venv-py399").exists()
    page = (REPO / "docs/install.md").read_text(encoding="utf-8")
    (newest,) = re.findall(r"Supported Python: 3\.11 to 3\.(\d+)\.", page)
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    assert re.findall(r"^test-py3(\d+):", makefile, flags=re.MULTILINE) == [str(n) for n in range(12, int(newest) + 1)]


def test_a_python_that_is_too_old_is_refused_with_the_way_out(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "--no-print-directory", "setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"],
        cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Python 3.9.2 is too old: phi3_dist needs Python 3.11 or newer" in done.stdout
    assert not (tmp_path / "venv").exists()


@pytest.mark.skipif(find_spec("importlinter") is None, reason="an environment without the tools of lint")
def test_hooks_run_the_tools_of_the_virtual_environment() -> None:
    """Local hooks only, and each one's program is one that `make lint` or `make types` runs."""
    config = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}
    for hook in hooks:
        program = hook["entry"].split()[0]
        assert program.startswith(".venv/bin/")
        assert f"$(BIN)/{Path(program).name}" in makefile
        assert (Path(sys.executable).parent / Path(program).name).is_file()
