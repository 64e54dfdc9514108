"""What a person or a peer wrote, turned into configuration or into problems: the file and the control body."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import orjson
from moe_scheduling.engine import EngineSettings
from moe_scheduling.problems import InvalidInput, Location, Problem, problems_from_errors
from moe_scheduling.request import RequestSettings
from pydantic import BaseModel, ConfigDict, ValidationError

from moe_gateway.config import EngineAddress, GatewayConfig

Model = TypeVar("Model", bound=BaseModel)


class _Change(BaseModel):
    """Body of `PUT /v1/config`, once the fields that it leaves out were filled in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dispatch: EngineSettings
    request: RequestSettings
    engines: tuple[EngineAddress, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class InForce:
    """What the control route can change."""

    dispatch: EngineSettings
    request: RequestSettings
    engines: tuple[EngineAddress, ...]

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "dispatch": asdict(self.dispatch),
            "request": asdict(self.request),
            "engines": [address.model_dump() for address in self.engines],
        }


def load_config(path: Path) -> GatewayConfig:
    """Reads the gateway's file.

    Raises:
        InvalidInput: it cannot be read or is no valid configuration.
    """
    config = parse_model(GatewayConfig, parse_document(read_file(path, "file")))
    _check_names(config.engines)
    return config


def load_token(path: Path) -> bytes:
    """The control token.

    Raises:
        InvalidInput: the file cannot be read or is empty.
    """
    if token := read_file(path, "token_file").strip():
        return token
    raise InvalidInput([Problem("token_file", f"{path} is empty")])


def read_file(path: Path, problem_path: str) -> bytes:
    """The file's bytes, or `InvalidInput` that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput([Problem(problem_path, f"cannot read {path}: {error.strerror}")]) from None
    except ValueError:
        raise InvalidInput([Problem(problem_path, f"no file can be named {str(path)!r}")]) from None


def parse_document(text: bytes) -> object:
    """JSON, or `InvalidInput` that says where it ends to be JSON."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidInput([Problem("", f"not JSON: {error}")]) from None


def parse_change(document: object, current: InForce) -> InForce:
    """What a control body asks for; what it leaves out keeps its value.

    Raises:
        InvalidInput: the body is not valid, and nothing of it is used.
    """
    if isinstance(document, dict):
        present = current.document()
        for name in ("dispatch", "request"):
            if isinstance(document.get(name, {}), dict):
                document = {**document, name: present[name] | document.get(name, {})}
        document = {"engines": present["engines"], **document}
    change = parse_model(_Change, document)
    _check_names(change.engines)
    return InForce(dispatch=change.dispatch, request=change.request, engines=change.engines)


def _check_names(engines: tuple[EngineAddress, ...]) -> None:
    names = [address.name for address in engines]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidInput([Problem("engines", f"name used twice: {', '.join(twice)}")])


def parse_model(model: type[Model], document: object) -> Model:
    """Validates; errors become problems with the nearest known names."""
    if not isinstance(document, dict):
        raise InvalidInput([Problem("", f"a JSON object is needed, got {type(document).__name__}")])
    try:
        return model.model_validate(document)
    except ValidationError as error:
        rows = error.errors(include_url=False)
        raise InvalidInput(problems_from_errors(rows, lambda location: _fields_at(model, location))) from None


def _fields_at(model: type[BaseModel], location: Location) -> Iterable[str]:
    """The field names of the section at a location."""
    section: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        known = getattr(section, "model_fields", {})
        if part not in known:
            return []
        section = _section_of(known[part].annotation)
    return [row.name for row in fields(section)] if is_dataclass(section) else getattr(section, "model_fields", [])


def _section_of(annotation: Any) -> Any:
    """The model or dataclass in `X`, `X | None` or `tuple[X, ...]`."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and (is_dataclass(candidate) or issubclass(candidate, BaseModel)):
            return candidate
    return annotation
