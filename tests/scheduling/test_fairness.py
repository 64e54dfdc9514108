"""Tenants in one queue: which is served next, the bound of a lag, and one tenant is served as if there were none."""

import random
from collections import Counter
from dataclasses import replace
from itertools import islice
from weakref import ref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_scheduling.request.fairness import REMEMBERED_TENANTS, TenantCounters
from moe_scheduling.request.order import RequestPolicy, RequestSettings, order_key
from moe_scheduling.request.waiting_queue import WaitingQueue

# Powers of two keep the arithmetic exact: 1024 tokens are a second.
FAIR = RequestSettings(ageing_rate=1024.0, ageing_horizon_s=8.0, fairness_horizon_s=4.0)
UNFAIR = RequestSettings(ageing_rate=1024.0, ageing_horizon_s=8.0)
HORIZON_S = FAIR.fairness_horizon_s
# Tokens by which a tenant may be ahead without a lag, and their seconds.
TOLERANCE, TOLERANCE_S = 1024, 1.0


class Item:
    """What waits, where it matters that it is let go."""


def filled(rows, queue_settings=FAIR):
    """Rows of item, tenant, size in tokens, arrival."""
    queue = WaitingQueue(queue_settings)
    for item, tenant, size_tokens, arrival_s in rows:
        queue.push(item, size_tokens=size_tokens, arrival_s=arrival_s, tenant=tenant)
    return queue


def drained(queue):
    return [queue.pop() for _ in range(len(queue))]


# The next request.


@pytest.mark.parametrize(
    ("charges", "order"),
    [
        ([], "abxy"),
        ([("a", TOLERANCE)], "abxy"),
        ([("a", TOLERANCE + 1024)], "axby"),
        ([("a", TOLERANCE + 2048)], "xayb"),
        ([("a", 10**9)], "xyab"),
        ([("a", 2048), ("x", 2048)], "abxy"),
        ([("stranger", 10**6)], "abxy"),
    ],
)
def test_a_tenant_that_was_served_more_comes_later_by_what_it_was_served(charges, order):
    rows = [("a", "a", 0, 0.0), ("b", "a", 0, 1.0), ("x", "x", 0, 1.5), ("y", "x", 0, 2.75)]
    queue = filled(rows)
    for tenant, tokens in charges:
        queue.charge(tenant, tokens)
    assert "".join(queue) == order
    assert [waiting.item for waiting in queue.in_order()] == list(order)
    assert "".join(drained(queue)) == order


def test_the_lag_of_a_tenant_is_added_to_its_keys():
    queue = filled([("a", "a", 1024, 0.0), ("x", "x", 0, 0.0)])
    queue.charge("a", TOLERANCE + 512)
    keys = {waiting.item: waiting.key for waiting in queue.in_order()}
    assert keys["a"] == (1.0 + queue.lag_s("a"), 0.0)
    assert queue.lag_s("a") - queue.lag_s("x") == 0.5
    assert keys["x"] == (queue.lag_s("x"), 0.0)


def test_nobody_has_a_lag_before_a_second_tenant_waits():
    queue = filled([("a", "a", 1024, 0.0)])
    queue.charge("a", 512)
    assert not queue.charges
    assert queue.lag_s("a") == 0.0
    queue.push("x", size_tokens=0, arrival_s=0.0, tenant="x")
    assert queue.charges
    assert queue.lag_s("a") == queue.lag_s("x")


@pytest.mark.parametrize("policy", [RequestPolicy.FCFS, RequestPolicy.PRIORITY])
def test_the_orders_of_vllm_know_no_tenants(policy):
    queue = filled(
        [("a", "a", 0, 0.0), ("x", "x", 0, 1.0)], RequestSettings(policy=policy, fairness_horizon_s=HORIZON_S)
    )
    queue.charge("a", 10**9)
    assert not queue.charges
    assert drained(queue) == ["a", "x"]


def test_other_settings_begin_with_the_tenants_anew():
    queue = filled([("a", "a", 0, 0.0), ("x", "x", 0, 1.0)])
    queue.charge("a", 10**9)
    queue.reorder(UNFAIR)
    assert list(queue) == ["a", "x"]
    queue.reorder(FAIR)
    assert queue.charges
    assert list(queue) == ["a", "x"]
    queue.charge("a", 10**9)
    assert list(queue) == ["x", "a"]


def test_the_same_settings_again_forget_nothing():
    queue = filled([("a", "a", 0, 0.0), ("x", "x", 0, 1.0)])
    queue.charge("a", 10**9)
    queue.reorder(replace(FAIR))
    assert list(queue) == ["x", "a"]


