"""Documents that other people or processes wrote: read a file, parse JSON, validate with a pydantic model.

Used by the loaders of the agent's and the gateway's configuration, by the control routes and by the operator. Each
failure is an `InvalidInput` whose rows name the path of the field and, for an unknown name, the nearest known one.
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import orjson
from pydantic import BaseModel, ValidationError

from moe_contract.input_errors import InputError, InvalidInput, Location, errors_from_pydantic

Model = TypeVar("Model", bound=BaseModel)


def read_file(path: Path, field: str) -> bytes:
    """The bytes of a file.

    Args:
        path: the file.
        field: path of the configuration field that names it, for the error.

    Raises:
        InvalidInput: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput([InputError(field, f"cannot read {path}: {error.strerror}")]) from None
    except ValueError:
        raise InvalidInput([InputError(field, f"no file can be named {str(path)!r}")]) from None


def read_optional_file(path: Path, field: str) -> bytes | None:
    """The bytes of a file, None where it does not exist.

    Raises:
        InvalidInput: it exists and cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return read_file(path, field)


def parse_document(text: bytes) -> object:
    """The value of a JSON text.

    Raises:
        InvalidInput: the text is not JSON; the message names the place.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidInput([InputError("", f"not JSON: {error}")]) from None


def parse_model(model: type[Model], document: object) -> Model:
    """A JSON object as a pydantic model.

    Raises:
        InvalidInput: one row for each wrong field; an unknown name comes with the nearest known one.
    """
    if not isinstance(document, dict):
        raise InvalidInput([InputError("", f"a JSON object is needed, got {type(document).__name__}")])
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise invalid_input(model, error) from None


def invalid_input(model: type[BaseModel], error: ValidationError) -> InvalidInput:
    """Pydantic's error about a document of this model as rows of input errors."""
    rows = error.errors(include_url=False)
    return InvalidInput(errors_from_pydantic(rows, lambda location: list(fields_at(model, location))))


def fields_at(root: type, location: Location) -> Iterator[str]:
    """Names, as the document has them, of the fields of the section at `location`; none where it is no section.

    Args:
        root: a pydantic model or a dataclass.
        location: field names and list indices below it.
    """
    section: type | None = root
    for part in location:
        if isinstance(part, int) or section is None:
            continue
        section = section_in(dict(_fields_of(section)).get(part))
    if section is not None:
        yield from (name for name, _ in _fields_of(section))


def section_in(annotation: object) -> type | None:
    """The model or dataclass that a field of this type holds: itself, optional, or as the items of a tuple."""
    if isinstance(annotation, type) and (is_dataclass(annotation) or issubclass(annotation, BaseModel)):
        return annotation
    if get_origin(annotation) in (Union, UnionType, tuple):
        return next((found for found in map(section_in, get_args(annotation)) if found), None)
    return None


def _fields_of(section: type) -> Iterator[tuple[str, Any]]:
    if issubclass(section, BaseModel):
        yield from ((field.alias or name, field.annotation) for name, field in section.model_fields.items())
    elif is_dataclass(section):
        yield from ((field.name, field.type) for field in fields(section))
