"""Which targets of a large fleet a choice looks at."""

import heapq
import itertools
import random
from collections import Counter
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.engine.choice import EngineSettings, Hold, Job, Refuse, Send, SendReason, choose_target
from moe_scheduling.engine.target_list import HOLDERS, LARGE_FLEET, SAMPLE, TargetList, draw
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.signals import EngineSignal, StepTime, Target

NOW_S = 100.0
PREDICTED = EngineSettings()
STEP_TIME = StepTime(base_s=0.01, prefill_s=0.0001, decode_s=0.0)


def target(number):
    return Target(f"engine-{number}")


def target_list(count, **signal):
    states = TargetList(TargetState(target(number)) for number in range(count))
    for state in states:
        state.observe(EngineSignal(step_time=STEP_TIME, **signal), NOW_S)
    return states


def choose(job, states, settings=PREDICTED, *, turn=0, exclude=()):
    return choose_target(job, states, settings, turn=turn, now_s=NOW_S, exclude=exclude)


COUNTS = st.integers(LARGE_FLEET + 1, 400)


@given(COUNTS, st.integers(-(10**20), 10**20))
def test_the_drawn_are_different_and_the_same_each_time(count, turn):
    states = target_list(count)
    drawn = [state.target for state in states.sample((), None, turn)]
    assert len(set(drawn)) == len(drawn) == SAMPLE
    assert drawn == [state.target for state in states.sample((), None, turn)]


@pytest.mark.parametrize("count", [65, 100, 128, 360, 997])
def test_over_the_turns_each_is_drawn_about_as_often(count):
    states = target_list(count)
    drawn = Counter(state.target for turn in range(20 * count) for state in states.sample((), None, turn))
    assert len(drawn) == count
    assert max(drawn.values()) < 1.35 * 20 * SAMPLE
    assert min(drawn.values()) > 0.65 * 20 * SAMPLE


@given(COUNTS, st.sets(st.integers(0, 500)), st.none() | st.integers(0, 500), st.integers(0, 10**9))
def test_holders_and_the_session_are_looked_at_and_the_number_is_bounded(count, held, session, turn):
    states = target_list(count)
    cached = {target(number): 100 for number in held}
    looked_at = {state.target for state in states.sample(cached, None if session is None else target(session), turn)}
    assert len(looked_at) <= SAMPLE + HOLDERS + 1
    known = {number for number in held if number < count}
    if len(held) <= HOLDERS:
        assert {target(number) for number in known} <= looked_at
    if session is not None and session < count:
        assert target(session) in looked_at


def test_of_many_holders_others_are_looked_at_in_each_turn():
    states = target_list(300)
    cached = {target(number): 100 for number in range(100)}
    seen = {state.target for turn in range(500) for state in states.sample(cached, None, turn)[SAMPLE:]}
    assert seen == set(cached)


@pytest.mark.parametrize("count", [LARGE_FLEET + 1, 1000])
def test_a_prefix_and_a_session_are_found_in_a_large_fleet(count):
    states = target_list(count, waiting_prefill_tokens=1000)
    for turn in range(20):
        decision = choose(Job(5000, {target(count - 1): 4000}), states, turn=turn)
        assert (decision.target, decision.reason) == (target(count - 1), SendReason.LEAST_PREDICTED)
        decision = choose(Job(5000, {}, target(7)), states, turn=turn)
        assert (decision.target, decision.reason) == (target(7), SendReason.SESSION)


def test_up_to_the_limit_all_are_looked_at():
    states = target_list(LARGE_FLEET, waiting_prefill_tokens=1000)
    states[40].observe(EngineSignal(step_time=STEP_TIME), NOW_S)
    assert {choose(Job(100), states, turn=turn).target for turn in range(LARGE_FLEET)} == {target(40)}


def test_the_only_one_that_accepts_is_found_whatever_is_drawn():
    states = target_list(500)
    for state in states:
        state.accepting = state.target == target(123)
    assert {choose(Job(100), states, turn=turn).target for turn in range(50)} == {target(123)}
    assert isinstance(choose(Job(100), states, exclude={target(123)}), Refuse)


def test_a_large_fleet_that_is_saturated_holds():
    settings = EngineSettings(saturation_s=0.05)
    assert isinstance(choose(Job(100), target_list(200, waiting_prefill_tokens=1000), settings), Hold)
    assert isinstance(choose(Job(100), target_list(200), settings), Send)


def mean_ttft_s(count, load, seed, *, samples, requests):
    """Of engines that prefill in the order of arrival and send a signal at each end, in virtual time."""
    rng = random.Random(seed)
    states = [TargetState(target(number)) for number in range(count)]
    by_target = {state.target: state for state in states}
    free_s, backlog = dict.fromkeys(by_target, 0.0), dict.fromkeys(by_target, 0)
    rows = TargetList(states) if samples else states
    sizes = [int(rng.lognormvariate(6.5, 1.0)) + 1 for _ in range(requests)]
    rate = load * count / mean(STEP_TIME.base_s + STEP_TIME.prefill_s * size for size in sizes)
    running, numbers, ttft_s, now_s = [], itertools.count(), [], 0.0
    for key, size in enumerate(sizes):
        now_s += rng.expovariate(rate)
        while running and running[0][0] <= now_s:
            done_s, _, at, done_key, done_size = heapq.heappop(running)
            backlog[at] -= done_size
            by_target[at].settled(done_key, done_s)
            by_target[at].observe(EngineSignal(waiting_prefill_tokens=backlog[at], step_time=STEP_TIME), done_s)
        at = choose_target(Job(size), rows, EngineSettings(), turn=key, now_s=now_s).target
        by_target[at].sent(key, size, now_s)
        backlog[at] += size
        free_s[at] = max(free_s[at], now_s) + STEP_TIME.base_s + STEP_TIME.prefill_s * size
        heapq.heappush(running, (free_s[at], next(numbers), at, key, size))
        ttft_s.append(free_s[at] - now_s)
    return mean(ttft_s)


@pytest.mark.parametrize("load", [0.8, 0.95])
def test_a_sample_serves_as_well_as_the_whole_fleet(load):
    whole, sampled = (mean_ttft_s(100, load, 1, samples=samples, requests=2000) for samples in (False, True))
    assert sampled < 1.05 * whole


@pytest.mark.parametrize("count", [1, SAMPLE, SAMPLE + 1, 300])
def test_a_draw_is_distinct_and_gives_each_target_its_turns(count):
    rows = [TargetState(target(number)) for number in range(count)]
    times = Counter()
    for turn in range(1000):
        drawn = draw(rows, turn)
        assert len({row.target for row in drawn}) == len(drawn) == min(count, SAMPLE)
        times.update(row.target for row in drawn)
    assert len(times) == count
    assert min(times.values()) >= 0.5 * max(times.values())
