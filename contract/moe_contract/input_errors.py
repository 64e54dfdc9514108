"""Errors in input: a path, a message, the known choices.

The resource, the configuration of agent and gateway, and their control routes all report through them. The rows come
from pydantic's `ValidationError.errors()`, which are plain dicts: pydantic is not imported here.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

Location = tuple[str | int, ...]

# Pydantic ends the location of an error below a union with the name of the member that was tried.
_UNION_MEMBERS = frozenset({"bool", "bytes", "float", "int", "none", "str"})


@dataclass(frozen=True, slots=True, order=True)
class InputError:
    """One error in a document.

    Attributes:
        path: of the field in dotted form (`spec.engine.replicas`, `engines[0].url`); empty for the whole document.
        message: the error and the allowed values.
    """

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class InvalidInput(ValueError):
    """Input that cannot be used; nothing was changed.

    Attributes:
        errors: at least one row.
    """

    def __init__(self, errors: Sequence[InputError]) -> None:
        super().__init__("\n".join(map(str, errors)))
        self.errors = tuple(errors)


def error_document(errors: Iterable[InputError]) -> dict[str, list[dict[str, str]]]:
    """The body of an HTTP answer that refuses: `{"errors": [{"path": ..., "message": ...}]}`."""
    return {"errors": [{"path": row.path, "message": row.message} for row in errors]}


def read_error_document(document: object) -> tuple[InputError, ...]:
    """The rows of such a body.

    Raises:
        ValueError: it has another form.
    """
    try:
        rows = document["errors"]  # type: ignore[index]
        return tuple(InputError(str(row["path"]), str(row["message"])) for row in rows)
    except (TypeError, KeyError, IndexError):
        raise ValueError("no error document") from None


def render_path(location: Location) -> str:
    """`("engines", 0, "url")` -> `engines[0].url`; unprintable characters are escaped (`\\n`)."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            name = _escape_unprintable(part) or "''"
            path += f".{name}" if path else name
    return path


def render_choices(known: Iterable[str]) -> str:
    """The known choices in alphabetical order, as one phrase."""
    return ", ".join(sorted(known))


def unknown_choice(path: str, value: object, known: Iterable[str]) -> InputError:
    """The error for a value outside a closed set."""
    return InputError(path, f"unknown {_shorten(value)}; known: {render_choices(known)}")


def unknown_field(path: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a key that the section does not have, with the nearest known name where one is near."""
    names = sorted(known)
    # No field has a longer name, and the search takes quadratic time.
    near = get_close_matches(name[:100], names, n=1, cutoff=0.5)
    nearest = f"nearest known: {near[0]}; " if near else ""
    return InputError(path, f"unknown field; {nearest}known: {', '.join(names)}")


def errors_from_pydantic(
    errors: Iterable[Mapping[str, Any]], fields_at: Callable[[Location], Iterable[str]], root: str = ""
) -> list[InputError]:
    """Rows of pydantic's `ValidationError.errors()` as input errors, sorted by path.

    Args:
        errors: rows with `type`, `loc`, `msg`, `input` and perhaps `ctx`.
        fields_at: the names of the fields that the section at a location has, as the document spells them.
        root: a path before all others, such as `spec`.
    """
    return sorted({_input_error(row, fields_at, root) for row in errors})


def _input_error(row: Mapping[str, Any], fields_at: Callable[[Location], Iterable[str]], root: str) -> InputError:
    location: Location = tuple(row["loc"])
    is_unknown_field = row["type"] in {"extra_forbidden", "unexpected_keyword_argument"}
    # The last part of an unknown field's location is its name, even where that is spelt like a type.
    if (
        location
        and not is_unknown_field
        and location[-1] in _UNION_MEMBERS
        and location[-1] not in fields_at(location[:-1])
    ):
        location = location[:-1]
    is_key = bool(location) and location[-1] == "[key]"
    if is_key:
        location = location[:-1]
    path = render_path((root, *location) if root else location)
    context = row.get("ctx") or {}
    match row["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            return unknown_field(path, str(location[-1]), fields_at(location[:-1]))
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return InputError(path, "required, but absent")
        case "enum" | "literal_error":
            return unknown_choice(path, row["input"], _choices(str(context["expected"])))
        case "model_type" | "dataclass_type" | "dict_type" | "mapping_type" | "list_type" | "tuple_type" as kind:
            needed = "a list" if kind in {"list_type", "tuple_type"} else "a mapping of fields"
            return InputError(path, f"{needed} is needed, got {_shorten(row['input'])}")
        case "value_error":
            return InputError(path, str(context["error"]))
        case _:
            subject = "as a key, " if is_key else ""
            return InputError(path, f"{subject}{_lower_first(row['msg'])}, got {_shorten(row['input'])}")


def _choices(expected: str) -> list[str]:
    """The values in pydantic's text of a closed set: `'a', 'b' or 'c'`, or `1, 2 or 3` for numbers."""
    return re.findall(r"'([^']*)'", expected) or expected.replace(" or ", ", ").split(", ")


def _escape_unprintable(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
