"""Durations and quantities as Kubernetes writes them: field types of the resource, and their values as numbers.

A field keeps the text that a user wrote (so that a resource survives reading and writing); `duration_s` and
`quantity_value` return its number. Each type carries its JSON schema with the same bounds as a CEL rule.
"""

import re
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

DURATION_PATTERN = r"^([0-9]{1,9}(\.[0-9]{1,9})?(ms|s|m|h))+$"
QUANTITY_PATTERN = r"^[0-9]{1,15}(\.[0-9]{1,9})?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
MAX_TEXT = 32

_DURATION_PART = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h)")
_SECONDS = {"ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600)}
_QUANTITY = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_FACTORS = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    **{letter: Decimal(1000) ** power for power, letter in enumerate("kMGT", start=1)},
    **{f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGT", start=1)},
}


def _error(message: str, value: object) -> PydanticCustomError:
    """An error whose text stands alone, so that braces in what a person wrote are not read as a template."""
    return PydanticCustomError("value_error", "{error}", {"error": f"{message}, got {value!r:.80}"})


def duration_s(text: str) -> float:
    """Seconds of a duration such as `500ms`, `10s` or `1m30s` (Go's form, without a sign).

    Raises:
        ValueError: the text is no duration.
    """
    return float(_duration(text))


def _duration(text: str) -> Decimal:
    parts = _DURATION_PART.findall(text)
    if len(text) > MAX_TEXT or not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r:.80} is no duration")
    return sum((Decimal(number) * _SECONDS[unit] for number, unit in parts), Decimal(0))


def render_duration(seconds: float) -> str:
    """The shortest duration text for a number of seconds, to the millisecond: 0.1 -> `100ms`, 90 -> `1m30s`."""
    milliseconds = round(seconds * 1000)
    if milliseconds % 1000:
        return f"{milliseconds}ms"
    minutes, rest_s = divmod(milliseconds // 1000, 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{count}{unit}" for count, unit in ((hours, "h"), (minutes, "m"), (rest_s, "s")) if count]
    return "".join(parts) or "0s"


def quantity_value(text: str) -> Decimal:
    """The number that a quantity such as `2`, `500m`, `4Gi` or `1.5G` means.

    Raises:
        ValueError: the text is no quantity.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r:.80} is no quantity")
    return Decimal(match[1]) * _FACTORS[match[2] or ""]


def canonical_quantity(text: str) -> str:
    """The quantity as the API server writes it back, such as `1` for `1000m` and `1536Mi` for `1.5Gi`.

    Source: k8s.io/apimachinery, resource.Quantity: no fraction, the largest unit that allows it, the family kept.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r:.80} is no quantity")
    value = quantity_value(text)
    unit = match[2] or ""
    if unit.endswith("i"):
        # Less than a unit of the binary family is written in the decimal one.
        units = [(f"{letter}i", Decimal(1024) ** power) for power, letter in enumerate("KMGT", start=1)]
    else:
        units = [(letter, Decimal(1000) ** power) for power, letter in enumerate("kMGT", start=1)]
    for name, factor in reversed(units):
        if value and value % factor == 0:
            return f"{int(value / factor)}{name}"
    if value % 1 == 0:
        return str(int(value))
    return f"{int((value * 1000).to_integral_value(ROUND_CEILING))}m"


def render_bytes(count: int) -> str:
    """A number of bytes as a quantity in the largest binary unit that divides it: 33554432 -> `32Mi`."""
    for unit in ("Ti", "Gi", "Mi", "Ki"):
        if count and count % int(_FACTORS[unit]) == 0:
            return f"{count // int(_FACTORS[unit])}{unit}"
    return str(count)


@dataclass(frozen=True, slots=True)
class DurationBetween:
    """Marks a text as a duration between two bounds, both allowed: `Annotated[str, DurationBetween("1s", "24h")]`."""

    minimum: str
    maximum: str = "24h"

    def check(self, value: object) -> str:
        """The text as it was given."""
        if not isinstance(value, str) or len(value) > MAX_TEXT or not re.fullmatch(DURATION_PATTERN, value):
            raise _error("a duration such as 500ms, 10s or 1m30s is needed", value)
        if not _duration(self.minimum) <= _duration(value) <= _duration(self.maximum):
            raise _error(self._needed, value)
        return value

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        rule = f"duration(self) >= duration('{self.minimum}') && duration(self) <= duration('{self.maximum}')"
        return {
            "type": "string",
            "maxLength": MAX_TEXT,
            "pattern": DURATION_PATTERN,
            "x-kubernetes-validations": [{"rule": rule, "message": self._needed}],
        }

    @property
    def _needed(self) -> str:
        return f"a duration from {self.minimum} to {self.maximum} is needed"


@dataclass(frozen=True, slots=True)
class QuantityBetween:
    """Marks a text as a quantity between two bounds, both allowed; a whole number may stand without quotes.

    Attributes:
        minimum: the least.
        maximum: the greatest.
        example: a quantity for the error message.
    """

    minimum: str
    maximum: str
    example: str

    def check(self, value: object) -> str:
        """The text as it was given."""
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if not isinstance(text, str) or len(text) > MAX_TEXT or not re.fullmatch(QUANTITY_PATTERN, text):
            raise _error(f"a quantity such as {self.example} is needed", value)
        if not quantity_value(self.minimum) <= quantity_value(text) <= quantity_value(self.maximum):
            raise _error(self._needed, value)
        return text

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        low, high = (f"quantity(string(self)).compareTo(quantity('{bound}'))" for bound in (self.minimum, self.maximum))
        return {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "maxLength": MAX_TEXT,
            "pattern": QUANTITY_PATTERN,
            "x-kubernetes-int-or-string": True,
            "x-kubernetes-validations": [{"rule": f"{low} >= 0 && {high} <= 0", "message": self._needed}],
        }

    @property
    def _needed(self) -> str:
        return f"a quantity from {self.minimum} to {self.maximum} is needed"


@dataclass(frozen=True, slots=True)
class CountOrPercent:
    """Marks a text as a count or a percentage of all, such as `1` or `25%`; a count may stand without quotes.

    Attributes:
        digits: the most digits of a count.
    """

    digits: int

    def check(self, value: object) -> str:
        """The text as it was given."""
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if not isinstance(text, str) or not re.fullmatch(self._pattern, text):
            raise _error(self._needed, value)
        return text

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "maxLength": MAX_TEXT,
            "pattern": self._pattern,
            "x-kubernetes-int-or-string": True,
            "x-kubernetes-validations": [
                {"rule": f"string(self).matches('{self._pattern}')", "message": self._needed},
            ],
        }

    @property
    def _pattern(self) -> str:
        return f"^([0-9]{{1,{self.digits}}}|[0-9]{{1,2}}%|100%)$"

    @property
    def _needed(self) -> str:
        return f"a number of at most {self.digits} digits, or a percentage such as 25%, is needed"
