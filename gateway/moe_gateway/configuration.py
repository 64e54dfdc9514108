"""What a person or a peer wrote, turned into configuration or into problems: the file and the control body."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import orjson
from moe_contract.gateway_config import EngineAddress, GatewayConfig, Group
from moe_contract.input_errors import InputError, InvalidInput, Location, errors_from_pydantic
from moe_scheduling.engine.choice import EngineSettings
from moe_scheduling.request.order import RequestSettings
from pydantic import BaseModel, ConfigDict, ValidationError

Model = TypeVar("Model", bound=BaseModel)
FOUND_BY_DISCOVERY = "the engines are found by discovery, so there is no list of them; known: groups"


class _Settings(BaseModel):
    """The settings file, once the fields that it leaves out were filled in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dispatch: EngineSettings
    request: RequestSettings
    groups: tuple[Group, ...]


class _Change(_Settings):
    """Body of `PUT /v1/config`, likewise."""

    engines: tuple[EngineAddress, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class InForce:
    """What the control route can change.

    Attributes:
        groups: the groups of engines that are discovered; None where `engines` is a fixed list.
    """

    dispatch: EngineSettings
    request: RequestSettings
    engines: tuple[EngineAddress, ...]
    groups: tuple[Group, ...] | None = None

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        document: dict[str, Any] = {"dispatch": asdict(self.dispatch), "request": asdict(self.request)}
        if self.groups is None:
            return document | {"engines": [address.model_dump() for address in self.engines]}
        return document | {"groups": [group.model_dump() for group in self.groups]}


def build_in_force(config: GatewayConfig) -> InForce:
    """What is in force at the start."""
    groups = None if config.discovery is None else config.discovery.groups
    return InForce(dispatch=config.dispatch, request=config.request, engines=config.engines, groups=groups)


def load_config(path: Path) -> GatewayConfig:
    """Reads the gateway's file, and lays the settings file over it.

    Raises:
        InvalidInput: one of them cannot be read or is not valid.
    """
    config = parse_model(GatewayConfig, parse_document(read_file(path, "file")))
    _check_names(config.engines)
    if config.discovery is not None:
        if config.engines:
            raise InvalidInput([InputError("engines", FOUND_BY_DISCOVERY)])
        _check_services(config.discovery.groups)
    return config if config.settings_file is None else _lay_over(config, config.settings_file)


def _lay_over(config: GatewayConfig, path: Path) -> GatewayConfig:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return config
    except OSError as error:
        raise InvalidInput([InputError("settings_file", f"cannot read {path}: {error.strerror}")]) from None
    try:
        settings = _parse_settings(_Settings, parse_document(text), build_in_force(config))
    except InvalidInput as error:
        raise InvalidInput([InputError("settings_file", f"{path}: {problem}") for problem in error.problems]) from None
    changed: dict[str, Any] = {"dispatch": settings.dispatch, "request": settings.request}
    if config.discovery is not None:
        changed["discovery"] = config.discovery.model_copy(update={"groups": settings.groups})
    return config.model_copy(update=changed)


def read_file(path: Path, problem_path: str) -> bytes:
    """The file's bytes, or `InvalidInput` that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput([InputError(problem_path, f"cannot read {path}: {error.strerror}")]) from None
    except ValueError:
        raise InvalidInput([InputError(problem_path, f"no file can be named {str(path)!r}")]) from None


def parse_document(text: bytes) -> object:
    """JSON, or `InvalidInput` that says where it ends to be JSON."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidInput([InputError("", f"not JSON: {error}")]) from None


def parse_change(document: object, current: InForce) -> InForce:
    """What a control body asks for; what it leaves out keeps its value.

    Raises:
        InvalidInput: the body is not valid, and nothing of it is used.
    """
    if isinstance(document, dict):
        if current.groups is not None and "engines" in document:
            raise InvalidInput([InputError("engines", FOUND_BY_DISCOVERY)])
        document = {"engines": current.document().get("engines", []), **document}
    change = _parse_settings(_Change, document, current)
    _check_names(change.engines)
    groups = None if current.groups is None else change.groups
    return InForce(dispatch=change.dispatch, request=change.request, engines=change.engines, groups=groups)


Settings = TypeVar("Settings", bound=_Settings)


def _parse_settings(model: type[Settings], document: object, current: InForce) -> Settings:
    """Fields that are left out keep their value."""
    if isinstance(document, dict):
        if current.groups is None and "groups" in document:
            raise InvalidInput([InputError("groups", "there are none: the engines are a fixed list here")])
        present = current.document()
        for name in ("dispatch", "request"):
            if isinstance(document.get(name, {}), dict):
                document = {**document, name: present[name] | document.get(name, {})}
        document = {"groups": present.get("groups", []), **document}
    settings = parse_model(model, document)
    _check_services(settings.groups)
    return settings


def _check_names(engines: tuple[EngineAddress, ...]) -> None:
    names = [address.name for address in engines]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidInput([InputError("engines", f"name used twice: {', '.join(twice)}")])


def _check_services(groups: tuple[Group, ...]) -> None:
    services = [group.service for group in groups]
    if twice := sorted({name for name in services if services.count(name) > 1}):
        raise InvalidInput([InputError("groups", f"service named twice: {', '.join(twice)}")])


def parse_model(model: type[Model], document: object) -> Model:
    """Validates; errors become problems with the nearest known names."""
    if not isinstance(document, dict):
        raise InvalidInput([InputError("", f"a JSON object is needed, got {type(document).__name__}")])
    try:
        return model.model_validate(document)
    except ValidationError as error:
        rows = error.errors(include_url=False)
        raise InvalidInput(errors_from_pydantic(rows, lambda location: _fields_at(model, location))) from None


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
