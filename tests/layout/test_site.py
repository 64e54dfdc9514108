"""The documentation as a site: it builds strictly, needs no other machine, and shows what a code host shows."""

import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
COUNTED = frozenset(("li", "tr", "td", "pre", "h1", "h2", "h3", "h4", "img", "blockquote"))
# Attributes by which a browser loads something; `href` of a link is followed by its reader alone.
LOADED = {("link", "href"), *((tag, "src") for tag in ("script", "img", "iframe", "source", "video"))}


class Elements(HTMLParser):
    """Counts the elements within <article>, and keeps the addresses that a browser loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.loaded: list[str] = []
        self._is_inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._is_inside |= tag == "article"
        self.counts[tag] += self._is_inside and tag in COUNTED
        self.loaded += [value for name, value in attrs if value and (tag, name) in LOADED]

    def handle_endtag(self, tag: str) -> None:
        self._is_inside &= tag != "article"


def read(text: str) -> Elements:
    found = Elements()
    found.feed(text)
    return found


def build(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder), *options],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def page_of(site: Path, page: Path) -> Path:
    found = site / page.relative_to(DOCS).with_suffix(".html")
    return found.with_name("index.html") if page.name == "README.md" else found


def test_each_page_has_the_elements_that_a_code_host_shows(site: Path) -> None:
    """MkDocs reads lists otherwise than CommonMark: a blank line before each, four spaces for one within another."""
    reader, differing = MarkdownIt("commonmark").enable("table"), {}
    for page in PAGES:
        here = read(f"<article>{reader.render(page.read_text('utf-8'))}</article>").counts
        there = read(page_of(site, page).read_text("utf-8")).counts
        if here != there:
            differing[str(page.relative_to(DOCS))] = {name: (here[name], there[name]) for name in here | there}
    assert differing == {}


def test_a_browser_asks_no_other_machine_for_anything(site: Path) -> None:
    asked = {
        address
        for path in site.rglob("*.html")
        for address in read(path.read_text("utf-8")).loaded
        if re.match(r"(https?:)?//", address)
    }
    for path in site.rglob("*.css"):
        asked |= set(re.findall(r"(?:url\(|@import )[\"']?((?:https?:)?//[^)\"']*)", path.read_text("utf-8")))
    assert asked == set()


def test_what_is_searched_for_is_in_an_index_of_the_site(site: Path) -> None:
    assert "ageingHorizon" in (site / "search" / "search_index.json").read_text("utf-8")


def test_links_to_files_outside_of_the_folder_lead_to_their_text(site: Path) -> None:
    assert "project/charts/moeserving/index.html" in (site / "install.html").read_text("utf-8")
    assert "watchNamespaces" in (site / "project/charts/moeserving/index.html").read_text("utf-8")


def test_links_that_lead_nowhere_fail(tmp_path: Path) -> None:
    targets = ("nowhere.md", "index.md#nowhere", "../../nowhere.md")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Page\n\n" + "".join(f"[link]({name})\n" for name in targets))
    settings = {
        "INHERIT": str(ROOT / "mkdocs.yml"),
        "docs_dir": "docs",
        "nav": ["index.md"],
        "hooks": [],
        "extra_css": [],
    }
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    done = build(tmp_path / "site", "--config-file", str(tmp_path / "mkdocs.yml"))
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert [name for name in targets if f"'{name}'" not in said] == []
    assert "warnings in strict mode" in said
