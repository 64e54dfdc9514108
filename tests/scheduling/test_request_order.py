"""The order of requests: what each policy serves first, and the bound on waiting under `sjf`."""

import gc
import weakref
from collections import deque
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from moe_scheduling.request.order import RequestPolicy, RequestSettings, order_key
from moe_scheduling.request.waiting_queue import WaitingQueue

FCFS = RequestSettings(policy=RequestPolicy.FCFS)
PRIORITY = RequestSettings(policy=RequestPolicy.PRIORITY)
# A rate that is a power of two keeps the arithmetic of these tests exact.
SJF = RequestSettings(policy=RequestPolicy.SJF, ageing_rate=1024.0, ageing_horizon_s=8.0, priority_step_s=2.0)
ALL = (FCFS, PRIORITY, SJF)


class Request(NamedTuple):
    name: str
    size_tokens: int
    arrival_s: float
    priority: int = 0


def filled(settings, *requests):
    queue = WaitingQueue(settings)
    for request in requests:
        push(queue, request)
    return queue


def push(queue, request, *, front=False):
    queue.push(
        request,
        size_tokens=request.size_tokens,
        arrival_s=request.arrival_s,
        priority=request.priority,
        front=front,
    )


def drained(queue):
    return "".join(queue.pop().name for _ in range(len(queue)))


@pytest.mark.parametrize(
    ("settings", "requests", "order"),
    [
        (FCFS, [Request("a", 9000, 1.0), Request("b", 1, 2.0, -5)], "ab"),
        (FCFS, [Request("b", 1, 2.0), Request("a", 9000, 1.0)], "ab"),
        (PRIORITY, [Request("a", 1, 1.0, 1), Request("b", 1, 2.0, 0)], "ba"),
        (PRIORITY, [Request("b", 1, 2.0, 3), Request("a", 9000, 1.0, 3)], "ab"),
        (SJF, [Request("long", 4096, 0.0), Request("s", 64, 1.0)], "slong"),
        (SJF, [Request("l", 4096, 0.0), Request("s", 64, 4.0)], "ls"),
        (SJF, [Request("l", 10**9, 0.0), Request("s", 0, 7.9), Request("t", 0, 8.1)], "slt"),
        (SJF, [Request("a", 1024, 0.0), Request("u", 1024, 1.9, -1), Request("v", 1024, 2.1, -1)], "uav"),
        (SJF, [Request("b", 0, 1.0), Request("a", 1024, 0.0)], "ab"),
    ],
    ids=[
        "fcfs knows neither size nor priority",
        "fcfs serves by arrival, not by push",
        "priority serves the lower level first",
        "priority serves one level by arrival",
        "sjf serves the shorter first",
        "sjf serves what waited long enough first",
        "sjf lets nobody overtake from beyond the horizon",
        "sjf gives a level of priority its head start and no more",
        "equal keys are served by arrival",
    ],
)
def test_order_of_service(settings, requests, order):
    assert drained(filled(settings, *requests)) == order


@pytest.mark.parametrize("settings", ALL, ids=lambda settings: settings.policy)
def test_what_is_equal_is_served_in_the_order_of_the_pushes(settings):
    assert drained(filled(settings, *(Request(name, 10, 1.0) for name in "qwerty"))) == "qwerty"


def test_the_front_of_fcfs_serves_the_last_push_first():
    queue = filled(FCFS, Request("a", 1, 1.0))
    push(queue, Request("x", 1, 5.0), front=True)
    push(queue, Request("y", 1, 6.0), front=True)
    push(queue, Request("b", 1, 0.0))
    assert drained(queue) == "yxba"


@pytest.mark.parametrize("settings", [PRIORITY, SJF], ids=lambda settings: settings.policy)
def test_other_policies_have_no_front(settings):
    queue = filled(settings, Request("a", 10, 1.0))
    push(queue, Request("b", 10, 2.0), front=True)
    assert drained(queue) == "ab"


def test_the_front_survives_a_change_of_policy_and_back():
    queue = filled(FCFS, Request("a", 1, 1.0))
    push(queue, Request("x", 4096, 2.0), front=True)
    queue.reorder(SJF)
    assert [request.name for request in queue] == ["a", "x"]
    queue.reorder(FCFS)
    assert drained(queue) == "xa"


