"""Hooks of MkDocs: links that leave docs/ lead to copies on the site, and the navigation has every decision.

A Markdown file outside of docs/ becomes the page `project/PATH`, any other file a page with its text, a folder a page
with its list of files. Called by MkDocs (`hooks` in mkdocs.yml).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FOLDER = "project"
# Pages that the navigation has without a link to them in another page.
PAGES_OUTSIDE = ("CHANGELOG.md", "charts/moeserving/README.md")
# `](target#anchor)` of links and images within the repository.
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
FENCES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".toml": "toml", ".ts": "typescript"}


def on_config(config: Any) -> Any:
    """Adds each decision to the end of the navigation."""
    records = sorted(path.name for path in (DOCS / "adr").glob("0*.md"))
    for entry in config.nav:
        if isinstance(entry, dict) and "Decisions" in entry:
            entry["Decisions"] += [f"adr/{name}" for name in records]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds a page for each file outside of docs/ that a page links to, directly or through another such file."""
    pages = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    found = {path for page in pages for path in find_outside(page)}
    waiting = [*found, *(ROOT / name for name in PAGES_OUTSIDE)]
    added: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in added:
            added.add(path)
            files.append(File.generated(config, name_page(path), content=write_page(path)))
            waiting += find_outside(path) if path.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page of docs/ with the links that leave docs/ led to their copies."""
    if page.file.generated_by:
        return markdown
    return lead_links(markdown, DOCS / page.file.src_uri, page.file.src_uri)


def find_outside(page: Path) -> Iterator[Path]:
    """Files and folders of the repository outside of docs/ to which a Markdown file links."""
    for match in LINK.finditer(page.read_text("utf-8")):
        path = (page.parent / match[1]).resolve()
        if path.exists() and path.is_relative_to(ROOT) and not path.is_relative_to(DOCS):
            yield path


def name_page(path: Path) -> str:
    """The path on the site, before rendering, of a file or folder of the repository."""
    if path.is_relative_to(DOCS):
        inside = path.relative_to(DOCS).as_posix()
        return f"{inside}/README.md".removeprefix("./") if path.is_dir() else inside
    name = f"{FOLDER}/{path.relative_to(ROOT).as_posix()}"
    if path.is_dir():
        return f"{name}/README.md"
    return name if path.suffix in {".md", ".svg", ".png"} else f"{name}.md"


def write_page(path: Path) -> str:
    """The text of the page that stands for a file or folder outside of docs/."""
    title = f"# {path.relative_to(ROOT).as_posix()}\n\n"
    if path.is_dir():
        return title + "".join(f"- `{each.name}`\n" for each in sorted(path.iterdir()) if each.is_file())
    text = path.read_text("utf-8")
    if path.suffix == ".md":
        return lead_links(text, path, name_page(path))
    return f"{title}````{FENCES.get(path.suffix, 'text')}\n{text.rstrip()}\n````\n"


def lead_links(text: str, source: Path, page: str) -> str:
    """The text of a file with its links to other files of the repository as they are from its page on the site."""

    def lead(match: re.Match[str]) -> str:
        path = (source.parent / match[1]).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            return match[0]
        return f"]({relpath(name_page(path), Path(page).parent.as_posix())}{match[2] or ''})"

    return LINK.sub(lead, text)
