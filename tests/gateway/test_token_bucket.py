"""The token bucket and the quotas of tenants, on a clock of their own."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.access_config import Quota
from moe_gateway.access import quotas as quotas_module
from moe_gateway.access.key_table import build_caller
from moe_gateway.access.quotas import Lease, OverQuota, QuotaBound, Quotas
from moe_gateway.access.token_bucket import TokenBucket
from moe_gateway.http.routes import Route
from moe_gateway.request.answer_limit import read_answer_limit


@pytest.mark.parametrize(
    ("taken", "asked", "after_s", "wait_s"),
    [
        ([], 1, 0, 0),
        ([], 60, 0, 0),
        ([60], 1, 0, 1),
        ([60], 30, 0, 30),
        ([60], 30, 10, 20),
        ([60], 60, 60, 0),
        # More than it holds: once it is full.
        ([], 1000, 0, 0),
        ([1], 1000, 0, 1),
        # A debt, as answers leave it.
        ([60, 120], 1, 0, 121),
        # What is put back counts, up to what it holds.
        ([60, -20], 20, 0, 0),
        ([-500], 60, 0, 0),
        ([-500, 60], 1, 0, 1),
    ],
)
def test_a_bucket_of_60_a_minute(taken, asked, after_s, wait_s):
    bucket = TokenBucket(60.0, 60.0, 0.0)
    for amount in taken:
        bucket.take(amount, 0.0)
    assert bucket.wait_s(asked, after_s) == pytest.approx(wait_s)


rates = st.floats(1.0, 1e7)
steps = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1e6)), max_size=30)


@given(rates, steps)
def test_a_wait_is_as_long_as_needed_and_no_longer(per_minute, rows):
    bucket, now_s = TokenBucket(per_minute, per_minute, 0.0), 0.0
    for pause_s, amount in rows:
        now_s += pause_s
        wait_s = bucket.wait_s(amount, now_s)
        if wait_s > 0.001:
            assert bucket.wait_s(amount, now_s + 0.99 * wait_s) > 0
        now_s += wait_s * (1 + 1e-6)
        assert bucket.wait_s(amount, now_s) == 0
        bucket.take(amount, now_s)


@given(rates, steps)
def test_no_more_is_given_than_flows_in_and_one_burst(per_minute, rows):
    bucket, now_s, given = TokenBucket(per_minute, per_minute, 0.0), 0.0, 0.0
    for pause_s, amount in rows:
        now_s += pause_s
        part = min(amount, per_minute)
        if bucket.wait_s(part, now_s) == 0:
            bucket.take(part, now_s)
            given += part
    assert given <= per_minute * (1 + now_s / 60) * (1 + 1e-6)


@given(rates, rates, st.floats(0, 2), st.floats(0, 100))
def test_another_rate_keeps_the_part_that_is_full(before, after, part, later_s):
    bucket = TokenBucket(before, before, 0.0)
    bucket.take(part * before, 0.0)
    twin = TokenBucket(before, bucket.level, 0.0)
    bucket.resize(after, later_s)
    assert bucket.level / after == pytest.approx(twin._level(later_s) / before, abs=1e-6)


def test_a_clock_that_seems_to_go_back_gives_nothing():
    bucket = TokenBucket(60.0, 0.0, 100.0)
    assert bucket.wait_s(1, 50.0) == 1.0
    bucket.take(1, 50.0)
    assert bucket.wait_s(1, 101.0) == pytest.approx(1.0)


A, B = build_caller("a"), build_caller("b")


def admit(quotas: Quotas, caller=A, tokens: int = 0, now_s: float = 0.0) -> Lease:
    lease = quotas.admit(caller, tokens, now_s)
    assert isinstance(lease, Lease)
    return lease


def refuse(quotas: Quotas, caller=A, tokens: int = 0, now_s: float = 0.0) -> OverQuota:
    over = quotas.admit(caller, tokens, now_s)
    assert isinstance(over, OverQuota)
    return over


def test_requests_a_minute_are_counted_by_tenant():
    quotas = Quotas(Quota(requests_per_minute=2))
    admit(quotas).end(0, 0.0)
    admit(quotas).end(0, 0.0)
    over = refuse(quotas)
    assert (over.limit, over.bound, over.wait_s) == (QuotaBound.REQUESTS, 2, pytest.approx(30.0))
    admit(quotas, B)
    admit(quotas, now_s=30.0)


def test_requests_at_a_time_are_given_back_once_at_their_end():
    quotas = Quotas(Quota(concurrency=2))
    first, _ = admit(quotas), admit(quotas)
    assert refuse(quotas, now_s=1.0).limit is QuotaBound.CONCURRENCY
    first.end(0, 5.0)
    first.end(0, 5.0)
    admit(quotas, now_s=5.0)
    over = refuse(quotas, now_s=5.0)
    # One request of 5 s has moved the mean from 1 s by a tenth; one of two ends in half of the mean.
    assert over.wait_s == pytest.approx((1.0 + 0.1 * 4.0) / 2)


def test_the_most_that_an_answer_may_have_is_reserved_and_what_is_left_of_it_given_back():
    quotas = Quotas(Quota(tokens_per_minute=600))
    lease = quotas.admit(A, 100, 0.0, answer_tokens=400)
    assert isinstance(lease, Lease)
    over = quotas.admit(A, 100, 0.0, answer_tokens=400)
    assert isinstance(over, OverQuota)
    assert (over.limit, over.wait_s) == (QuotaBound.TOKENS, pytest.approx(40.0))
    lease.end(110, 0.0)
    assert isinstance(quotas.admit(A, 90, 0.0, answer_tokens=400), Lease)


def test_a_limit_above_the_whole_quota_passes_once_the_bucket_is_full():
    quotas = Quotas(Quota(tokens_per_minute=600))
    lease = quotas.admit(A, 100, 0.0, answer_tokens=10**9)
    assert isinstance(lease, Lease)
    assert refuse(quotas, tokens=1).wait_s > 0
    lease.end(300, 0.0)
    admit(quotas, tokens=300)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 1)])
def test_another_number_of_gateways_counts_no_reservation_as_a_debt_or_as_paid(before, after):
    quotas = Quotas(Quota(tokens_per_minute=6000))
    quotas.divide(before, 0.0)
    lease = quotas.admit(A, 100, 0.0, answer_tokens=100_000)
    assert isinstance(lease, Lease)
    quotas.divide(after, 0.0)
    assert quotas.look(A, 0.0) is not None
    lease.end(200, 0.0)
    assert lease.use.tokens is not None
    assert lease.use.tokens.level == pytest.approx(6000 / after - 200)


def test_what_an_answer_took_counts_however_much_was_reserved():
    quotas = Quotas(Quota(tokens_per_minute=6000))
    limit = read_answer_limit(Route.COMPLETIONS, {"max_tokens": 2**31, "n": 2**31, "prompt": ["x"] * 1000})
    lease = quotas.admit(A, 100, 0.0, answer_tokens=limit)
    assert isinstance(lease, Lease)
    lease.end(5000, 0.0)
    assert lease.use.tokens is not None
    assert lease.use.tokens.level == pytest.approx(1000)


requests = st.tuples(st.integers(1, 400), st.integers(1, 400), st.floats(0, 1), st.floats(0, 20), st.booleans())


@given(st.lists(requests, max_size=40))
def test_answers_within_their_limits_never_take_more_than_the_quota_gives(rows):
    """However long each answer is, and however many there are at a time."""
    quotas, now_s, taken, open_leases = Quotas(Quota(tokens_per_minute=1000)), 0.0, 0.0, []
    for prompt, limit, part, pause_s, ends in rows:
        now_s += pause_s
        lease = quotas.admit(A, prompt, now_s, answer_tokens=limit)
        if isinstance(lease, Lease):
            open_leases.append((lease, prompt + int(part * limit)))
        if ends and open_leases:
            lease, tokens = open_leases.pop(0)
            lease.end(tokens, now_s)
            taken += tokens
    for lease, tokens in open_leases:
        lease.end(tokens, now_s)
        taken += tokens
    assert taken <= 1000 * (1 + now_s / 60) * (1 + 1e-6)


def test_tokens_are_charged_at_the_admission_and_set_right_at_the_end():
    quotas = Quotas(Quota(tokens_per_minute=600))
    lease = admit(quotas, tokens=500)
    assert refuse(quotas, tokens=200).wait_s == pytest.approx(10.0)
    lease.end(100, 0.0)
    admit(quotas, tokens=500).end(1100, 0.0)
    over = refuse(quotas, tokens=100)
    assert (over.limit, over.wait_s) == (QuotaBound.TOKENS, pytest.approx((600 + 100) / 10))


def test_a_request_that_is_refused_costs_nothing():
    quotas = Quotas(Quota(requests_per_minute=10, tokens_per_minute=60, concurrency=5))
    admit(quotas, tokens=60).end(60, 0.0)
    for _ in range(100):
        refuse(quotas, tokens=1)
    assert admit(quotas, tokens=1, now_s=1.0).use.in_flight == 1


def test_a_prompt_larger_than_the_quota_goes_once_nothing_else_was_taken():
    quotas = Quotas(Quota(tokens_per_minute=60))
    admit(quotas, tokens=100).end(100, 0.0)
    assert refuse(quotas, tokens=100).wait_s == pytest.approx(100.0)
    admit(quotas, tokens=100, now_s=100.0)


def test_of_several_bounds_the_one_that_lasts_longest_is_named():
    quotas = Quotas(Quota(requests_per_minute=1, concurrency=1))
    admit(quotas)
    assert refuse(quotas).limit is QuotaBound.REQUESTS
    assert refuse(quotas, now_s=60.0).limit is QuotaBound.CONCURRENCY


def test_a_key_may_have_a_quota_of_its_own_and_another_one_holds_at_once():
    quotas = Quotas(Quota(requests_per_minute=1))
    own = build_caller("a", quota=Quota(requests_per_minute=10))
    for _ in range(10):
        admit(quotas, own).end(0, 0.0)
    refuse(quotas, own)
    # A reload: twice as much, of which as large a part is used.
    more = build_caller("a", quota=Quota(requests_per_minute=20))
    assert refuse(quotas, more).wait_s == pytest.approx(3.0)
    admit(quotas, build_caller("a", quota=Quota()))


@pytest.mark.parametrize(("gateways", "admitted"), [(0, 10), (1, 10), (2, 5), (3, 3), (100, 1)])
def test_gateways_have_equal_parts_of_a_quota(gateways, admitted):
    quotas = Quotas(Quota(requests_per_minute=10))
    quotas.divide(gateways, 0.0)
    count = 0
    while isinstance(lease := quotas.admit(A, 0, 0.0), Lease):
        lease.end(0, 0.0)
        count += 1
    assert count == admitted


def test_the_number_of_gateways_may_change_while_requests_run():
    quotas = Quotas(Quota(concurrency=4))
    leases = [admit(quotas) for _ in range(4)]
    quotas.divide(3, 0.0)
    for lease in leases[:3]:
        refuse(quotas)
        lease.end(0, 1.0)
    admit(quotas, now_s=1.0)
    refuse(quotas, now_s=1.0)


def test_tenants_that_owe_nothing_are_forgotten(monkeypatch):
    monkeypatch.setattr(quotas_module, "MOST_IDLE_TENANTS", 10)
    quotas = Quotas(Quota(requests_per_minute=60, concurrency=1))
    busy = admit(quotas, build_caller("busy"))
    for number in range(100):
        admit(quotas, build_caller(f"t{number}"), now_s=2.0 * number).end(0, 2.0 * number)
    assert quotas.tenants <= 11
    refuse(quotas, build_caller("busy"), now_s=1000.0)
    busy.end(0, 1000.0)
    admit(quotas, build_caller("busy"), now_s=1000.0)


actions = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(0, 500), st.integers(0, 900), st.floats(0, 30)), max_size=40
)


@given(actions, st.integers(1, 4))
def test_whatever_happens_no_bound_is_passed_and_a_wait_is_honest(rows, gateways):
    quota = Quota(requests_per_minute=30, tokens_per_minute=1000, concurrency=3)
    quotas, now_s, open_leases = Quotas(quota), 0.0, {"a": [], "b": []}
    quotas.divide(gateways, now_s)
    for name, prompt, total, pause_s in rows:
        now_s += pause_s
        caller = build_caller(name)
        got = quotas.admit(caller, prompt, now_s)
        if isinstance(got, Lease):
            open_leases[name].append(got)
            assert len(open_leases[name]) <= math.ceil(3 / gateways)
        else:
            assert got.wait_s > 0
            if open_leases[name]:
                open_leases[name].pop(0).end(total, now_s)
    for name, leases in open_leases.items():
        for lease in leases:
            lease.end(0, now_s)
        assert isinstance(quotas.admit(build_caller(name), 0, now_s + 3600), Lease)


def test_idle_tenants_are_looked_for_once_a_second(monkeypatch):
    monkeypatch.setattr(quotas_module, "MOST_IDLE_TENANTS", 10)
    scans = []
    is_idle = quotas_module.TenantUse.is_idle
    monkeypatch.setattr(quotas_module.TenantUse, "is_idle", lambda use, now_s: scans.append(1) or is_idle(use, now_s))
    quotas = Quotas(Quota(requests_per_minute=60))
    for number in range(30):
        quotas.admit(build_caller(f"t{number}"), 0, 0.0)
    assert len(scans) == 10
    quotas.admit(build_caller("late"), 0, 1.0)
    assert len(scans) == 40


def test_a_place_is_one_of_the_requests_at_a_time_until_it_is_free():
    quotas, caller = Quotas(Quota(concurrency=1, requests_per_minute=1)), build_caller("a")
    place = quotas.reserve(caller, 0.0)
    for over in (quotas.reserve(caller, 0.0), quotas.admit(caller, 0, 0.0)):
        assert isinstance(over, OverQuota)
        assert over.limit is QuotaBound.CONCURRENCY
    place.free()
    place.free()
    assert isinstance(quotas.admit(caller, 0, 0.0), Lease)
    assert isinstance(quotas.reserve(caller, 0.0), OverQuota)
