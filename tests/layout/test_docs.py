"""The pages: every link leads somewhere, the README stays short, every page is in the index."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README_LINES = 120
README_CHARACTERS = 120
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def anchor_of(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    broken = []
    for name, anchor in LINK.findall(page.read_text("utf-8")):
        target = (page.parent / name).resolve() if name else page
        if not target.exists():
            broken.append(name)
        elif anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.MULTILINE)
            if anchor[1:] not in map(anchor_of, headings):
                broken.append(f"{name}{anchor}")
    assert broken == []


def test_pages_install_the_package_from_a_wheel_for_no_index_has_it():
    """And name the registry of the images, for none is published."""
    lines = [f"{path.name}: {line}" for path in PAGES for line in path.read_text("utf-8").splitlines()]
    assert [line for line in lines if re.search(r"pip install '?moeserving\[", line)] == []
    installs = [line for line in lines if "helm install moeserving charts/" in line]
    assert installs
    assert [line for line in installs if "images.registry=" not in line] == []


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= README_LINES
    assert [line for line in lines if len(line) > README_CHARACTERS] == []


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    pages = [path.relative_to(ROOT / "docs") for path in PAGES if ROOT / "docs" in path.parents]
    listed = [page for page in pages if page.parent.name != "adr" and page.parts != ("README.md",)]
    assert [str(page) for page in listed if f"({page})" not in index] == []


def test_the_pictures_are_text_without_fonts_from_the_network_or_paths_of_a_machine():
    for path in (ROOT / "docs").glob("*.svg"):
        text = path.read_text("utf-8")
        assert "url(http" not in text.replace('"', ""), path
        assert not re.search(r"/(home|tmp|opt|usr)/", text), path
