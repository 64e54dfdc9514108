"""Messages about wrong input, from pydantic's real errors."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.input_errors import (
    InputError,
    InvalidInput,
    errors_from_pydantic,
    render_choices,
    render_path,
    unknown_choice,
    unknown_field,
)
from moe_scheduling.engine.choice import EngineSettings
from moe_scheduling.request.order import RequestSettings
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator


class Level(IntEnum):
    LOW = 1
    HIGH = 2


@dataclass(kw_only=True)
class Keyword:
    name: str


@dataclass
class Positional:
    name: str


class Engine(BaseModel):
    model_config = ConfigDict(extra="forbid")
    url: Annotated[str, Field(pattern="^http://")]
    ranks: Annotated[int, Field(ge=1)] = 1


class Document(BaseModel):
    model_config = ConfigDict(extra="forbid")
    engines: list[Engine] = []
    request: RequestSettings = RequestSettings()
    dispatch: EngineSettings = EngineSettings()
    count: int | None = None
    either: int | str = 0
    mode: Literal["off", "dry run, or so"] = "off"
    only: Literal["one"] = "one"
    level: Level = Level.LOW
    env: dict[str, int] = {}
    keyword: Keyword | None = None
    positional: Positional | None = None
    even: int = 0
    int: object = None

    @field_validator("even")
    @classmethod
    def is_even(cls, value):
        if value % 2:
            raise ValueError("must be even")
        return value


def fields_at(location) -> Iterator[str]:
    sections = {
        (): Document.model_fields,
        ("request",): RequestSettings.__dataclass_fields__,
        ("dispatch",): EngineSettings.__dataclass_fields__,
        ("keyword",): Keyword.__dataclass_fields__,
        ("positional",): Positional.__dataclass_fields__,
    }
    return Engine.model_fields if location[:1] == ("engines",) and len(location) == 2 else sections.get(location, ())


def lines_of(document, *, root=""):
    validate = Document.model_validate_json if isinstance(document, str) else Document.model_validate
    with pytest.raises(ValidationError) as raised:
        validate(document)
    return [str(problem) for problem in errors_from_pydantic(raised.value.errors(), fields_at, root)]


REQUEST_FIELDS = ", ".join(sorted(field.name for field in fields(RequestSettings)))


@pytest.mark.parametrize(
    ("document", "line"),
    [
        (
            {"enginees": []},
            "enginees: unknown field; nearest known: engines; known: count, dispatch, either, engines, env, even, int, "
            "keyword, level, mode, only, positional, request",
        ),
        (
            {"request": {"polcy": "sjf"}},
            f"request.polcy: unknown field; nearest known: policy; known: {REQUEST_FIELDS}",
        ),
        ({"request": {"zzz": 1}}, f"request.zzz: unknown field; known: {REQUEST_FIELDS}"),
        (
            {"engines": [{"url": "http://a"}, {"url": "http://b", "rank": 2}]},
            "engines[1].rank: unknown field; nearest known: ranks; known: ranks, url",
        ),
        ({"positional": {"name": "x", "b": 2}}, "positional.b: unknown field; known: name"),
        ({"engines": [{}]}, "engines[0].url: required, but absent"),
        ({"keyword": {}}, "keyword.name: required, but absent"),
        ({"positional": {}}, "positional.name: required, but absent"),
        ({"request": {"policy": "sjff"}}, "request.policy: unknown 'sjff'; known: fcfs, priority, sjf"),
        ({"request": {"policy": 3}}, "request.policy: unknown 3; known: fcfs, priority, sjf"),
        ({"mode": "on"}, "mode: unknown 'on'; known: dry run, or so, off"),
        ({"only": "two"}, "only: unknown 'two'; known: one"),
        ({"level": 7}, "level: unknown 7; known: 1, 2"),
        ({"request": {"ageing_rate": 0}}, "request: ageing_rate must be greater than 0 and finite"),
        ({"dispatch": {"stale_after_s": 0}}, "dispatch: stale_after_s must be greater than 0 and finite"),
        ({"even": 3}, "even: must be even"),
        (
            {"request": {"ageing_rate": "fast"}},
            "request.ageing_rate: input should be a valid number, unable to parse string as a number, got 'fast'",
        ),
        (
            {"engines": [{"url": "ftp://a"}]},
            "engines[0].url: string should match pattern '^http://', got 'ftp://a'",
        ),
        (
            {"engines": [{"url": "http://a", "ranks": 0}]},
            "engines[0].ranks: input should be greater than or equal to 1, got 0",
        ),
        ({"count": []}, "count: input should be a valid integer, got []"),
        ({"env": {"A": "b"}}, "env.A: input should be a valid integer, unable to parse string as an integer, got 'b'"),
        ({"env": {7: 1}}, "env[7]: as a key, input should be a valid string, got 7"),
        ({"env": 5}, "env: a mapping of fields is needed, got 5"),
        ({"request": 5}, "request: a mapping of fields is needed, got 5"),
        ({"engines": [None]}, "engines[0]: a mapping of fields is needed, got None"),
        ({"engines": {}}, "engines: a list is needed, got {}"),
        (5, "a mapping of fields is needed, got 5"),
        ("[1]", "a mapping of fields is needed, got [1]"),
        ('{"count": 1.5}', "count: input should be a valid integer, got a number with a fractional part, got 1.5"),
        ('{"count"', "invalid JSON: EOF while parsing an object at line 1 column 8, got '{\"count\"'"),
    ],
)
def test_one_error_is_one_line(document, line):
    assert lines_of(document) == [line]


def test_the_members_of_a_union_do_not_enter_the_path():
    assert lines_of({"either": []}) == [
        "either: input should be a valid integer, got []",
        "either: input should be a valid string, got []",
    ]


def test_a_field_named_like_a_member_of_a_union_keeps_its_name():
    rows = [{"type": "int_type", "loc": ("int",), "msg": "Input should be a valid integer", "input": "x"}]
    assert errors_from_pydantic(rows, fields_at) == [InputError("int", "input should be a valid integer, got 'x'")]


def test_all_errors_come_in_the_order_of_their_paths_below_the_root():
    assert lines_of({"only": 1, "engines": [{}, 1], "count": "x"}, root="spec") == [
        "spec.count: input should be a valid integer, unable to parse string as an integer, got 'x'",
        "spec.engines[0].url: required, but absent",
        "spec.engines[1]: a mapping of fields is needed, got 1",
        "spec.only: unknown 1; known: one",
    ]


def test_no_errors_are_no_problems():
    assert errors_from_pydantic([], fields_at) == []


def test_what_was_written_is_shown_in_part_when_it_is_long():
    (line,) = lines_of({"count": "x" * 10_000})
    assert len(line) < 200
    assert line.endswith("...")
    (line,) = lines_of({"only": "x" * 10_000})
    assert line.endswith("xxx...; known: one")


def test_an_absurdly_long_key_is_refused_like_any_other():
    (line,) = lines_of({"k" * 100_000: 1})
    assert line.startswith("kkk")
    assert "unknown field; known: count" in line


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ((), ""),
        (("engines", 0, "url"), "engines[0].url"),
        ((0, "a", 1, 2), "[0].a[1][2]"),
        (("a\nb", "\x1b[31m"), "a\\nb.\\x1b[31m"),
        (("a", ""), "a.''"),
        (("ü", "x y"), "ü.x y"),
    ],
)
def test_a_path_reads_as_it_was_written(location, path):
    assert render_path(location) == path


@given(st.lists(st.text() | st.integers()))
def test_a_path_is_always_one_line(location):
    assert len(render_path(tuple(location)).splitlines()) <= 1


def test_choices_are_in_alphabetical_order():
    assert render_choices({"b", "a", "c"}) == "a, b, c"
    assert unknown_choice("x", "d", ["b", "a"]) == InputError("x", "unknown 'd'; known: a, b")
    assert unknown_field("x.bb", "bb", ["c", "b"]) == InputError("x.bb", "unknown field; nearest known: b; known: b, c")


def test_invalid_input_carries_its_problems_and_reads_as_their_lines():
    problems = [InputError("a", "is bad"), InputError("", "is worse")]
    error = InvalidInput(problems)
    assert error.errors == tuple(problems)
    assert str(error) == "a: is bad\nis worse"
    assert isinstance(error, ValueError)
