"""Fields that users may set: default, bounds and meaning stand at the field."""

from dataclasses import dataclass, fields

import pytest
from moe_scheduling.engine.choice import EngineSettings
from moe_scheduling.expert.decision import ExpertSettings
from moe_scheduling.request.order import RequestSettings
from moe_scheduling.settings import check_settings, declared_settings, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    rate: float = setting(2.5, "Rate.", above=0)
    count: int = setting(3, "Count.", least=1, most=9)
    horizon_s: float | None = setting(None, "Horizon.", least=0)
    switch: bool = True

    def __post_init__(self) -> None:
        check_settings(self)


def test_a_declared_field_keeps_its_default_and_its_declaration():
    assert Example() == Example(rate=2.5, count=3, horizon_s=None, switch=True)
    rows = {row.name: declared for row, declared in declared_settings(Example)}
    assert list(rows) == ["rate", "count", "horizon_s"], "the switch is not for users"
    assert (rows["count"].meaning, rows["count"].least, rows["count"].most) == ("Count.", 1, 9)
    assert (rows["rate"].above, rows["rate"].least, rows["rate"].most) == (0, None, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0.0}, "rate must be greater than 0 and finite"),
        ({"rate": float("inf")}, "rate must be greater than 0 and finite"),
        ({"count": 0}, "count must be at least 1$"),
        ({"horizon_s": float("nan")}, "horizon_s must be at least 0 and finite"),
    ],
)
def test_a_value_out_of_its_declared_range_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Example(**values)


@pytest.mark.parametrize("settings", [RequestSettings, EngineSettings, ExpertSettings])
def test_each_declared_field_says_what_it_does_and_defaults_lie_in_their_range(settings):
    check_settings(settings())
    for row, declared in declared_settings(settings):
        assert declared.meaning.endswith("."), row.name
        assert row.default is None or declared.most is None or row.default <= declared.most
    assert {row.name for row, _ in declared_settings(settings)} <= {row.name for row in fields(settings)}