def test_reorder_applies_to_what_waits_and_to_what_comes():
    queue = filled(FCFS, Request("l", 4096, 0.0), Request("s", 1, 1.0))
    queue.reorder(SJF)
    assert queue.settings is SJF
    push(queue, Request("t", 0, 0.5))
    assert drained(queue) == "tsl"


def test_reorder_keeps_the_order_of_equals():
    queue = filled(SJF, *(Request(name, 10, 1.0) for name in "qwerty"))
    queue.remove(Request("w", 10, 1.0))
    queue.reorder(FCFS)
    assert drained(queue) == "qerty"


def test_a_second_push_replaces_the_first():
    queue = WaitingQueue(SJF)
    queue.push("a", size_tokens=5000, arrival_s=0.0)
    queue.push("b", size_tokens=100, arrival_s=0.0)
    queue.push("a", size_tokens=10, arrival_s=0.0)
    assert list(queue) == ["a", "b"]
    assert (len(queue), queue.size_tokens) == (2, 110)


def test_an_empty_queue_says_so():
    queue = WaitingQueue(SJF)
    assert not queue
    assert list(queue) == []
    for operation in (queue.pop, queue.peek):
        with pytest.raises(IndexError):
            operation()
    with pytest.raises(KeyError):
        queue.remove("absent")
    queue.discard("absent")
    queue.reorder(FCFS)
    assert (len(queue), queue.size_tokens) == (0, 0)


def test_iteration_is_undisturbed_by_what_happens_meanwhile():
    queue = filled(FCFS, *(Request(name, 1, float(at)) for at, name in enumerate("abc")))
    served = [queue.pop().name if request in queue else "gone" for request in queue]
    assert served == ["a", "b", "c"]
    assert not queue


@pytest.mark.parametrize("kept", [0, 10])
def test_memory_follows_what_waits_not_what_waited(kept):
    class Prompt:
        pass

    queue = WaitingQueue(SJF)
    prompts = [Prompt() for _ in range(2000)]
    for at, prompt in enumerate(prompts):
        queue.push(prompt, size_tokens=at, arrival_s=0.0)
    alive = weakref.WeakSet(prompts)
    for prompt in prompts[kept:]:
        queue.remove(prompt)
    del prompts, prompt
    gc.collect()
    assert kept <= len(alive) <= 20 * kept


class AgainstASortedList(RuleBasedStateMachine):
    """Whatever is done to the queue, it does what a list does that is sorted at each look."""

    items = Bundle("items")

    def __init__(self):
        super().__init__()
        self.queue = WaitingQueue(SJF)
        self.settings = SJF
        self.model = {}
        self.pushes = 0
        self.fronts = 0

    def place(self, item):
        size_tokens, arrival_s, priority, sequence, front = self.model[item]
        if front and self.settings is FCFS:
            return (float("-inf"), -front, sequence)
        return (*order_key(self.settings, size_tokens=size_tokens, arrival_s=arrival_s, priority=priority), sequence)

    def sorted(self):
        return sorted(self.model, key=self.place)

    @rule(
        target=items,
        item=st.integers(0, 30),
        size_tokens=st.integers(0, 20000),
        arrival_s=st.integers(0, 20),
        priority=st.integers(-2, 2),
        front=st.booleans(),
    )
    def push(self, item, size_tokens, arrival_s, priority, front):
        self.pushes += 1
        self.fronts += front
        self.queue.push(item, size_tokens=size_tokens, arrival_s=arrival_s, priority=priority, front=front)
        self.model[item] = (size_tokens, arrival_s, priority, self.pushes, front and self.fronts)
        return item

    @rule()
    def pop(self):
        if self.model:
            first = self.sorted()[0]
            assert self.queue.peek() == first
            assert self.queue.pop() == first
            del self.model[first]

    @rule(item=consumes(items))
    def discard(self, item):
        self.queue.discard(item)
        self.model.pop(item, None)

    @rule(settings=st.sampled_from(ALL))
    def reorder(self, settings):
        self.settings = settings
        self.queue.reorder(settings)

    @invariant()
    def the_same_waits_in_the_same_order(self):
        assert list(self.queue) == self.sorted()
        assert len(self.queue) == len(self.model)
        assert bool(self.queue) == bool(self.model)
        assert all(item in self.queue for item in self.model)
        assert self.queue.size_tokens == sum(size_tokens for size_tokens, *_ in self.model.values())


