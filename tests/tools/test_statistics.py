"""Intervals and ratios."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_tools.statistics import estimate, mean_of, paired_ratio, percentile_of, t_quantile

values_strategy = st.lists(st.floats(0.001, 1e6), min_size=1, max_size=40)
pairs_strategy = st.lists(st.tuples(st.floats(0.01, 1e3), st.floats(0.01, 1e3)), min_size=1, max_size=12)


@settings(max_examples=40)
@given(values_strategy, st.sampled_from([mean_of, percentile_of(50), percentile_of(99)]))
def test_an_interval_lies_within_the_values(values, statistic):
    found = estimate(values, statistic)
    slack = 1e-9 * max(values)
    assert min(values) - slack <= found.low <= found.high <= max(values) + slack
    assert min(values) - slack <= found.value <= max(values) + slack
    assert found.count == len(values)


def test_equal_values_have_no_spread():
    found = estimate([2.0] * 5, mean_of)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def test_the_same_seed_gives_the_same_interval_and_another_one_another():
    values = list(np.random.default_rng(0).exponential(1.0, 50))
    assert estimate(values, mean_of, seed=1) == estimate(values, mean_of, seed=1)
    assert estimate(values, mean_of, seed=1) != estimate(values, mean_of, seed=2)


def test_bootstrap_intervals_of_the_mean_hold_the_truth_about_as_often_as_they_say():
    random = np.random.default_rng(7)
    held = sum(estimate(random.normal(5.0, 1.0, 60), mean_of, seed=n).covers(5.0) for n in range(200))
    assert 178 <= held <= 200


def test_t_intervals_of_a_ratio_hold_the_truth_about_as_often_as_they_say():
    random = np.random.default_rng(8)

    def one() -> bool:
        base = random.lognormal(0, 0.5, 4)
        return paired_ratio(list(zip(base, base * 0.8 * random.lognormal(0, 0.1, 4), strict=True))).covers(0.8)

    assert 178 <= sum(one() for _ in range(200)) <= 199


@given(pairs_strategy)
def test_turning_the_pairs_round_inverts_the_ratio(pairs):
    there, back = paired_ratio(pairs), paired_ratio([(second, first) for first, second in pairs])
    assert math.isclose(there.value * back.value, 1.0, rel_tol=1e-9)
    if len(pairs) > 1:
        assert math.isclose(there.low * back.high, 1.0, rel_tol=1e-6)


@given(pairs_strategy, st.floats(0.1, 10))
def test_what_slows_both_of_a_pair_leaves_the_ratio(pairs, factor):
    slowed = [(first * factor, second * factor) for first, second in pairs]
    assert math.isclose(paired_ratio(slowed).value, paired_ratio(pairs).value, rel_tol=1e-9)


def test_a_steady_gain_is_shown_and_noise_is_not():
    steady = paired_ratio([(10, 8), (20, 16.2), (30, 23.8)])
    assert steady.value == pytest.approx(0.8, abs=0.01)
    assert not steady.covers(1.0)
    assert paired_ratio([(10, 8), (8, 10), (10, 9.5)]).covers(1.0)


def test_one_pair_proves_nothing():
    found = paired_ratio([(10.0, 1.0)])
    assert found.value == pytest.approx(0.1)
    assert found.covers(1.0)
    assert math.isinf(found.high)


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (3, 3.182), (30, 2.042), (60, 2.000), (1000, 1.962)])
def test_t_quantiles(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, abs=0.002)


def test_t_quantiles_fall_with_the_degrees():
    quantiles = [t_quantile(degrees) for degrees in range(1, 60)]
    assert quantiles == sorted(quantiles, reverse=True)
