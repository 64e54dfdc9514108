"""The commands that the pages show: their blocks, split into simple commands. Pure; no command is run here."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

SHELL = frozenset(("console", "bash", "sh", "shell"))
# First words of a block without a language that make it one of commands.
PROGRAMS = frozenset(
    ("make", "moeserving", "kubectl", "helm", "curl", "pip", "python", ".venv/bin/python", ".venv/bin/moeserving")
)
SEPARATORS = frozenset(("|", "||", "&", "&&", ";"))
# Immediately before a block: why no test runs or checks its commands.
MARK = re.compile(r"<!-- not checked: (\S.*?) -->\s*$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A code block of a page: its place, language, text, and the reason for which it is not checked."""

    place: str
    language: str
    text: str
    reason: str | None

    @property
    def is_shell(self) -> bool:
        """Whether it has commands."""
        if self.language or not self.text.strip():
            return self.language in SHELL
        return self.text.split()[0] in {*PROGRAMS, "$"}


def read_blocks(page: Path, root: Path) -> list[Block]:
    """All code blocks of a page, fenced and indented ones."""
    lines = page.read_text("utf-8").splitlines()
    return [
        Block(
            place=f"{page.relative_to(root)}:{token.map[0] + 1}",
            language=token.info.strip().split(" ")[0],
            text=token.content,
            reason=find_reason(lines[: token.map[0]]),
        )
        for token in tokens_of(page)
        if token.type in ("fence", "code_block") and token.map
    ]


def tokens_of(page: Path) -> list[Token]:
    """The page as a code host reads it."""
    return MarkdownIt("commonmark").enable("table").parse(page.read_text("utf-8"))


def find_reason(before: list[str]) -> str | None:
    """The reason in the mark that ends the lines before a block."""
    text = "\n".join(before).rstrip()
    found = MARK.search(text.splitlines()[-1]) if text else None
    return found[1] if found else None


def read_inline(page: Path) -> Iterator[str]:
    """Texts of a page that stand as code within a sentence or table."""
    for token in tokens_of(page):
        for child in token.children or ():
            if child.type == "code_inline":
                yield child.content


def split_block(text: str) -> list[list[str]]:
    """The simple commands of a block, each as its words, without prompts, comments and output."""
    joined = text.replace("\\\n", " ")
    rows = joined.splitlines()
    if any(row.startswith("$ ") for row in rows):
        rows = [row[2:] for row in rows if row.startswith("$ ")]
    return [command for row in rows for command in split_row(row)]


def split_row(row: str) -> Iterator[list[str]]:
    """The simple commands of a line."""
    reader = shlex.shlex(row, posix=True, punctuation_chars="|&;")
    reader.whitespace_split, reader.commenters = True, "#"
    command: list[str] = []
    for word in (*reader, ";"):
        if word not in SEPARATORS:
            command.append(word)
        elif command:
            yield command
            command = []


def is_yaml(text: str) -> bool:
    """Whether a block is a part of a YAML or JSON document."""
    try:
        return isinstance(yaml.safe_load(text), dict | list)
    except yaml.YAMLError:
        return False
