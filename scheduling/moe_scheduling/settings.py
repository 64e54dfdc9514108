"""The fields of a settings dataclass: default, bounds and meaning in one place.

`RequestSettings`, `EngineSettings` and `ExpertSettings` declare each field that users may set with `setting`. From the
declaration come the check of its range (`check_settings`), the field of the resource, its CRD and its reference
(`moe_operator.api.settings`). A field without the declaration is not part of the resource.

A field may be another settings dataclass, which is a section within the section.

A field's name carries its unit: `_s` seconds, `_steps` engine steps; the resource drops the suffix.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

_KEY = "setting"
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The declaration of one field.

    Attributes:
        meaning: what the field does, for users; one or more sentences.
        above: the value must be greater; None: no such bound.
        least: the value must be at least this; None: no such bound.
        most: greatest value that a resource may ask for; None: the resource's own bound for the type.
    """

    meaning: str
    above: float | None = None
    least: float | None = None
    most: float | None = None


def setting(
    default: T, meaning: str, *, above: float | None = None, least: float | None = None, most: float | None = None
) -> T:
    """The default of a dataclass field that users may set; arguments as `Setting`."""
    declared = Setting(meaning=meaning, above=above, least=least, most=most)
    return field(default=default, metadata={_KEY: declared})


def declared_settings(settings: Any) -> Iterator[tuple[Any, Setting]]:
    """The dataclass fields of a settings class or object that users may set, each with its declaration."""
    for row in fields(settings):
        if _KEY in row.metadata:
            yield row, row.metadata[_KEY]


def check_settings(settings: Any) -> None:
    """Checks the declared ranges of a settings object.

    Raises:
        ValueError: a value is out of its range or not finite; the message names the field.
    """
    for row, declared in declared_settings(settings):
        value = getattr(settings, row.name)
        if value is None or is_dataclass(value):
            continue
        if declared.above is not None and not declared.above < value < math.inf:
            raise ValueError(f"{row.name} must be greater than {declared.above:g}{_and_finite(value)}")
        if declared.least is not None and not declared.least <= value < math.inf:
            raise ValueError(f"{row.name} must be at least {declared.least:g}{_and_finite(value)}")


def _and_finite(value: float) -> str:
    return " and finite" if isinstance(value, float) else ""
