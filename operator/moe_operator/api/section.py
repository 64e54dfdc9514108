"""A section of the resource: what all of its pydantic models share, and rules across fields in two languages.

A `Rule` is written once: its Python form runs here and its CEL form enters the CRD, so that the command line and the
API server refuse the same things with the same words. Sections are frozen, refuse unknown keys, are camelCase in YAML,
and read a null as "absent", as a client-side `kubectl apply` does (`refused_nulls.py` has those that the API server
refuses).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Strict, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import InitErrorDetails, PydanticCustomError

# A number in quotes, or a true for a 1, is an error as it is for the API server.
Count = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]
Number = Annotated[float, Strict()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What must hold between the fields of a section.

    Attributes:
        field: path of the field to blame below the section, in camelCase (`parallelism.expert`).
        message: the requirement, in words.
        cel: the rule over `self` as the API server evaluates it.
        holds: the rule over the parsed section.
    """

    field: str
    message: str
    cel: str
    holds: Callable[[Any], bool]


def _add_rules(schema: dict[str, Any], model: type[BaseModel]) -> None:
    rules: tuple[Rule, ...] = getattr(model, "rules", ())
    if rules:
        schema["x-kubernetes-validations"] = [
            {"rule": rule.cel, "message": rule.message, "fieldPath": f".{rule.field}"} for rule in rules
        ]


class Section(BaseModel):
    """Base of all models of the resource."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=to_camel,
        validate_by_alias=True,
        validate_by_name=True,
        serialize_by_alias=True,
        json_schema_extra=_add_rules,
    )
    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _read_null_as_absent(cls, value: Any) -> Any:
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise PydanticCustomError("section", "a mapping of fields is needed")
        known = _names_of(cls)
        return {key: entry for key, entry in value.items() if entry is not None or key not in known}

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        broken = [rule for rule in self.rules if not rule.holds(self)]
        if broken:
            raise ValidationError.from_exception_data(type(self).__name__, [_details(rule) for rule in broken])
        return self


@cache
def _names_of(section: type[Section]) -> frozenset[str | None]:
    """The names that the fields of a section have in a document."""
    return frozenset(field.alias for field in section.model_fields.values())


def _details(rule: Rule) -> InitErrorDetails:
    error = PydanticCustomError("value_error", "{error}", {"error": rule.message})
    return InitErrorDetails(type=error, loc=tuple(rule.field.split(".")), input=None)
