"""Micro-benchmarks of the decisions for a request: order, prefill budget, choice of the engine, prefix, accounting.

Run by `python -m moe_lab`. Each value is the CPU time of one call, as the mean over a batch of calls.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

from moe_scheduling.engine.choice import DispatchPolicy, EngineSettings, Job, choose_target
from moe_scheduling.engine.prefix_index import PrefixIndex, block_keys
from moe_scheduling.engine.target_list import TargetList
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.request.order import RequestPolicy, RequestSettings
from moe_scheduling.request.prefill_budget import RankLoad, RooflineKnee, StepTimeCurve, plan_prefill_tokens
from moe_scheduling.request.waiting_queue import WaitingQueue
from moe_scheduling.signals import EngineSignal, StepTime, Target

from moe_lab.rows import BenchmarkRow

BATCHES = 30
CALLS = 1000
WAITING = 10_000
TENANTS = 100
IN_FLIGHT = 100
PROMPT_BYTES = 4096
NOW_S = 100.0


def run() -> Iterator[BenchmarkRow]:
    """Yields the rows of all benchmarks."""
    yield from _queue_rows()
    yield from _tenant_rows()
    yield from _plan_rows()
    yield from _choice_rows()
    yield from _prefix_rows()
    yield _accounting_row()


def _queue_rows() -> Iterator[BenchmarkRow]:
    randomness = random.Random(0)
    sizes = [randomness.randrange(5000) for _ in range(WAITING + BATCHES * CALLS)]
    for policy in RequestPolicy:
        queue: WaitingQueue[int] = WaitingQueue(RequestSettings(policy=policy))
        for item in range(WAITING):
            queue.push(item, size_tokens=sizes[item], arrival_s=item / 100)
        pushes, pops = [], []
        for first in range(WAITING, len(sizes), CALLS):
            begun_s = time.process_time()
            for item in range(first, first + CALLS):
                queue.push(item, size_tokens=sizes[item], arrival_s=item / 100)
            pushed_s = time.process_time()
            for _ in range(CALLS):
                queue.pop()
            pushes.append((pushed_s - begun_s) / CALLS * 1e6)
            pops.append((time.process_time() - pushed_s) / CALLS * 1e6)
        yield _row("queue", f"push, {policy}, {WAITING} wait", pushes, "< 5 us")
        yield _row("queue", f"pop, {policy}, {WAITING} wait", pops, "< 5 us")


def _tenant_rows() -> Iterator[BenchmarkRow]:
    """The engine's use: each popped request is charged, and the first few are read before each step."""
    randomness = random.Random(0)
    queue: WaitingQueue[int] = WaitingQueue(RequestSettings())
    count = WAITING + BATCHES * CALLS
    sizes = [randomness.randrange(5000) for _ in range(count)]
    tenants = [f"{randomness.randrange(TENANTS):08x}" for _ in range(count)]
    pushes, pops, firsts = [], [], []
    for first in range(0, count, CALLS):
        begun_s = time.process_time()
        for item in range(first, first + CALLS):
            queue.push(item, size_tokens=sizes[item], arrival_s=item / 100, tenant=tenants[item])
        pushed_s = time.process_time()
        if first < WAITING:
            continue
        for _ in range(CALLS):
            item = queue.pop()
            queue.charge(tenants[item], sizes[item])
        popped_s = time.process_time()
        for _ in range(CALLS):
            list(islice(queue.in_order(), 4))
        pushes.append((pushed_s - begun_s) / CALLS * 1e6)
        pops.append((popped_s - pushed_s) / CALLS * 1e6)
        firsts.append((time.process_time() - popped_s) / CALLS * 1e6)
    case = f"sjf, {WAITING} of {TENANTS} tenants wait"
    yield _row("queue", f"push, {case}", pushes, "< 5 us")
    yield _row("queue", f"pop and charge, {case}", pops, "< 5 us")
    yield _row("queue", f"first 4, {case}", firsts)


def _plan_rows() -> Iterator[BenchmarkRow]:
    curve = StepTimeCurve(0.00002, 0.01, (RooflineKnee(1536, 0.00001),))
    for count in (2, 8):
        ranks = [RankLoad(number * 500 % 2048, 50, 4) for number in range(count)]
        for title, known in (("", None), (", cut at a knee", curve)):
            values = _call_us(partial(plan_prefill_tokens, ranks, known))
            yield _row("prefill", f"plan, {count} ranks{title}", values, "" if title else "< 10 us")
    queue: WaitingQueue[int] = WaitingQueue(RequestSettings())
    for item in range(WAITING):
        queue.push(item, size_tokens=item * 7919 % 5000, arrival_s=item / 100)
    yield _row("prefill", f"first 4 of {WAITING} that wait", _call_us(lambda: list(islice(queue.in_order(), 4))))


def _choice_rows() -> Iterator[BenchmarkRow]:
    for count, goal in ((1, ""), (2, "< 5 us"), (10, ""), (100, ""), (1000, "< 50 us")):
        states = TargetList(_busy_state(Target(f"engine-{number}")) for number in range(count))
        job = Job(1000, {states[0].target: 512}, states[-1].target)
        for policy in DispatchPolicy:
            settings = EngineSettings(policy=policy)
            values = _call_us(partial(_choose_next, itertools.count(), job, states, settings))
            shown = goal if policy is DispatchPolicy.PREDICTED or count < 10 else ""
            yield _row("choice of the engine", f"{policy}, {count} targets", values, shown)


def _choose_next(turns: Iterator[int], job: Job, states: TargetList, settings: EngineSettings) -> None:
    choose_target(job, states, settings, turn=next(turns), now_s=NOW_S)


def _busy_state(target: Target) -> TargetState:
    state = TargetState(target)
    step_time = StepTime(base_s=0.004, prefill_s=0.0001, decode_s=0.0002)
    state.observe(EngineSignal(running=8, waiting_prefill_tokens=3000, decode_tokens=8, step_time=step_time), NOW_S - 1)
    for key in range(IN_FLIGHT):
        state.sent(key, 500, NOW_S)
    return state


def _prefix_rows() -> Iterator[BenchmarkRow]:
    prompt = random.Random(0).randbytes(PROMPT_BYTES)
    keys, index, targets = block_keys(prompt), PrefixIndex(), [Target("engine-0"), Target("engine-1")]
    for target in targets:
        index.record(keys, target)
    case = f"{PROMPT_BYTES} bytes"
    yield _row("prefix", f"keys, {case}", _call_us(lambda: block_keys(prompt)), "< 20 us")
    yield _row("prefix", f"held, {case}, 2 targets", _call_us(lambda: index.held_blocks(keys)))
    yield _row("prefix", f"record, {case}", _call_us(lambda: index.record(keys, targets[0])))


def _accounting_row() -> BenchmarkRow:
    state = _busy_state(Target("engine-0"))

    def one_request() -> None:
        state.sent("request", 500, NOW_S)
        state.first_token("request", NOW_S)
        state.settled("request", NOW_S)

    return _row("in-flight accounting", f"sent, first token and settled, {IN_FLIGHT} in flight", _call_us(one_request))


def _row(benchmark: str, case: str, values: Sequence[float], goal: str = "") -> BenchmarkRow:
    return BenchmarkRow(benchmark=benchmark, case=case, unit="us", values=tuple(values), goal=goal)


def _call_us(call: Callable[[], object]) -> list[float]:
    values = []
    for _ in range(BATCHES):
        begun_s = time.process_time()
        for _ in range(CALLS):
            call()
        values.append((time.process_time() - begun_s) / CALLS * 1e6)
    return values
