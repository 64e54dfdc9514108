"""Which engine is let go first."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.fleet.victims import (
    DRAINING_COST,
    IDLE_COST,
    NOT_READY_COST,
    EngineWork,
    order_victims,
    work_left_s,
)
from moe_scheduling.signals import EngineSignal, StepTime

IDLE = EngineSignal()


def rank(**values):
    return EngineSignal(step_time=StepTime(base_s=0.01, prefill_s=0.0001, decode_s=0.0), **values)


def names(*engines):
    return [victim.name for victim in order_victims(engines)]


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({}, {"running": 1}),
        ({"running": 1}, {"running": 2}),
        ({"running": 1}, {"running": 1, "waiting": 1}),
        ({"running": 1}, {"running": 1, "running_prefill_tokens": 10}),
        ({"waiting": 1}, {"waiting": 1, "waiting_prefill_tokens": 10}),
        ({"decode_tokens": 1}, {"decode_tokens": 2}),
    ],
)
def test_the_engine_with_less_work_left_goes_first(less, more):
    engines = EngineWork(name="a", ranks=(rank(**more),)), EngineWork(name="b", ranks=(rank(**less),))
    assert names(*engines) == names(*reversed(engines)) == ["b", "a"]


def test_work_is_that_of_all_ranks():
    wide = EngineWork(name="a", ranks=(rank(running=1), rank(running=1), rank(running=1)))
    assert names(wide, EngineWork(name="b", ranks=(rank(running=2),))) == ["b", "a"]


def test_work_counts_prompt_tokens_and_what_requests_still_have_to_say():
    assert work_left_s(rank()) == 0.0
    assert work_left_s(rank(waiting=1, waiting_prefill_tokens=10_000)) == pytest.approx(1.0 + 128 * 0.01)
    assert work_left_s(rank(running=2, decode_tokens=2)) == pytest.approx(2 * 128 * 0.01)


def test_what_serves_nobody_goes_before_what_serves():
    engines = [
        EngineWork(name="works", ranks=(rank(running=1),)),
        EngineWork(name="idle", ranks=(IDLE,)),
        EngineWork(name="starts", ready=False),
        EngineWork(name="drains", draining=True, ready=False, ranks=(rank(running=99),)),
        EngineWork(name="unknown"),
    ]
    victims = order_victims(engines)
    assert [victim.name for victim in victims] == ["drains", "starts", "idle", "works", "unknown"]
    assert [victim.cost for victim in victims[:3]] == [DRAINING_COST, NOT_READY_COST, IDLE_COST]


def test_an_engine_is_ordered_by_name_among_equals():
    assert names(*(EngineWork(name=name, ranks=(IDLE,)) for name in "bca")) == ["a", "b", "c"]


def cost(work_s, carried=None):
    """The cost of an engine whose ranks have so much work."""
    step_time = StepTime(base_s=work_s / 128, prefill_s=0.0, decode_s=0.0)
    engine = EngineWork(name="a", ranks=(EngineSignal(running=1, step_time=step_time),), cost=carried)
    return order_victims([engine])[0].cost


@pytest.mark.parametrize(
    ("work_s", "bucket"), [(0.001, 1), (0.1, 1), (0.11, 2), (0.2, 2), (0.3, 3), (12.8, 8), (1e300, 40), (math.inf, 40)]
)
def test_costs_are_buckets_of_work_each_twice_the_one_before(work_s, bucket):
    assert cost(work_s) == bucket


@pytest.mark.parametrize(
    ("work_s", "carried", "bucket"),
    [(0.24, 2, 2), (0.26, 2, 3), (0.17, 3, 3), (0.15, 3, 2), (0.12, 1, 1), (1e300, 40, 40), (1e-9, 1, 1)],
)
def test_a_cost_is_kept_while_the_work_is_near_its_bucket(work_s, carried, bucket):
    assert cost(work_s, carried) == bucket


@pytest.mark.parametrize("carried", [-7, 0, 41, 2**31])
def test_a_cost_that_is_no_bucket_is_not_kept(carried):
    assert cost(0.15, carried) == 2


@given(st.floats(0.01, 1e6), st.lists(st.floats(0.9, 1.1), min_size=1, max_size=30))
def test_small_steps_of_the_load_write_no_cost_more_than_once(work_s, steps):
    carried = cost(work_s)
    costs = [carried]
    for step in steps:
        carried = cost(work_s * step, carried)
        costs.append(carried)
    assert sum(before != after for before, after in pairwise(costs)) <= 1


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=8))
def test_more_work_never_costs_less(running):
    victims = order_victims(
        EngineWork(name=f"{number:03}", ranks=(rank(running=count),)) for number, count in enumerate(running)
    )
    assert [victim.cost for victim in victims] == sorted(victim.cost for victim in victims)
    assert [victim.work_s for victim in victims] == sorted(victim.work_s for victim in victims)
