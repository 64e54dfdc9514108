"""The TypeScript types of the live page, generated from the contract's classes.

`python -m moe_contract.typescript --write` replaces the file, and `--check` ends with status 1 where it differs
(`make generate`, `make verify`). The way is pydantic's JSON schema, of whose forms the classes of the page use few.
"""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from moe_contract.generated_files import read_choice, write_or_check
from moe_contract.live_page import EVENTS

FILE = Path("gateway/ui/src/contract.ts")
_HEAD = "// Generated from contract/moe_contract/live_page.py by `make generate`.\n"
_PLAIN = {"string": "string", "integer": "number", "number": "number", "boolean": "boolean", "null": "null"}

Schema = dict[str, Any]


def render_types() -> str:
    """The whole file: an interface for each class, and the events by name.

    Raises:
        ValueError: a class has a type for which there is no rule here.
    """
    adapters: list[Any] = [(name, "serialization", TypeAdapter(document)) for name, document in EVENTS.items()]
    _, schema = TypeAdapter.json_schemas(adapters)
    classes: dict[str, Schema] = schema["$defs"]
    events = "".join(f"  {name}: {document.__name__};\n" for name, document in EVENTS.items())
    return "\n".join([_HEAD, *_render_classes(classes), f"export interface Events {{\n{events}}}\n"])


def _render_classes(classes: dict[str, Schema]) -> Iterator[str]:
    for name, schema in sorted(classes.items()):
        summary = inspect.cleandoc(schema.get("description", "")).partition("\n")[0]
        fields = "".join(f"  {field}: {_render_type(row)};\n" for field, row in schema["properties"].items())
        yield f"/** {summary} */\nexport interface {name} {{\n{fields}}}\n"


def _render_type(schema: Schema) -> str:
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "enum" in schema:
        return " | ".join(f'"{choice}"' for choice in schema["enum"])
    if "anyOf" in schema:
        return " | ".join(map(_render_type, schema["anyOf"]))
    if schema.get("type") == "array":
        return f"readonly {_render_type(schema['items'])}[]"
    if schema.get("type") in _PLAIN:
        return _PLAIN[schema["type"]]
    raise ValueError(f"no TypeScript type is known for {schema}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line, and returns its exit status."""
    choice = read_choice(arguments, program="python -m moe_contract.typescript", description=f"The types in {FILE}.")
    return write_or_check({FILE: render_types()}, choice)


if __name__ == "__main__":
    sys.exit(main())
