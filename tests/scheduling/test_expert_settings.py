"""Settings of the expert layer: what has no meaning is refused with the name of the field."""

import math
import re

import pytest
from moe_scheduling.expert.decision import ExpertMode, ExpertSettings


@pytest.mark.parametrize(
    ("field", "message", "wrong", "least"),
    [
        ("interval_steps", "interval_steps must be at least 1", (0, -1), 1),
        ("window_steps", "window_steps must be at least 1", (0, -1), 1),
        ("move_budget", "move_budget must be at least 0", (-1,), 0),
        ("max_stall_s", "max_stall_s must be greater than 0", (0.0, -1.0, math.nan, math.inf), 1e-300),
        ("hysteresis", "hysteresis must be at least 0", (-1e-300, math.nan, math.inf), 0.0),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, message, wrong, least):
    for value in wrong:
        with pytest.raises(ValueError, match=re.escape(message)):
            ExpertSettings(**{field: value})
    assert getattr(ExpertSettings(**{field: least}), field) == least


def test_nothing_moves_by_default():
    assert ExpertSettings().mode is ExpertMode.DRY_RUN