TestAgainstASortedList = AgainstASortedList.TestCase


def arriving(priorities):
    """Requests in the order of their arrival, at eighths of a second."""
    fields = st.tuples(st.integers(0, 20000), st.integers(0, 24), priorities)
    return st.lists(fields, min_size=1, max_size=40).map(_accumulate)


def _accumulate(rows):
    now_s, requests = 0.0, []
    for at, (size_tokens, gap, priority) in enumerate(rows):
        now_s += gap / 8
        requests.append(Request(str(at), size_tokens, now_s, priority))
    return requests


def served_by_one_server(requests, tokens_per_s):
    """Each request and the start of its service, by a server that takes the queue's first whenever it is free."""
    queue, coming, now_s, served = WaitingQueue(SJF), deque(requests), 0.0, []
    while queue or coming:
        if not queue:
            now_s = max(now_s, coming[0].arrival_s)
        while coming and coming[0].arrival_s <= now_s:
            push(queue, coming.popleft())
        request = queue.pop()
        served.append((request, now_s))
        now_s += request.size_tokens / tokens_per_s
    return served


def shift_s(request):
    return min(request.size_tokens / SJF.ageing_rate, SJF.ageing_horizon_s)


@given(arriving(st.integers(-2, 2)), st.sampled_from([256.0, 1024.0, 8192.0]))
def test_none_is_overtaken_from_beyond_its_window(requests, tokens_per_s):
    served = served_by_one_server(requests, tokens_per_s)
    assert sorted(request for request, _ in served) == sorted(requests)
    for at, (request, _) in enumerate(served):
        for overtaking, _ in served[:at]:
            head_start_s = max(0, request.priority - overtaking.priority) * SJF.priority_step_s
            assert overtaking.arrival_s <= request.arrival_s + shift_s(request) + head_start_s


@given(arriving(st.just(0)), st.sampled_from([256.0, 1024.0, 8192.0]))
def test_the_wait_is_bounded_by_the_work_there_and_the_work_of_the_window(requests, tokens_per_s):
    served = served_by_one_server(requests, tokens_per_s)
    left_s = {request: start_s + request.size_tokens / tokens_per_s for request, start_s in served}
    for request, start_s in served:
        there = sum(
            min(other.size_tokens, max(0.0, left_s[other] - request.arrival_s) * tokens_per_s)
            for other in requests
            if other is not request and other.arrival_s <= request.arrival_s
        )
        window = sum(
            other.size_tokens
            for other in requests
            if request.arrival_s < other.arrival_s <= request.arrival_s + shift_s(request)
        )
        assert start_s - request.arrival_s <= (there + window) / tokens_per_s + 1e-9


@given(st.integers(0, 10**6), st.floats(0, 1e6), st.integers(-5, 5), st.floats(0, 1e6))
def test_the_key_does_not_depend_on_the_zero_of_the_clock(size_tokens, arrival_s, priority, later_s):
    (key_s, _), (shifted_s, _) = (
        order_key(SJF, size_tokens=size_tokens, arrival_s=at_s, priority=priority)
        for at_s in (arrival_s, arrival_s + later_s)
    )
    assert shifted_s - key_s == pytest.approx(later_s, abs=1e-6)


@pytest.mark.parametrize("settings", ALL, ids=lambda settings: settings.policy)
@given(
    requests=st.lists(st.tuples(st.integers(0, 5000), st.floats(0, 20), st.integers(-2, 2)), max_size=80),
    removed=st.sets(st.integers(0, 79)),
    taken=st.integers(0, 20),
)
def test_the_first_ones_are_found_in_the_order_of_service_without_a_sort(settings, requests, removed, taken):
    queue = filled(settings, *(Request(str(number), *row) for number, row in enumerate(requests)))
    for number in removed:
        if number < len(requests):
            queue.remove(Request(str(number), *requests[number]))
    for _ in range(min(taken, len(queue))):
        queue.pop()
    found = list(queue.in_order())
    assert [waiting.item for waiting in found] == list(queue)
    for waiting in found:
        size, arrival_s, priority = waiting.item[1:]
        assert waiting.size_tokens == size
        assert waiting.key == order_key(settings, size_tokens=size, arrival_s=arrival_s, priority=priority)
