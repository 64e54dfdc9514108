"""The figures of a run."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_tools.simulator.outcome import jain_index, measure, measure_tenants
from moe_tools.simulator.workload import SimRequest
from moe_tools.simulator.world import RunTotals

TOTALS = RunTotals(now_s=100.0, steps=10, busy_s=50.0, preemptions=3)


def answered(index, ttft_s, *, prompt_tokens=10, output_tokens=11, tenant=0):
    return SimRequest(
        index=index, arrival_s=float(index), prompt_tokens=prompt_tokens, output_tokens=output_tokens, tenant=tenant,
        sent_s=float(index), first_token_s=index + ttft_s, finished_s=index + ttft_s + 1.0, predicted_s=0.5,
    )  # fmt: skip


def test_figures_leave_the_warm_up_out():
    rows = [answered(0, 100.0), *(answered(index, 1.0) for index in range(1, 10))]
    figures = measure(rows, TOTALS, 1, lambda row: 0.5)
    assert figures.ttft_mean == pytest.approx(1.0)
    assert figures.tpot_mean == pytest.approx(0.1)
    assert figures.ttft_floor == 0.5
    assert figures.jain == pytest.approx(1.0)
    assert figures.prediction_error_s == pytest.approx(0.5)
    assert figures.busy_share == 0.5
    assert figures.preemptions == 3


def test_failed_requests_count_as_failed_and_are_not_measured():
    rows = [answered(0, 1.0), answered(1, 1.0)]
    rows[1].failure = "its engine failed"
    figures = measure(rows, TOTALS, 2, lambda row: 1.0)
    assert (figures.requests, figures.failed) == (2, 1)


def test_the_longest_tenth_has_a_percentile_of_its_own():
    rows = [answered(index, 1.0 + (index == 15), prompt_tokens=10 + 90 * (index == 15)) for index in range(20)]
    figures = measure(rows, TOTALS, 1, lambda row: 1.0)
    assert figures.ttft_p99_longest == pytest.approx(2.0, rel=0.02)


def test_nothing_answered_has_no_figures_and_no_error():
    row = answered(0, 1.0)
    row.failure = "refused"
    figures = measure([row], TOTALS, 1, lambda row: 1.0)
    assert math.isnan(figures.ttft_mean)
    assert figures.failed == 1


def test_a_tenant_that_waits_longer_shows_in_the_index():
    fair = [answered(index, 1.0, tenant=index % 2) for index in range(20)]
    unfair = [answered(index, 1.0 + 9.0 * (index % 2), tenant=index % 2) for index in range(20)]
    one = measure(fair, TOTALS, 1, lambda row: 1.0).jain_tenants
    other = measure(unfair, TOTALS, 1, lambda row: 1.0).jain_tenants
    assert one == pytest.approx(1.0)
    assert other < 0.7


def test_a_tenant_that_asks_for_less_than_its_part_is_light():
    rows = [answered(index, 1.0 + (index % 4 > 0), tenant=int(index % 4 > 0)) for index in range(40)]
    figures = measure(rows, TOTALS, 1, lambda row: 1.0)
    assert (figures.ttft_light, figures.ttft_heavy) == (pytest.approx(1.0), pytest.approx(2.0))
    light, heavy = measure_tenants(rows, lambda row: 0.5)
    assert (light.tenant, light.requests, light.tokens) == (0, 9, 9 * 21)
    assert (light.slowdown_mean, heavy.slowdown_mean) == (pytest.approx(2.0), pytest.approx(4.0))


def test_where_there_is_one_tenant_none_is_heavy():
    figures = measure([answered(index, 1.0) for index in range(10)], TOTALS, 1, lambda row: 1.0)
    assert figures.ttft_light == pytest.approx(figures.ttft_mean)
    assert math.isnan(figures.ttft_heavy)


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=50))
def test_the_index_is_between_one_nth_and_one(values):
    assert 1 / len(values) - 1e-9 <= jain_index(np.array(values)) <= 1 + 1e-9


def test_the_fairness_index_where_one_tenant_has_everything():
    assert jain_index(np.array([1.0, 0.0, 0.0, 0.0])) == pytest.approx(0.25)
