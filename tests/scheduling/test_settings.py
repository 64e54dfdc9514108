"""Ranges of the settings: what has no meaning is refused with the name of the field."""

import math
import re

import pytest
from moe_scheduling.engine.choice import EngineSettings
from moe_scheduling.request.order import RequestSettings


@pytest.mark.parametrize(
    ("settings", "field", "message", "least"),
    [
        (RequestSettings, "ageing_rate", "ageing_rate must be greater than 0", 1e-300),
        (RequestSettings, "ageing_horizon_s", "ageing_horizon_s must be at least 0", 0.0),
        (RequestSettings, "priority_step_s", "priority_step_s must be at least 0", 0.0),
        (RequestSettings, "fairness_horizon_s", "fairness_horizon_s must be at least 0", 0.0),
        (EngineSettings, "stickiness_s", "stickiness_s must be at least 0", 0.0),
        (EngineSettings, "stale_after_s", "stale_after_s must be greater than 0", 1e-300),
        (EngineSettings, "saturation_s", "saturation_s must be greater than 0", 1e-300),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(settings, field, message, least):
    below = -1e-300 if least == 0.0 else 0.0
    for value in (below, -1, math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=re.escape(message)):
            settings(**{field: value})
    assert getattr(settings(**{field: least}), field) == least


def test_blocks_to_grow_into_are_no_less_than_none():
    with pytest.raises(ValueError, match="kv_growth_blocks must be at least 0"):
        RequestSettings(kv_growth_blocks=-1)
    assert RequestSettings(kv_growth_blocks=0).kv_growth_blocks == 0


def test_without_saturation_there_is_no_bound():
    assert EngineSettings(saturation_s=None).saturation_s is None


@pytest.mark.parametrize("bound_s", [0.0, -1.0, float("inf"), float("nan")])
def test_a_bound_on_steps_is_a_time(bound_s):
    with pytest.raises(ValueError, match="inter_token_s must be greater than 0 and finite"):
        RequestSettings(inter_token_s=bound_s)