def test_a_request_that_comes_before_its_tenants_first_changes_the_tenants_place():
    queue = filled([("b", "a", 0, 5.0), ("x", "x", 0, 2.0), ("a", "a", 0, 1.0), ("y", "y", 0, 3.0)])
    assert [waiting.item for waiting in queue.in_order()] == list(queue) == ["a", "x", "y", "b"]
    queue.reorder(FAIR)
    assert drained(queue) == ["a", "x", "y", "b"]


def test_a_request_that_changes_its_tenant_is_there_once():
    queue = filled([("a", "a", 0, 0.0), ("x", "x", 0, 1.0), ("a", "x", 0, 2.0)])
    assert (len(queue), list(queue)) == (2, ["x", "a"])
    queue.discard("x")
    queue.discard("x")
    assert drained(queue) == ["a"]
    with pytest.raises(IndexError, match="nothing waits"):
        queue.peek()
    with pytest.raises(KeyError):
        queue.remove("a")


def test_what_was_removed_is_not_found_however_much_it_was():
    queue = filled([(number, f"t{number % 7}", number, number / 100) for number in range(1000)])
    for number in range(1000):
        if number % 10:
            queue.remove(number)
    assert sorted(queue) == list(range(0, 1000, 10))
    assert queue.size_tokens == sum(range(0, 1000, 10))
    assert len(drained(queue)) == 100


# Coming back.


def test_a_tenant_that_idled_has_saved_up_nothing():
    counters = TenantCounters(HORIZON_S)
    for tenant in ("busy", "idler"):
        counters.enter(tenant)
    counters.leave("idler")
    for _ in range(1000):
        counters.charge("busy", 1.0)
    counters.enter("idler")
    assert counters.lag_s("busy") == counters.lag_s("idler") == 0.0


def test_a_tenant_that_is_new_begins_with_the_least_of_those_that_wait():
    counters = TenantCounters(HORIZON_S)
    for tenant in ("busy", "other"):
        counters.enter(tenant)
    counters.charge("busy", 3.0)
    counters.charge("other", 1.0)
    counters.enter("new")
    counters.charge("new", 1.0)
    assert counters.lag_s("busy") == 1.0
    counters.charge("other", TOLERANCE_S + 0.5)
    counters.charge("new", TOLERANCE_S + 0.5)
    assert counters.lag_s("busy") == 0.0


def test_what_is_served_while_nothing_waits_counts_too():
    counters = TenantCounters(HORIZON_S)
    counters.enter("a")
    counters.enter("x")
    counters.leave("a")
    counters.charge("a", TOLERANCE_S + 1.0)
    assert counters.lag_s("a") == 1.0
    counters.enter("a")
    assert (counters.lag_s("a"), counters.lag_s("x")) == (1.0, 0.0)


# Bounds.

actions = st.lists(
    st.tuples(st.sampled_from(["enter", "leave", "charge"]), st.sampled_from("abcd"), st.integers(0, 2000)),
    max_size=200,
)


@given(actions)
def test_lags_are_bounded_and_nothing_served_is_forgotten_while_a_tenant_waits(rows):
    counters, waiting = TenantCounters(HORIZON_S), set()
    for action, tenant, hundredths in rows:
        before = {name: counters.virtual_time_s(name) for name in waiting}
        if action == "charge":
            counters.charge(tenant, hundredths / 100)
        elif action == "enter" and tenant not in waiting:
            waiting.add(tenant)
            counters.enter(tenant)
        elif action == "leave" and tenant in waiting:
            waiting.remove(tenant)
            counters.leave(tenant)
        assert all(counters.virtual_time_s(name) >= before[name] for name in before.keys() & waiting)
        assert all(0.0 <= counters.lag_s(name) <= HORIZON_S for name in "abcde")


requests = st.lists(
    st.tuples(st.integers(0, 20_000), st.floats(0, 50), st.integers(-2, 2), st.sampled_from("abc")),
    min_size=1,
    max_size=40,
)


@given(requests)
def test_one_tenant_is_served_as_if_there_were_none(rows):
    fair, unfair = WaitingQueue(FAIR), WaitingQueue(UNFAIR)
    for number, (size_tokens, arrival_s, priority, _) in enumerate(rows):
        for queue in (fair, unfair):
            queue.push(number, size_tokens=size_tokens, arrival_s=arrival_s, priority=priority, tenant="only")
            queue.charge("only", size_tokens)
    assert list(fair.in_order()) == list(unfair.in_order())
    assert drained(fair) == drained(unfair)


