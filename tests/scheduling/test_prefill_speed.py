"""The measured prefill speed of an engine, and the order of requests while it moves."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.request.fairness import VIRTUAL_S
from moe_scheduling.request.order import (
    DOUBLING_TOKENS,
    HORIZON_DOUBLINGS,
    SMALL_TOKENS,
    RequestPolicy,
    RequestSettings,
    order_key,
)
from moe_scheduling.request.prefill_speed import (
    UNMEASURED_TOKENS_PER_S,
    PrefillSpeed,
    SpeedHistory,
    speed_of,
)
from moe_scheduling.request.waiting_queue import WaitingQueue
from moe_scheduling.signals import StepTime

MEASURED = RequestSettings()
FIXED = RequestSettings(ageing_rate=1000.0)
HORIZON_S = MEASURED.ageing_horizon_s
# Anything a clock or a count may give.
NUMBERS = st.floats() | st.integers(-10, 10**6)
SPEEDS = st.floats(1.0, 1e7)


def measured(steps, **settings):
    speed = PrefillSpeed(**settings)
    for tokens, step_s in steps:
        speed.observe(tokens, step_s)
    return speed


# The estimate.


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], None),
        ([(1000, 0.1)] * 7, None),
        ([(1000, 0.1)] * 8, 10_000),
        ([(0, 0.1), (-5, 0.1), (1000, 0.0), (1000, math.nan), (1000, math.inf), (1000, -1.0)] * 8, None),
        ([(1000, 0.1), (0, 5.0)] * 8, 10_000),
        ([(100, 0.1)] * 8 + [(10_000, 0.1)] * 8, 100_000),
        ([(10, 0.05)] * 100 + [(2000, 2.0)] * 4, 1000),
    ],
    ids=[
        "nothing seen",
        "too little seen",
        "equal steps",
        "what is no step of a prompt says nothing",
        "steps of answers alone say nothing",
        "full steps decide, for the others take as long whatever they hold",
        "full steps of a slow engine are no outliers, though light ones are the rule",
    ],
)
def test_the_speed_is_that_of_full_steps(steps, expected):
    found = measured(steps).tokens_per_s
    assert found == expected if expected is None else found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("place", [0, 3, 7, 40])
def test_a_step_that_compiles_moves_the_speed_by_little(place):
    steps = [(1000, 0.1)] * 60
    steps[place] = (1000, 60.0)
    assert measured(steps).tokens_per_s == pytest.approx(10_000, rel=0.1)


def test_an_engine_that_becomes_slower_is_followed():
    speed = measured([(1000, 0.1)] * 1000)
    for _ in range(1000):
        speed.observe(1000, 0.2)
    assert speed.tokens_per_s == pytest.approx(5000, rel=0.05)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=60))
def test_whatever_is_observed_a_speed_is_a_speed(steps):
    found = measured(steps).tokens_per_s
    assert found is None or 0.0 < found < math.inf


@given(st.lists(st.tuples(st.integers(1, 20_000), st.floats(1e-4, 1e2)), min_size=8, max_size=60))
def test_the_speed_lies_between_the_slowest_and_the_fastest_step(steps):
    """Or above where outliers were cut short: never below the slowest."""
    found = measured(steps, outlier_factor=math.inf).tokens_per_s
    speeds = [tokens / step_s for tokens, step_s in steps]
    assert min(speeds) * (1 - 1e-9) <= found <= max(speeds) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("step_time", "step_tokens", "expected"),
    [
        (None, 2048, None),
        (StepTime(base_s=0.0, prefill_s=0.0, decode_s=0.1), 2048, None),
        (StepTime(base_s=0.0, prefill_s=1e-4, decode_s=0.1), 2048, 10_000),
        (StepTime(base_s=0.1024, prefill_s=0.0, decode_s=0.0), 2048, 20_000),
        (StepTime(base_s=0.1, prefill_s=0.0, decode_s=0.0, prefill_base_s=0.0024), 8192, 80_000),
    ],
)
def test_a_step_time_model_has_the_speed_of_its_full_step(step_time, step_tokens, expected):
    found = speed_of(step_time, step_tokens)
    assert found == (None if expected is None else pytest.approx(expected))


# The speeds that requests count with.


def test_a_request_counts_with_the_greatest_speed_since_it_arrived():
    history = SpeedHistory()
    assert history.at(5.0) == history.tokens_per_s == UNMEASURED_TOKENS_PER_S
    history.note(1.0)
    assert not history.take(8000.0), "slower: nothing that waits is concerned"
    history.note(2.0)
    assert not history.take(2000.0)
    history.note(3.0)
    assert [history.at(at) for at in (0.5, 1.0, 1.5, 2.0, 2.5)] == [16_000.0, 16_000.0, 8000.0, 8000.0, 2000.0]
    assert history.take(9000.0)
    assert [history.at(at) for at in (0.5, 1.0, 1.5, 3.0, 4.0)] == [16_000.0, 16_000.0, 9000.0, 9000.0, 9000.0]


@pytest.mark.parametrize("speed", [None, 0.0, -1.0, math.nan, math.inf, -math.inf, 15_000.0, 16_000.0, 19_000.0])
def test_what_is_no_speed_or_differs_by_little_changes_nothing(speed):
    history = SpeedHistory()
    assert not history.take(speed)
    assert history.tokens_per_s == UNMEASURED_TOKENS_PER_S


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(1.0, 1e9)), max_size=300))
def test_speeds_by_arrival_fall_and_rise_in_time_and_are_few(rows):
    history, arrivals = SpeedHistory(), []
    for arrival_s, speed in rows:
        arrivals.append(arrival_s)
        history.note(arrival_s)
        before = [history.at(at) for at in arrivals]
        rises = history.take(speed)
        after = [history.at(at) for at in arrivals]
        assert all(new >= old for old, new in zip(before, after, strict=True))
        assert rises or before == after
        by_arrival = [history.at(at) for at in sorted(arrivals)]
        assert by_arrival == sorted(by_arrival, reverse=True)
        assert min(after) >= history.tokens_per_s or not rises
    assert len(history._speeds) == len(history._since_s) <= 100


# The key.


def shift_s(size_tokens, speed):
    return order_key(MEASURED, size_tokens=size_tokens, arrival_s=0.0, speed=speed)[0]


@pytest.mark.parametrize(
    ("size_tokens", "doublings"), [(0, 0), (SMALL_TOKENS, 1), (3 * SMALL_TOKENS, 2), (1023 * SMALL_TOKENS, 10)]
)
@pytest.mark.parametrize("speed", [16_384.0, 65_536.0])
def test_each_doubling_stands_back_by_the_time_of_as_many_tokens(size_tokens, doublings, speed):
    assert shift_s(size_tokens, speed) == pytest.approx(min(HORIZON_S, doublings * DOUBLING_TOKENS / speed))


@pytest.mark.parametrize("speed", [1e-300, 1.0, 100.0])
def test_a_slow_engine_tells_sizes_apart_within_the_horizon(speed):
    sizes = [SMALL_TOKENS * (2**doublings - 1) for doublings in range(HORIZON_DOUBLINGS + 2)]
    shifts = [shift_s(size, speed) for size in sizes]
    assert shifts[:-1] == pytest.approx([HORIZON_S * each / HORIZON_DOUBLINGS for each in range(HORIZON_DOUBLINGS + 1)])
    assert shifts[-1] == HORIZON_S


@given(st.integers(0, 10**7), st.integers(0, 10**7), SPEEDS, SPEEDS)
def test_the_shift_rises_with_the_size_falls_with_the_speed_and_keeps_the_horizon(one, other, slow, fast):
    one, other, slow, fast = min(one, other), max(one, other), min(slow, fast), max(slow, fast)
    assert 0.0 <= shift_s(one, fast) <= shift_s(other, fast) <= shift_s(other, slow) <= HORIZON_S


@given(st.integers(8192, 10**7), SPEEDS)
def test_a_prompt_stands_back_the_less_for_its_own_time_the_longer_it_is(size_tokens, speed):
    own_s, twice_s = size_tokens / speed, 2 * size_tokens / speed
    assert shift_s(2 * size_tokens, speed) / twice_s < shift_s(size_tokens, speed) / own_s


@given(st.integers(0, 10**6), SPEEDS)
def test_a_rate_that_is_set_knows_no_speed(size_tokens, speed):
    keys = [order_key(FIXED, size_tokens=size_tokens, arrival_s=0.0, speed=at) for at in (speed, 1.0)]
    assert keys[0] == keys[1] == (min(size_tokens / 1000.0, HORIZON_S), 0.0)


# The order while the estimate moves.


def filled(rows, settings=MEASURED):
    queue = WaitingQueue(settings)
    for item, size_tokens, arrival_s in rows:
        queue.push(item, size_tokens=size_tokens, arrival_s=arrival_s)
    return queue


def test_a_faster_engine_is_nearer_to_the_order_of_arrival():
    rows = [("long", 8192, 0.0), ("short", 16, 1.0)]
    assert list(filled(rows)) == ["short", "long"]
    queue = filled(rows)
    queue.take_speed(1e6)
    assert list(queue) == ["long", "short"]
    queue.take_speed(100.0)
    assert list(queue) == ["long", "short"], "what has come first does not fall back"
    queue.push("late", size_tokens=8192, arrival_s=2.0)
    queue.push("later", size_tokens=16, arrival_s=3.0)
    assert list(queue) == ["long", "short", "later", "late"]


def test_a_request_that_comes_back_takes_its_place_again_at_whatever_speed_now():
    queue = filled([("long", 8192, 0.0), ("short", 16, 5.0)])
    queue.take_speed(1e6)
    queue.take_speed(100.0)
    assert queue.pop() == "long"
    queue.push("long", size_tokens=8192, arrival_s=0.0)
    assert list(queue) == ["long", "short"]
    key = queue.key(size_tokens=8192, arrival_s=0.0, priority=0, tenant="")
    assert key == next(queue.in_order()).key


@pytest.mark.parametrize("policy", [RequestPolicy.FCFS, RequestPolicy.PRIORITY])
def test_other_orders_know_no_speed_and_neither_does_a_rate_that_is_set(policy):
    rows = [("a", 8192, 0.0), ("b", 16, 0.25), ("c", 4000, 0.5)]
    for settings in (RequestSettings(policy=policy), FIXED):
        queue = filled(rows, settings)
        before = list(queue.in_order())
        queue.take_speed(1e6)
        assert list(queue.in_order()) == before


def test_the_speed_in_force_holds_for_another_policy_and_back():
    queue = filled([("long", 8192, 0.0), ("short", 16, 1.0)], RequestSettings(policy=RequestPolicy.FCFS))
    queue.take_speed(100.0)
    queue.push("later", size_tokens=16, arrival_s=2.0)
    queue.take_speed(1e6)
    queue.reorder(MEASURED)
    assert list(queue) == ["long", "short", "later"]


events = st.lists(
    st.tuples(st.integers(0, 20_000), st.integers(0, 80), st.sampled_from("ab"), st.none() | SPEEDS, st.booleans()),
    min_size=1,
    max_size=50,
)


@given(events, st.sampled_from([0.0, 4.0]))
def test_whatever_the_estimate_does_none_falls_back_or_is_overtaken_from_beyond_the_horizon(rows, fairness_s):
    """Nor by a later one of its tenant that is no shorter. The bound between tenants is wider by their horizon."""
    queue = WaitingQueue(RequestSettings(fairness_horizon_s=fairness_s))
    left, keys, now_s = {}, {}, 0.0
    for number, (size_tokens, gap, tenant, speed, serves) in enumerate(rows):
        now_s += gap / 16
        queue.push(number, size_tokens=size_tokens, arrival_s=now_s, tenant=tenant)
        left[number] = size_tokens, now_s, tenant
        queue.take_speed(speed)
        for item, (size, arrival_s, its) in left.items():
            key_s, _ = queue.key(size_tokens=size, arrival_s=arrival_s, priority=0, tenant=its)
            key_s -= queue.lag_s(its)
            assert arrival_s - 1e-9 <= key_s <= keys.get(item, arrival_s + HORIZON_S) + 1e-9
            keys[item] = key_s
        assert sorted(queue) == sorted(left)
        assert [row.item for row in queue.in_order()] == list(queue)
        if serves:
            served = queue.pop()
            size, arrival_s, charged = left.pop(served)
            queue.charge(charged, size)
            for other_size, other_arrival_s, its in left.values():
                reach_s = HORIZON_S + (0.0 if its == charged else fairness_s)
                assert arrival_s <= other_arrival_s + reach_s + 1e-9
                assert its != charged or arrival_s <= other_arrival_s or size <= other_size


def test_a_change_of_speed_forgets_no_service_of_tenants():
    queue = WaitingQueue(MEASURED)
    for number in range(3):
        queue.push(f"a{number}", size_tokens=16, arrival_s=0.0, tenant="a")
        queue.push(f"x{number}", size_tokens=16, arrival_s=0.5, tenant="x")
    queue.charge("a", 2 * UNMEASURED_TOKENS_PER_S)
    lag_s = 2 * VIRTUAL_S - 2.5
    assert (queue.lag_s("a"), queue.lag_s("x")) == (pytest.approx(lag_s), 0.0)
    queue.take_speed(1e6)
    assert (queue.lag_s("a"), queue.lag_s("x")) == (pytest.approx(lag_s), 0.0)
    assert list(queue) == ["x0", "x1", "x2", "a0", "a1", "a2"]
    queue.charge("a", 1e6)
    assert queue.lag_s("a") == pytest.approx(lag_s + VIRTUAL_S)
    assert [queue.pop() for _ in range(6)] == ["x0", "x1", "x2", "a0", "a1", "a2"]
