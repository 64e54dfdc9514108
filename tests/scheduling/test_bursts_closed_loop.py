"""A queue and one server in a closed loop, under bursts and under steady arrivals: what the crowd is for."""

import random
from collections import deque
from statistics import mean

import pytest
from moe_scheduling.request import waiting_queue
from moe_scheduling.request.order import RequestPolicy, RequestSettings
from moe_scheduling.request.waiting_queue import WaitingQueue

TOKENS_PER_S = 20_000.0
SJF = RequestSettings(ageing_rate=8000.0)
FCFS = RequestSettings(policy=RequestPolicy.FCFS)
BY_LENGTH = RequestSettings(policy=RequestPolicy.PRIORITY)
COUNT = 400


def arrivals(seed, *, bursty):
    """Arrival and tokens of prompts to 7,400 tokens: in bursts of four times what the server can do, or steady."""
    dice, now_s, rows = random.Random(seed), 0.0, []
    for _ in range(COUNT):
        now_s += dice.expovariate(35.0 if bursty else 3.5)
        if bursty and dice.random() < 1 / 40:
            now_s += dice.expovariate(1 / 4.6)
        rows.append((now_s, min(7400, int(dice.lognormvariate(7.5, 0.8)))))
    return rows


def waits(settings, rows):
    """Seconds from arrival to the end of each prompt, and its tokens; the server takes the queue's first when free."""
    queue, coming, now_s, served = WaitingQueue(settings), deque(enumerate(rows)), 0.0, []
    while queue or coming:
        if not queue:
            now_s = max(now_s, coming[0][1][0])
        while coming and coming[0][1][0] <= now_s:
            number, (arrival_s, tokens) = coming.popleft()
            queue.push(number, size_tokens=tokens, arrival_s=arrival_s, priority=tokens)
        arrival_s, tokens = rows[queue.pop()]
        now_s += tokens / TOKENS_PER_S
        served.append((now_s - arrival_s, tokens))
    return served


def longest_of(served):
    """The longest wait among the longest tenth of the prompts."""
    return max(wait_s for wait_s, _ in sorted(served, key=lambda row: -row[1])[: COUNT // 10])


def mean_of(served):
    return mean(wait_s for wait_s, _ in served)


# Levels of priority are the lengths of prompts here: one for which they count for nothing.
SIZE_ALONE = RequestSettings(ageing_rate=8000.0, priority_step_s=0.0)


@pytest.mark.parametrize("seed", range(5))
def test_a_burst_is_served_by_size_and_its_longest_prompts_wait_less_than_by_length_alone(seed, monkeypatch):
    rows = arrivals(seed, bursty=True)
    ours, stock, by_length = (waits(settings, rows) for settings in (SIZE_ALONE, FCFS, BY_LENGTH))
    monkeypatch.setattr(waiting_queue, "crowd_of", lambda waiting: 1.0)
    without = waits(SIZE_ALONE, rows)
    assert mean_of(ours) < 0.85 * mean_of(stock)
    assert mean_of(ours) < 0.9 * mean_of(without)
    assert longest_of(ours) < longest_of(by_length)
    assert longest_of(ours) < 1.35 * longest_of(without)


@pytest.mark.parametrize("seed", range(5))
def test_where_few_wait_the_crowd_changes_little(seed, monkeypatch):
    rows = arrivals(seed, bursty=False)
    ours = waits(SIZE_ALONE, rows)
    monkeypatch.setattr(waiting_queue, "crowd_of", lambda waiting: 1.0)
    without = waits(SIZE_ALONE, rows)
    assert 0.95 <= mean_of(ours) / mean_of(without) <= 1.01
