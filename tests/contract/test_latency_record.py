"""Latencies beside their bound: buckets, percentiles, and the sum over several gateways."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.gateway_state import GatewayState, read_gateway_state, write_gateway_state
from moe_contract.latency_record import (
    BUCKETS_PER_DOUBLING,
    KEPT_PART,
    MOST_BUCKET,
    LatencyRecord,
    bucket_of,
    merge_records,
)

LATENCIES = st.floats(1e-6, 1e4)


def record_of(latencies, bound_s=1.0):
    records = [LatencyRecord(bound_s=bound_s, counts=((bucket_of(value, bound_s), 1),)) for value in latencies]
    return merge_records(records, bound_s)


@pytest.mark.parametrize(
    ("latency_s", "bound_s", "bucket"),
    [(0.5, 0.5, 0), (0.2, 0.1, 16), (0.05, 0.1, -16), (0.0, 1.0, -MOST_BUCKET), (-1.0, 1.0, -MOST_BUCKET)],
)
def test_a_latency_is_counted_by_its_quotient_with_the_bound(latency_s, bound_s, bucket):
    assert bucket_of(latency_s, bound_s) == bucket


@given(LATENCIES, st.floats(1e-3, 1e3))
def test_bucket_zero_and_below_are_exactly_those_that_kept_the_bound(latency_s, bound_s):
    bucket = bucket_of(latency_s, bound_s)
    if not math.isclose(latency_s, bound_s, rel_tol=1e-12):
        assert (bucket <= 0) == (latency_s <= bound_s)
    if abs(bucket) < MOST_BUCKET:
        assert latency_s <= bound_s * 2 ** (bucket / BUCKETS_PER_DOUBLING) * (1 + 1e-9)


@given(st.lists(LATENCIES, min_size=1, max_size=60))
def test_the_percentile_is_that_of_the_latencies_to_a_bucket(latencies):
    rank = max(0, math.ceil(KEPT_PART * len(latencies) - 1e-9) - 1)
    expected = sorted(latencies)[rank]
    found = record_of(latencies).percentile_s()
    assert expected * (1 - 1e-9) <= found <= expected * 2 ** (1 / BUCKETS_PER_DOUBLING) * (1 + 1e-9)


@given(st.lists(LATENCIES, max_size=30), st.lists(LATENCIES, max_size=30))
def test_records_of_several_gateways_add_up(first, second):
    merged = merge_records([record_of(first), None, record_of(second)], 1.0)
    assert merged == record_of([*first, *second])
    assert merged.measured == len(first) + len(second)


def test_a_record_of_another_bound_counts_for_nothing():
    merged = merge_records([record_of([0.1], 1.0), record_of([0.1], 2.0)], 2.0)
    assert merged.measured == 1


def test_without_latencies_there_is_no_percentile():
    assert LatencyRecord(bound_s=1.0).percentile_s() is None
    assert LatencyRecord(bound_s=1.0, counts=((3, 0),)).percentile_s() is None


def test_a_gateway_says_them_and_a_broken_record_is_absent():
    state = GatewayState(ttft=record_of([0.4, 3.0]), inter_token=LatencyRecord(bound_s=0.05))
    text = write_gateway_state(state)
    assert read_gateway_state(text) == state
    broken = read_gateway_state(text.replace(b'"bound_s":1.0', b'"bound_s":-1.0'))
    assert (broken.ttft, broken.inter_token) == (None, state.inter_token)
    assert read_gateway_state(b"{}").ttft is None
