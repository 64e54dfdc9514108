"""The one way to tell a person what is wrong in what they wrote: a path, a message, the known choices.

The resource, the agent's and the gateway's configuration and their control routes all report through it. The rows come
from pydantic's `ValidationError.errors()`, which are plain dicts: nothing of pydantic is imported here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

Location = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One error: `path` in dotted form (`spec.engine.replicas`, `engines[0].url`; empty for the whole document)."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class InvalidInput(ValueError):  # noqa: N818 - named for what it says, not for being an error
    """What was given cannot be used; `problems` has at least one row and nothing was changed."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


def render_path(location: Location) -> str:
    """`("engines", 0, "url")` -> `engines[0].url`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return path


def render_choices(known: Iterable[str]) -> str:
    """The known choices in alphabetical order, as one phrase."""
    return ", ".join(sorted(known))


def unknown_choice(path: str, value: object, known: Iterable[str]) -> Problem:
    """A value outside a closed set."""
    return Problem(path, f"unknown {value!r}; known: {render_choices(known)}")


def unknown_field(path: str, name: str, known: Iterable[str]) -> Problem:
    """A key that the section does not have, with the nearest that it does have where one is near."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    nearest = f"nearest known: {near[0]}; " if near else ""
    return Problem(path, f"unknown field; {nearest}known: {', '.join(names)}")


def problems_from_errors(
    errors: Iterable[Mapping[str, Any]], fields_at: Callable[[Location], Iterable[str]], root: str = ""
) -> list[Problem]:
    """Turns rows of pydantic's `ValidationError.errors()` into problems, in the order of their paths.

    Args:
        errors: rows with `type`, `loc`, `msg`, `input` and perhaps `ctx`.
        fields_at: the names of the fields that the section at a location has (as a person writes them).
        root: a path before all others, such as `spec`.
    """
    return sorted({_problem(row, fields_at, root) for row in errors})


def _problem(row: Mapping[str, Any], fields_at: Callable[[Location], Iterable[str]], root: str) -> Problem:
    location: Location = tuple(row["loc"])
    path = render_path((root, *location) if root else location)
    context = row.get("ctx") or {}
    match row["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            return unknown_field(path, str(location[-1]), fields_at(location[:-1]))
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return Problem(path, "required, but absent")
        case "enum" | "literal_error":
            return Problem(path, f"unknown {row['input']!r}; known: {_choices(str(context['expected']))}")
        case "value_error":
            return Problem(path, str(context["error"]))
        case _:
            return Problem(path, f"{_lower_first(row['msg'])}, got {_shorten(row['input'])}")


def _choices(expected: str) -> str:
    """Pydantic words a closed set as `'a', 'b' or 'c'`."""
    return render_choices(part.strip().strip("'") for part in expected.replace(" or ", ", ").split(","))


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
