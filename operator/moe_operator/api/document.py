"""Reads the one YAML document of a file into plain values, or says in one line a reason why that cannot be.

Called with files that people wrote, so it trusts nothing: size, depth and what aliases expand to are bounded before a
value is built, and only YAML's plain types are built.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml
from moe_contract.input_errors import InputError, InvalidInput

MAX_BYTES = 1024 * 1024
MAX_VALUES = 100_000
MAX_DEPTH = 64

_MERGE_TAG = "tag:yaml.org,2002:merge"
_STRING_TAG = "tag:yaml.org,2002:str"
# What YAML 1.1 reads as a date, or as a number to the base of 60, is a text for Kubernetes' own readers.
_TEXT_FOR_KUBERNETES = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_DATE_TAG = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """Reads plain scalars as `kubectl` does."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """The tag of a node without one."""
        tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        is_text = tag == _DATE_TAG or (kind is yaml.ScalarNode and _TEXT_FOR_KUBERNETES.fullmatch(value))
        return _STRING_TAG if implicit and is_text else tag


def load_document(path: Path) -> object:
    """The document in a file.

    Raises:
        InvalidInput: the file cannot be read, or does not hold exactly one sane YAML document.
    """
    return parse_document(_read(path), str(path))


def parse_document(data: bytes | str, name: str) -> object:
    """The document in a text; `name` stands in the errors."""
    try:
        loader = _Loader(data)
    except yaml.YAMLError as error:
        _refuse(name, _describe(error))
    try:
        node = _only_node(loader, name)
        errors = [*_check_expansion(node, name)] or [*_check_keys(node), *_check_texts(node, name)]
        if errors:
            raise InvalidInput(errors)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        _refuse(name, _describe(error))
    except RecursionError:
        _refuse(name, f"values are nested more than {MAX_DEPTH} deep")
    except (ValueError, OverflowError) as error:
        if isinstance(error, InvalidInput):
            raise
        _refuse(name, f"holds a value that cannot be read: {error}")
    finally:
        loader.dispose()


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        _refuse(str(path), "no such file")
    except IsADirectoryError:
        _refuse(str(path), "is a folder, not a file")
    except (OSError, ValueError) as error:
        _refuse(str(path), f"cannot be read: {getattr(error, 'strerror', None) or error}")
    if len(data) > MAX_BYTES:
        _refuse(str(path), f"is larger than {MAX_BYTES} bytes")
    return data


def _only_node(loader: yaml.SafeLoader, name: str) -> yaml.Node:
    nodes = []
    while loader.check_node():
        node = loader.get_node()
        if node is not None and node.tag != "tag:yaml.org,2002:null":
            nodes.append(node)
        if len(nodes) > 1:
            _refuse(name, f"holds more than one document (the second at line {nodes[1].start_mark.line + 1})")
    if not nodes:
        _refuse(name, "is empty")
    return nodes[0]


def _check_expansion(root: yaml.Node, name: str) -> Iterator[InputError]:
    """Aliases make a graph of the document: its size as a tree is counted here without walking that tree."""
    counts: dict[int, int] = {}

    def count(node: yaml.Node, depth: int) -> int:
        if id(node) in counts:
            return counts[id(node)]
        if depth > MAX_DEPTH:
            raise RecursionError
        counts[id(node)] = MAX_VALUES + 1  # a node that contains itself expands without end
        counts[id(node)] = 1 + sum(count(child, depth + 1) for child in _children(node))
        return counts[id(node)]

    if count(root, 0) > MAX_VALUES:
        yield InputError(name, f"expands to more than {MAX_VALUES} values")


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _check_keys(node: yaml.Node, path: str = "") -> Iterator[InputError]:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _check_keys(item, f"{path}[{index}]")
    if not isinstance(node, yaml.MappingNode):
        return
    first_lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag == _MERGE_TAG:
            continue
        if key.tag != _STRING_TAG or not isinstance(key, yaml.ScalarNode):
            shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            yield InputError(path, f"a key must be a string, got {shown:.80} at line {line}")
            continue
        below = f"{path}.{key.value}" if path else key.value
        if key.value in first_lines:
            yield InputError(below, f"stands twice, at lines {first_lines[key.value]} and {line}")
        first_lines.setdefault(key.value, line)
        yield from _check_keys(value, below)


def _check_texts(root: yaml.Node, name: str) -> Iterator[InputError]:
    """Escapes can write half of a character, which no JSON can hold."""
    seen, waiting = set[int](), [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        waiting += _children(node)
        if isinstance(node, yaml.ScalarNode) and any("\ud800" <= char <= "\udfff" for char in node.value):
            yield InputError(name, f"holds half of a character at line {node.start_mark.line + 1}")


def _describe(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        return "is not text in UTF-8"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        context = f"{error.context}: " if error.context else ""
        return f"is not YAML: {context}{error.problem} at line {error.problem_mark.line + 1}"
    return "is not YAML"


def _refuse(name: str, message: str) -> NoReturn:
    raise InvalidInput([InputError(name, message)])
