"""README.md, the docs and CONTRIBUTING.md are true: their tables are the code's, their tree is the disk's.

Their commands are run by `tests/ranks/test_page_commands.py`, and the docs site is built by `test_docs.py`.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from phi3_dist import errors
from phi3_dist.cli import app
from phi3_dist.config.load import load_run
from tests.pages import REPO, RUN, blocks, pages, text_of, understood

README_WORDS = 900
UsageError: Any = typer.BadParameter.__base__  # which typer takes from a click of its own


def section(page: str, heading: str) -> str:
    match = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text_of(page), flags=re.MULTILINE | re.DOTALL)
    assert match is not None, f"{page} has no section '{heading}'"
    return match[1]


# --- the README -----------------------------------------------------------------------------------------------------


def test_the_readme_is_one_page() -> None:
    assert len(text_of("README.md").split()) <= README_WORDS


def test_the_first_command_is_the_demo() -> None:
    first = next(block for block in blocks("README.md") if block.language == "bash")
    assert first.commands == ["make demo"]


def test_what_the_readme_says_of_memory_is_the_plans(tmp_path: Path) -> None:
    """Packs of 2,048 tokens with checkpointing on one card, as `phi3-dist plan` has them, to a tenth."""
    rows = [line for line in section("README.md", "Does it run on my cards?").splitlines() if " GiB: " in line]
    shown = [[float(gib) for gib in re.findall(r"([\d.]+) GiB", row)] for row in rows]
    cards = [[int(gb) for gb in re.findall(r"a card of (\d+) GB", row)] for row in rows]
    run = tmp_path / "run.yaml"
    for i, source in enumerate(("microsoft/Phi-3-mini-4k-instruct", "microsoft/phi-4")):
        run.write_text(
            f"model: {{source: {source}, precision: bf16, activation_checkpointing: true}}\n"
            f"data: {{train: {REPO / 'configs/run/debug_chats.jsonl'}}}\ntrain: {{max_steps: 10}}\n"
        )
        words = ["plan", str(run), "--nodes", "1", "--gpus-per-node", "1", "--gpu", "h100-80gb", "--json"]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        peak = {
            option["quantization"]: option["peak_gib"]
            for option in json.loads(done.output)["options"]
            if option["strategy"] == "single"
        }
        assert shown[i] == pytest.approx([peak["nf4"], peak["none"]], rel=0.1)
        assert all(gib < 0.9 * gb / 1.074 for gib, gb in zip(shown[i], cards[i], strict=True))


def test_the_faults_that_the_pages_show_are_what_lint_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal of 86 columns, without the spaces at the end of each line."""
    shown = next(block for block in blocks("docs/migrating.md") if block.title == "axolotl.yml")
    (tmp_path / shown.title).write_text(shown.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    done = CliRunner(env={"COLUMNS": "86"}).invoke(app, ["lint", shown.title])
    assert done.exit_code == 2
    printed = [line.rstrip() for line in done.output.splitlines()]
    for page in ("README.md", "docs/migrating.md"):
        (block,) = [block for block in blocks(page) if "axolotl.yml:6" in block.text]
        assert block.text.splitlines() == printed, page


# --- blocks, marks, names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages())
def test_every_block_of_commands_runs_or_says_why_not(page: str) -> None:
    """No fence is indented or unread, none is in another shell's name, and each mark is one that the tests know."""
    found = blocks(page)
    fences = re.findall(r"^\s*```", text_of(page), flags=re.MULTILINE)
    assert len(fences) == 2 * len(found), "a fence that tests/pages.py does not read"
    assert not {block.language for block in found} & {"sh", "shell", "console", "py"}, "write bash or python"
    for block in found:
        if block.language in RUN:
            assert not block.mark or understood(block.mark), f"{block.mark}\n{block.text}"


def _parsed(words: list[str]) -> None:
    """Raises UsageError for a verb, an option or a count of arguments that the command line does not take."""
    command: Any = get_command(app)
    context = command.make_context("phi3-dist", words)
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)


