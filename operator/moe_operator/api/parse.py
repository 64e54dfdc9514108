"""Documents to resources and back: the one door through which a MoEServing enters, from a file or the command line.

All errors are `moe_contract.input_errors.InvalidInput`. Reading a written resource gives an equal one.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from moe_contract.documents import invalid_input
from moe_contract.input_errors import InputError, InvalidInput, unknown_choice
from pydantic import ValidationError

from moe_operator.api.document import load_document, parse_document
from moe_operator.api.resource import API_VERSION, KIND, MoEServing

# Further metadata of an object of Kubernetes, most of it the server's: it says nothing about the deployment.
_OTHER_METADATA = frozenset(
    (
        "creationTimestamp",
        "deletionGracePeriodSeconds",
        "deletionTimestamp",
        "finalizers",
        "generateName",
        "generation",
        "managedFields",
        "ownerReferences",
        "resourceVersion",
        "selfLink",
        "uid",
    )
)


def load_resource(path: Path) -> MoEServing:
    """The resource in a YAML file, a relative `file://` of its model made absolute against the file's folder.

    Raises:
        InvalidInput: the file cannot be read, or is no valid resource.
    """
    return parse_resource_of(path, load_document(path))


def parse_resource_of(path: Path, document: object) -> MoEServing:
    """The resource in the document of a file, which was read already.

    Raises:
        InvalidInput: the document is no valid resource.
    """
    return _with_absolute_uri(parse_resource(document), path.absolute().parent)


def parse_resource(document: object) -> MoEServing:
    """The resource in a document, as a person writes it or as a cluster gives it.

    Raises:
        InvalidInput: the document is no valid resource.
    """
    if not isinstance(document, Mapping):
        raise InvalidInput(
            [InputError("", f"a mapping with apiVersion, kind, metadata and spec is needed, got {_kind(document)}")]
        )
    if errors := _check_header(document):
        raise InvalidInput(errors)
    try:
        return MoEServing.model_validate(_written_part(document), by_alias=True, by_name=False)
    except ValidationError as error:
        raise invalid_input(MoEServing, error) from None


def resource_document(resource: MoEServing) -> dict[str, Any]:
    """The document of a resource: its set fields, without defaults."""
    return resource.model_dump(mode="json", by_alias=True, exclude_unset=True)


def dump_resource(resource: MoEServing) -> str:
    """The YAML of a resource: its set fields, without defaults."""
    return yaml.safe_dump(resource_document(resource), sort_keys=False, allow_unicode=True)


def set_field(document: Mapping[str, Any], assignment: str) -> dict[str, Any]:
    """A copy of a valid document in which `PATH=VALUE` holds, PATH below `spec` and VALUE as YAML; null takes it back.

    Raises:
        InvalidInput: the assignment has another form, names an unknown field, or makes the document invalid.
    """
    path, separator, text = assignment.partition("=")
    if not separator or not all(path.split(".")):
        raise InvalidInput(
            [InputError("", f"PATH=VALUE is needed, such as scheduling.request.policy=fcfs, got {assignment!r}")]
        )
    changed = _with_value(document, path, _parse_value(text))
    try:
        parse_resource(changed)
    except InvalidInput:
        # YAML reads a text such as `on` or `10` as another type; where a string is needed it is meant as written.
        as_text = _with_value(document, path, text)
        if _is_valid(as_text):
            return as_text
        raise
    return changed


def _written_part(document: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The document without what the API server wrote: metadata of any object, and the status of one that it has."""
    metadata = document.get("metadata")
    if not isinstance(metadata, Mapping):
        return document
    is_live = isinstance(metadata.get("uid"), str)
    written = {name: value for name, value in metadata.items() if name not in _OTHER_METADATA}
    parts = {name: value for name, value in document.items() if not (is_live and name == "status")}
    return parts | {"metadata": written}


def _check_header(document: Mapping[Any, Any]) -> list[InputError]:
    """An error that names the kind, for a document of another kind, in place of one for each of its fields."""
    return [
        unknown_choice(name, document[name], [known])
        for name, known in (("apiVersion", API_VERSION), ("kind", KIND))
        if document.get(name) is not None and document[name] != known
    ]


def _kind(document: object) -> str:
    match document:
        case list() | tuple():
            return "a list"
        case None:
            return "nothing"
        case _:
            return f"{document!r:.80}"


def _parse_value(text: str) -> object:
    try:
        return parse_document(text, "VALUE")
    except InvalidInput:
        return None if text.strip() in ("null", "~") else text


def _with_value(document: Mapping[str, Any], path: str, value: object) -> dict[str, Any]:
    changed: dict[str, Any] = deepcopy(dict(document))
    *sections, last = ("spec", *path.split("."))
    section = changed
    for depth, name in enumerate(sections):
        if not isinstance(section.get(name), dict):
            if section.get(name) is not None:
                raise InvalidInput([InputError(".".join(sections[: depth + 1]), f"has no field {last!r}")])
            section[name] = {}
        section = section[name]
    if value is None and last in section:
        del section[last]
    else:
        section[last] = value
    return changed


def _is_valid(document: dict[str, Any]) -> bool:
    try:
        parse_resource(document)
    except InvalidInput:
        return False
    return True


def _with_absolute_uri(resource: MoEServing, folder: Path) -> MoEServing:
    model = resource.spec.model
    scheme, _, path = model.uri.partition("://")
    if scheme != "file" or path.startswith("/"):
        return resource
    absolute = model.model_copy(update={"uri": f"file://{(folder / path).resolve()}"})
    return resource.model_copy(update={"spec": resource.spec.model_copy(update={"model": absolute})})
