"""How a command prints what it found: as a table, or as a document for programs."""

import json
import sys
from enum import StrEnum
from typing import Annotated, Any

import typer
import yaml

# A file or pipe has no width; a table there has room for whole names.
FILE_WIDTH = 160
# An engine's name in a table of 80 columns.
NAME_WIDTH = 24


class OutputFormat(StrEnum):
    """The forms of `--output`; `wide` is the table with all its columns."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"


Output = Annotated[OutputFormat, typer.Option("--output", "-o", help="For people or for programs.")]
AsJson = Annotated[bool, typer.Option("--json", help="The same as `--output json`.")]


def is_document(output: OutputFormat) -> bool:
    """Whether a program reads the output."""
    return output in (OutputFormat.JSON, OutputFormat.YAML)


def choose_format(output: OutputFormat, *, as_json: bool) -> OutputFormat:
    """The format of the two options; `--json` wins."""
    return OutputFormat.JSON if as_json else output


def print_document(document: Any, output: OutputFormat) -> None:
    """Prints a document of JSON's types as JSON or YAML; letters that the output may lack are escaped."""
    has_all = "utf" in (sys.stdout.encoding or "").lower()
    if output is OutputFormat.YAML:
        # As JSON has it: a name of a closed set is a text.
        plain = json.loads(json.dumps(document))
        typer.echo(yaml.safe_dump(plain, sort_keys=False, allow_unicode=has_all), nl=False)
    else:
        typer.echo(json.dumps(document, indent=2, ensure_ascii=not has_all))


def print_table(*tables: Any) -> None:
    """Prints tables and texts of rich; a terminal's width bounds them, a file's does not."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False)
    for table in tables:
        console.print(table)


def shorten(name: str, width: int = NAME_WIDTH) -> str:
    """A name of at most `width` letters: its end tells pods apart, so the middle is left out."""
    if len(name) <= width:
        return name
    head = width // 3
    return f"{name[:head]}…{name[-(width - head - 1) :]}"
