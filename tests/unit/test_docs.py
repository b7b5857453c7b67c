"""The docs site builds without a warning, fetches nothing, and says what the code says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

import phi3_dist
from docs import generated
from tests.pages import REPO, navigation, text_of

LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` does: a warning (a link or an anchor that is not there, a page that no menu has) ends it."""
    if find_spec("mkdocs") is None:
        pytest.skip("an environment without the docs' packages")
    folder = tmp_path_factory.mktemp("docs") / "site"
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=REPO, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    return folder


class Loaded(HTMLParser):
    """What a page has a browser fetch by itself: scripts, styles, pictures, frames, preconnected hosts."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in LOADS and given.get("rel") not in ("prev", "next", "canonical"):
            self.urls.append(given.get(LOADS[tag]) or "")


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    built = sorted(site.rglob("*.html"))
    assert len(built) > len(list(navigation()))  # and a page for what is not found
    for page in built:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert len(loaded.urls) > 3
        assert not [url for url in loaded.urls if re.match(r"(https?:)?//", url)], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style.name


def test_the_site_holds_every_page_and_none_of_its_sources(site: Path) -> None:
    for page in navigation():
        assert (site / Path(page).name).with_suffix(".html").is_file()
    assert not list(site.rglob("*.py*"))
    assert not list(site.rglob("*.md"))


@pytest.mark.parametrize("page", sorted(path.name for path in generated.DOCS.glob("*.md")))
def test_generated_parts_are_the_codes(page: str) -> None:
    text = text_of(f"docs/{page}")
    assert text == generated.filled(text), "update it: python -m docs.generated"


def test_each_part_has_its_page() -> None:
    held = [name for page in navigation() for _, name, _ in generated.PART.findall(text_of(page))]
    assert sorted(held) == sorted(generated.PARTS)


def test_every_public_name_is_on_the_python_page(site: Path) -> None:
    described = set(re.findall(r"^::: phi3_dist\.(?:\w+\.)*(\w+)$", text_of("docs/api.md"), flags=re.MULTILINE))
    assert set(phi3_dist.__all__) - {"__version__"} <= described
    built = (site / "api.html").read_text(encoding="utf-8")
    assert all(re.search(rf'id="phi3_dist[\w.]*\.{name}"', built) for name in described)


def test_the_reference_has_every_key_and_verb() -> None:
    keys, verbs = text_of("docs/run-file.md"), text_of("docs/cli.md")
    for key in ("model.source", "data.columns.prompt", "lora.init", "optim.betas", "log.trackers", "name"):
        assert f"\n### {key}\n" in keys
    for verb in ("train", "config show", "cache"):
        assert f"\n## phi3-dist {verb}\n" in verbs
    assert "| `--resume` |" in verbs