@settings(max_examples=200)
@given(requests, st.randoms(use_true_random=False))
def test_the_order_is_total_and_lazily_the_same_and_nothing_is_lost(rows, dice):
    """A tenant that leaves changes the lags of the others, so that each pop is compared with the order before it."""
    queue, waiting = WaitingQueue(FAIR), {}
    for number, (size_tokens, arrival_s, priority, tenant) in enumerate(rows):
        queue.push(number, size_tokens=size_tokens, arrival_s=arrival_s, priority=priority, tenant=tenant)
        waiting[number] = size_tokens
        if dice.random() < 0.3:
            queue.charge(dice.choice("abcd"), dice.randrange(5000))
        if dice.random() < 0.3:
            gone = dice.choice(sorted(waiting))
            queue.remove(gone)
            del waiting[gone]
    found = list(queue.in_order())
    assert [row.item for row in found] == list(queue)
    assert [row.key for row in found] == sorted(row.key for row in found)
    assert {row.item: row.size_tokens for row in found} == waiting
    assert queue.size_tokens == sum(waiting.values())
    assert [row.item for row in islice(queue.in_order(), 3)] == list(queue)[:3]
    popped = []
    while queue:
        ahead = next(queue.in_order()).item
        popped.append(queue.pop())
        assert popped[-1] == ahead
    assert sorted(popped) == sorted(waiting)


@settings(max_examples=200)
@given(requests, st.randoms(use_true_random=False))
def test_no_request_is_overtaken_by_one_that_came_later_than_its_shift_and_the_horizon(rows, dice):
    """Whatever is charged meanwhile. Within a tenant the bound is that of the keys alone."""
    queue, left = WaitingQueue(FAIR), {}
    for number, (size_tokens, arrival_s, _, tenant) in enumerate(sorted(rows, key=lambda row: row[1])):
        queue.push(number, size_tokens=size_tokens, arrival_s=arrival_s, tenant=tenant)
        key_s, _ = order_key(FAIR, size_tokens=size_tokens, arrival_s=arrival_s)
        left[number] = key_s, arrival_s, tenant
        while left and dice.random() < 0.4:
            served = queue.pop()
            _, served_arrival_s, its = left.pop(served)
            queue.charge(its, dice.randrange(10_000))
            for other_key_s, _, other in left.values():
                assert served_arrival_s <= other_key_s + (0.0 if other == its else HORIZON_S) + 1e-9


# Attacks.


def test_a_flood_does_not_hold_up_the_other_tenant():
    """1,000 requests of one tenant wait when the other's first comes; each that is served is charged."""
    queue = filled([(f"f{number}", "flood", 512, number / 1000) for number in range(1000)])
    queue.push("small", size_tokens=512, arrival_s=1.0, tenant="small")
    served = 0
    while queue.pop() != "small":
        served += 1
        queue.charge("flood", 512)
    # It arrives a second after the first of the flood, and a second of service is within the tolerance.
    assert served <= 6


def test_thousands_of_tenants_cost_bounded_memory():
    counters = TenantCounters(HORIZON_S)
    counters.enter("steady")
    for number in range(20 * REMEMBERED_TENANTS):
        counters.enter(f"t{number}")
        counters.charge(f"t{number}", 0.1)
        counters.leave(f"t{number}")
        counters.charge(f"never-waited-{number}", 0.1)
    assert len(counters._idle) == REMEMBERED_TENANTS
    assert len(counters._served) == 1
    assert len(counters._by_served) == 1


def test_a_tenant_that_comes_and_goes_leaves_nothing_behind():
    queue = filled([("a", "a", 9000, 0.0)])
    for number in range(2000):
        queue.push(number, size_tokens=1, arrival_s=float(number), tenant="x")
        queue.remove(number)
    assert queue._tenants._queues.keys() == {"a"}
    assert drained(queue) == ["a"]


def test_tenants_that_come_and_go_while_another_waits_leave_nothing_behind():
    queue = filled([("a", "a", 0, 0.0), ("b", "b", 0, 0.0)])
    gone = []
    for number in range(2000):
        item = Item()
        gone.append(ref(item))
        queue.push(item, size_tokens=1, arrival_s=1.0, priority=10**9, tenant=f"t{number % 3}")
        assert queue.peek() == "a"
        queue.remove(item)
    del item
    assert len(queue._tenants._heads) == len(queue._tenants._head_of) == 2
    assert not any(one() for one in gone)
    assert drained(queue) == ["a", "b"]


def test_new_names_for_each_request_gain_nothing_over_a_tenant_that_waits_with_one():
    """A client that takes a new name for each request is served as one tenant with the least counter would be."""
    dice = random.Random(0)
    queue, served = WaitingQueue(FAIR), Counter()
    for number in range(4000):
        for owner, tenant in (("one", "one"), ("many", f"many-{number}")):
            queue.push((owner, number), size_tokens=dice.randrange(1000), arrival_s=number / 100, tenant=tenant)
        if number > 100:
            owner, sequence = queue.pop()
            served[owner] += 1
            queue.charge("one" if owner == "one" else f"many-{sequence}", 500)
    assert served["one"] > 0.2 * sum(served.values())
