"""Sections of the resource that are generated from settings dataclasses, and the way back to the dataclass.

A field that is declared with `moe_scheduling.settings.setting` becomes a field of the section: the name in camelCase
without the suffix of its unit, seconds as a duration (`500ms`), bounds, default and meaning as declared.
"""

from dataclasses import Field as DataclassField
from dataclasses import is_dataclass
from enum import Enum
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from moe_scheduling.settings import Setting, declared_settings
from pydantic import BeforeValidator, Field, create_model

from moe_operator.api.section import Count, Flag, Number, Section
from moe_operator.api.units import DurationBetween, duration_s, render_duration

_SECONDS, _STEPS = "_s", "_steps"
_DAY_S, _LARGEST = 86400.0, 1_000_000_000
Settings = TypeVar("Settings")


def settings_section(settings: type) -> Any:
    """A base class for a section, with one field for each declared field of a settings dataclass."""
    rows: dict[str, Any] = {_name(row): _field(row, declared) for row, declared in declared_settings(settings)}
    return create_model(f"{settings.__name__}Section", __base__=Section, **rows)


def read_settings(section: Section, settings: type[Settings]) -> Settings:
    """The settings that a section asks for: durations become seconds."""
    values: dict[str, Any] = {}
    for row, _ in declared_settings(settings):
        value = getattr(section, _name(row))
        if (nested := _nested(row)) is not None:
            values[row.name] = read_settings(value, nested)
            continue
        values[row.name] = duration_s(value) if row.name.endswith(_SECONDS) and value is not None else value
    return settings(**values)


def _name(row: "DataclassField[Any]") -> str:
    """Name of the field in the section, in snake_case."""
    return row.name.removesuffix(_SECONDS).removesuffix(_STEPS)


def _nested(row: "DataclassField[Any]") -> type | None:
    """The settings dataclass that is the type of a field; None for any other type."""
    kind: Any = row.type
    return kind if isinstance(kind, type) and is_dataclass(kind) else None


def _field(row: "DataclassField[Any]", declared: Setting) -> tuple[Any, Any]:
    """Annotation and default for pydantic."""
    default: Any = row.default
    if (nested := _nested(row)) is not None:
        section = settings_section(nested)
        return section, Field(default=section(), description=declared.meaning)
    if row.name.endswith(_SECONDS):
        kind: Any = Annotated[str, _duration(declared)]
        default = None if default is None else render_duration(default)
    else:
        kind = _kind(row, declared)
    return kind | None if _is_optional(row) else kind, Field(default=default, description=declared.meaning)


def _duration(declared: Setting) -> DurationBetween:
    least = "1ms" if declared.above is not None else render_duration(declared.least or 0.0)
    return DurationBetween(least, render_duration(declared.most or _DAY_S))


def _is_optional(row: "DataclassField[Any]") -> bool:
    return get_origin(row.type) in (Union, UnionType) and type(None) in get_args(row.type)


def _kind(row: "DataclassField[Any]", declared: Setting) -> Any:
    kind: Any = row.type
    if _is_optional(row):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if issubclass(kind, Enum):
        return Annotated[kind, BeforeValidator(_refuse_bare_off)] if "off" in set(kind) else kind
    if kind is bool:
        return Flag
    bounds = Field(gt=declared.above, ge=declared.least, le=declared.most or _LARGEST)
    return Annotated[Count, bounds] if kind is int else Annotated[Number, bounds, Field(allow_inf_nan=False)]


def _refuse_bare_off(value: object) -> object:
    if value is False:
        raise ValueError('"off" needs quotes: YAML reads a bare off as false')
    return value
