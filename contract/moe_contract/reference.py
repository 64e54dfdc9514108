"""The tables of docs/interfaces.md, generated from the types of this room.

`python -m moe_contract.reference --write` replaces each block between `<!-- generated: NAME -->` and `<!-- end -->` in
the page, and `--check` ends with status 1 where one differs (`make generate`, `make verify`). A field's meaning is that
of the class docstring's `Attributes`, or of its declaration with `moe_scheduling.settings.setting`.
"""

import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path, PurePath
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from moe_scheduling.engine.choice import EngineSettings
from moe_scheduling.expert.settings import ExpertSettings
from moe_scheduling.request.order import RequestSettings
from moe_scheduling.settings import declared_settings
from moe_scheduling.signals import EngineSignal
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from moe_contract.agent_config import AgentConfig
from moe_contract.agent_state import AgentState
from moe_contract.documents import section_in
from moe_contract.experts_state import ExpertsState
from moe_contract.gateway_config import GatewayConfig
from moe_contract.gateway_state import GatewayState
from moe_contract.generated_files import read_choice, write_or_check
from moe_contract.request_record import RequestRecord

PAGE = Path("docs/interfaces.md")
DOCUMENTS: dict[str, type] = {
    "agent_config": AgentConfig,
    "agent_state": AgentState,
    "gateway_config": GatewayConfig,
    "gateway_state": GatewayState,
    "request_record": RequestRecord,
    "experts_state": ExpertsState,
    "request_settings": RequestSettings,
    "engine_settings": EngineSettings,
    "expert_settings": ExpertSettings,
    "engine_signal": EngineSignal,
}
# Sections with a table of their own, each under a heading of this name.
_SHARED: dict[type, str] = {
    RequestSettings: "RequestSettings",
    EngineSettings: "EngineSettings",
    ExpertSettings: "ExpertSettings",
    EngineSignal: "EngineSignal",
}
_BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldRow:
    """One field of a table: its path, type, default and meaning as Markdown."""

    path: str
    kind: str
    default: str
    meaning: str


def render_page(text: str) -> str:
    """The page with all its generated blocks new.

    Raises:
        KeyError: a block has an unknown name.
    """
    return _BLOCK.sub(lambda match: match[1] + render_table(DOCUMENTS[match[2]]) + match[3], text)


def render_table(document: type) -> str:
    """The Markdown table of a document's fields, those of its sections included."""
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for row in _rows(document, ""):
        cells = (f"`{row.path}`", row.kind, row.default, row.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _rows(section: type, before: str) -> Iterator[FieldRow]:
    meanings = _meanings(section)
    for name, (annotation, default) in _fields(section).items():
        inner = section_in(annotation) or _lenient(annotation)
        path = before + name + ("[]" if _is_list(annotation) else "")
        kind = _kind(annotation) if inner is None else ("list of sections" if _is_list(annotation) else "section")
        if inner in _SHARED:
            kind = f"[{_SHARED[inner]}](#{_SHARED[inner].lower()})"
        yield FieldRow(path=path, kind=kind, default="" if inner else _default(default), meaning=meanings.get(name, ""))
        if inner is not None and inner not in _SHARED:
            yield from _rows(inner, f"{path}.")


def _fields(section: type) -> dict[str, tuple[Any, Any]]:
    """Annotation and default (`MISSING`: required) of each field."""
    if issubclass(section, BaseModel):
        return {
            name: (row.annotation, MISSING if row.is_required() else row.get_default(call_default_factory=True))
            for name, row in section.model_fields.items()
        }
    assert is_dataclass(section)
    hints = get_type_hints(section, include_extras=True)
    return {row.name: (hints[row.name], row.default) for row in fields(section)}


def _meanings(section: type) -> dict[str, str]:
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        text = inspect.cleandoc(base.__doc__ or "")
        if "Attributes:" in text:
            part = text.partition("Attributes:\n")[2].partition("\n\n")[0]
            rows = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", part, re.MULTILINE)
            found |= {name: " ".join(meaning.split()) for name, meaning in rows}
    if is_dataclass(section):
        found |= {row.name: declared.meaning for row, declared in declared_settings(section)}
    return found


def _lenient(annotation: Any) -> type | None:
    """The section in `Annotated[Section | None, ...]`."""
    return section_in(get_args(annotation)[0]) if hasattr(annotation, "__metadata__") else None


def _is_list(annotation: Any) -> bool:
    choices = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return any(get_origin(choice) is tuple and section_in(choice) is not None for choice in choices)


def _kind(annotation: Any) -> str:
    if hasattr(annotation, "__metadata__"):
        return _kind(get_args(annotation)[0])
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join("null" if choice is type(None) else _kind(choice) for choice in arguments)
    if origin is tuple:
        return f"list of {_kind(arguments[0])}s" if get_origin(arguments[0]) is not tuple else "nested lists"
    if origin is dict:
        return f"map of {_kind(arguments[1])}s"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{choice.value}`" for choice in annotation)
    return "path" if annotation is Path else _NAMES.get(annotation, "value")


def _default(value: Any) -> str:
    if value is MISSING or value is PydanticUndefined:
        return "required"
    if value in (None, (), {}, ""):
        return ""
    plain = value.value if isinstance(value, Enum) else str(value) if isinstance(value, PurePath) else value
    return f"`{plain if isinstance(plain, str) else json.dumps(plain)}`"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line, and returns its exit status."""
    choice = read_choice(arguments, program="python -m moe_contract.reference", description=f"The tables of {PAGE}.")
    return write_or_check({PAGE: render_page((choice.root / PAGE).read_text(encoding="utf-8"))}, choice)


if __name__ == "__main__":
    sys.exit(main())