def test_the_command_line_takes_every_command_that_the_pages_show() -> None:
    """Also those that need a GPU. The others run in tests/ranks/test_page_commands.py, most in `make test-full`."""
    seen = []
    for block in (block for page in pages() for block in blocks(page) if block.language == "bash"):
        for command in block.commands:
            words = shlex.split(command, comments=True)
            if words[0] == "phi3-dist" and not words[1].startswith("--") and not {"|", ">", "--help"} & set(words):
                try:
                    _parsed(words[1:])
                except UsageError as error:
                    pytest.fail(f"{block.page}: {command}: {error.format_message()}")
                seen.append(words[1])
    assert len(seen) > 60
    assert {"train", "plan", "sweep", "eval", "export", "slurm", "import"} <= set(seen)
    with pytest.raises(UsageError, match=r"(?i)no such option"):
        _parsed(["train", "run.yaml", "--no-such-option"])


def test_every_make_target_that_the_pages_name_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", text_of("Makefile"), flags=re.MULTILINE))
    named = {name for page in pages() for name in re.findall(r"(?:`|^)make ([a-z0-9-]+)", text_of(page), re.MULTILINE)}
    assert {"demo", "docs", "test"} <= named
    assert named <= targets


def test_the_run_file_example_is_a_run_file(tmp_path: Path) -> None:
    example = next(block.text for block in blocks("docs/run-file.md") if block.title == "example.yaml")
    run = tmp_path / "example.yaml"
    run.write_text(example, encoding="utf-8")
    config = load_run(run)
    shown = yaml.safe_load(example)
    assert config.model.source == shown["model"]["source"]
    assert config.train.eval_every == shown["train"]["eval_every"]


def test_the_table_of_exit_codes_is_the_exception_tree() -> None:
    table = re.search(r"^## By exit code\n(.*)", text_of("docs/troubleshooting.md"), flags=re.MULTILINE | re.DOTALL)
    assert table is not None
    rows = re.findall(r"^\| (\d+) \| `(\w+)`", table[1], flags=re.MULTILINE)
    tree = {c.__name__: c.exit_code for c in errors.Phi3DistError.__subclasses__()}
    assert {name: int(code) for code, name in rows} == tree


# --- the tree, and links --------------------------------------------------------------------------------------------


def tree_of(page: str) -> set[str]:
    """Paths of the annotated tree; folders end in a slash."""
    (tree,) = re.findall(r"^```text\n(.*?)^```$", section(page, "What is where"), flags=re.MULTILINE | re.DOTALL)
    above: list[str] = []
    paths: set[str] = set()
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        above = [*above[:depth], line.split()[0]]
        paths.add("".join(above))
    return paths


def test_the_tree_is_the_disks() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPO, capture_output=True, text=True, check=True,
    )  # fmt: skip
    files = [Path(line) for line in listed.stdout.splitlines() if (REPO / line).exists()]
    tree = tree_of("docs/architecture.md")
    missing = {path for path in tree if not (REPO / path).exists()}
    assert not missing, "in the tree, not on the disk"

    top = {file.parts[0] + ("/" if len(file.parts) > 1 else "") for file in files} - {".gitignore"}
    assert top <= tree, "on the disk, not in the tree"
    rooms = {f"{file.parts[0]}/{file.parts[1]}/" for file in files if len(file.parts) > 2}
    rooms = {room for room in rooms if room.startswith(("phi3_dist/", "tests/", "configs/"))}
    assert rooms <= tree, "rooms without a line in the tree"


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the docs site make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_link_leads_somewhere(page: str) -> None:
    """The build of the docs site looks at those of the docs: it ends at a link or an anchor that is not there."""
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", text_of(page)):
        path = REPO / (target or page)
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path), f"{page}: {target}#{anchor}"
