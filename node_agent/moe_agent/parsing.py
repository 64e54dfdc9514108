"""What a person or the operator wrote, turned into configuration or into problems: the file and the control body."""

import json
from collections.abc import Iterable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TypeVar, cast

from moe_contract.agent_config import AgentConfig
from moe_contract.input_errors import InputError, InvalidInput, Location, errors_from_pydantic
from moe_scheduling.expert.decision import ExpertSettings
from moe_scheduling.request.order import RequestSettings
from pydantic import BaseModel, ConfigDict, ValidationError

Model = TypeVar("Model", bound=BaseModel)


class Settings(BaseModel):
    """What a control body or a settings file may change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    request: RequestSettings
    expert: ExpertSettings


def load_config(path: Path) -> AgentConfig:
    """Reads the agent's file, and lays the settings file over it.

    Raises:
        InvalidInput: one of them cannot be read or is not valid.
    """
    config = parse_model(AgentConfig, parse_document(read_file(path, "file")))
    if config.settings_file is None or (text := read_settings(config.settings_file)) is None:
        return config
    try:
        settings = parse_change(parse_document(text), config.request, config.expert)
    except InvalidInput as error:
        rows = [InputError("settings_file", f"{config.settings_file}: {problem}") for problem in error.problems]
        raise InvalidInput(rows) from None
    return config.model_copy(update={"request": settings.request, "expert": settings.expert})


def read_settings(path: Path) -> bytes | None:
    """The settings file's bytes; None when there is no such file.

    Raises:
        InvalidInput: it is there and cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InvalidInput([InputError("settings_file", f"cannot read {path}: {error.strerror}")]) from None


def read_file(path: Path, problem_path: str) -> bytes:
    """The file's bytes, or `InvalidInput` that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput([InputError(problem_path, f"cannot read {path}: {error.strerror}")]) from None


def parse_document(text: bytes) -> object:
    """JSON, or `InvalidInput` that says where it ends to be JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput([InputError("", f"not JSON: {error}")]) from None


def parse_change(document: object, request: RequestSettings, expert: ExpertSettings) -> Settings:
    """The settings that a control body asks for; fields that it leaves out keep their value.

    Raises:
        InvalidInput: the body is not valid, and nothing of it is used.
    """
    if isinstance(document, dict):
        current: dict[str, RequestSettings | ExpertSettings] = {"request": request, "expert": expert}
        document = document | {name: _laid_over(document.get(name, {}), kept) for name, kept in current.items()}
    return parse_model(Settings, document)


def _laid_over(change: object, kept: RequestSettings | ExpertSettings) -> object:
    return asdict(kept) | change if isinstance(change, dict) else change


def parse_model(model: type[Model], document: object) -> Model:
    """Validates; errors become problems with the nearest known names."""
    if not isinstance(document, dict):
        raise InvalidInput([InputError("", f"a JSON object is needed, got {type(document).__name__}")])
    try:
        return model.model_validate(document)
    except ValidationError as error:
        rows = error.errors(include_url=False)
        raise InvalidInput(errors_from_pydantic(rows, lambda location: _fields_at(model, location))) from None


def _fields_at(section: type, location: Location) -> Iterable[str]:
    for part in location:
        section = _field_types(section)[str(part)]
    return _field_types(section)


def _field_types(section: type) -> dict[str, type]:
    if is_dataclass(section):
        return {field.name: type(field.default) for field in fields(section)}
    if issubclass(section, BaseModel):
        return {name: cast(type, field.annotation) for name, field in section.model_fields.items()}
    return {}
