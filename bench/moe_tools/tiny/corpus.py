"""Text that every machine with Python has: docstrings, language reference, licences and sources.

The tokenizer and the weights of the tiny model are trained on it, and the replay builds its prompts from it. The text
depends on the installed Python alone; the order of the documents is fixed.
"""

import ast
import itertools
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

LICENCES = Path("/usr/share/common-licenses")
SOURCE_FILES = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionAndAnswer:
    """A question about a name of the standard library, and the answer its docstring gives."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents by kind; each is non-empty text."""

    prose: tuple[str, ...]
    sources: tuple[str, ...]
    exchanges: tuple[QuestionAndAnswer, ...]


def read_corpus() -> Corpus:
    """Reads the standard library's top-level modules, the language reference and the licences."""
    modules = {path.stem: path.read_text("utf-8", errors="replace") for path in _module_files()}
    documented = [pair for name, source in modules.items() for pair in parse_docstrings(source, _shown_name(name))]
    prose = [*read_prose(), *(text for _, text in documented if len(text) > 200)]
    return Corpus(
        prose=tuple(prose),
        sources=tuple(itertools.islice(_longest_first(modules.values()), SOURCE_FILES)),
        exchanges=tuple(build_exchanges(documented)),
    )


def read_prose() -> list[str]:
    """The language reference and the licences; where a machine has neither, the sources themselves."""
    texts = [*_reference_topics(), *_licence_texts()]
    return texts or [path.read_text("utf-8", errors="replace") for path in _module_files()]


def parse_docstrings(source: str, module: str) -> list[tuple[str, str]]:
    """(dotted name, docstring) of each documented public class, function and method, in the order of the file."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    return list(_walk_docstrings(tree, f"{module}."))


def build_exchanges(documented: Iterable[tuple[str, str]]) -> Iterator[QuestionAndAnswer]:
    """Questions in a few wordings, answered by the docstring's first paragraph."""
    wordings = ("What does {} do?", "Explain {}.", "What is {}?", "How do I use {} in Python?")
    for index, (name, text) in enumerate(documented):
        answer = " ".join(text.split("\n\n")[0].split())
        if 20 <= len(answer) <= 400:
            yield QuestionAndAnswer(question=wordings[index % len(wordings)].format(name), answer=answer)


def _walk_docstrings(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            name = f"{prefix}{child.name}"
            if text := ast.get_docstring(child):
                yield name, text
            yield from _walk_docstrings(child, f"{name}.")


def _module_files() -> list[Path]:
    """Public top-level modules: they are on every machine, while Debian packs some sub-packages apart."""
    return sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))


def _shown_name(module: str) -> str:
    return {"posixpath": "os.path"}.get(module, module)


def _longest_first(sources: Iterable[str]) -> list[str]:
    return sorted(sources, key=len, reverse=True)


def _reference_topics() -> list[str]:
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:
        return []
    return [topics[name] for name in sorted(topics)]


def _licence_texts() -> list[str]:
    files = sorted(path for path in LICENCES.glob("*") if path.is_file() and not path.is_symlink())
    return [path.read_text("utf-8", errors="replace") for path in files]
