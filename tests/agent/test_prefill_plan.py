"""Prefills of a step, in vLLM's own scheduler: prompts that yield, KV blocks kept free, ranks that step together."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from moe_agent.shared_memory.prefill_record import PrefillRecordReader, PrefillRecordWriter, PrefillState, StepPart
from moe_scheduling.request.prefill_budget import RankLoad, StepTimeCurve
from moe_scheduling.signals import StepTime
from moe_tools.virtual_engine import VirtualEngine


def prefill_steps(engine: VirtualEngine, name: str) -> list[int]:
    """The steps in which a request computed more than one token."""
    return [number for number, step in enumerate(engine.schedules) if step.get(name, 0) > 1]


# Prompts in chunks.


@pytest.mark.parametrize(("yields", "first"), [(True, "short"), (False, "long")])
def test_a_prompt_in_chunks_lets_a_short_one_go_first(make_engine, settings, yields, first):
    settings.put(policy="sjf", yield_prefills=yields)
    engine = make_engine(step_tokens=256)
    engine.add("long", 2000, arrival_s=0.0)
    engine.step()
    engine.add("short", 200, arrival_s=0.1)
    engine.run()
    assert engine.first_token_order[0] == first
    assert len(engine.finished_order) == 2


def test_the_chunk_takes_what_the_short_one_leaves_of_the_step(make_engine, settings):
    settings.put(policy="sjf")
    engine = make_engine(step_tokens=256)
    engine.add("long", 2000, arrival_s=0.0)
    engine.step()
    engine.add("short", 100, arrival_s=0.1)
    engine.step()
    step = engine.schedules[1]
    assert step["short"] == 100
    # One token of the step is left aside for the sequence of the long one.
    assert step["long"] in (155, 156)
    engine.run()


def test_a_long_prompt_is_not_starved_by_short_ones_that_never_end(make_engine, settings):
    settings.put(policy="sjf", ageing_rate=1000.0, ageing_horizon_s=1.0)
    engine = make_engine(step_tokens=128, max_num_seqs=8, kv_blocks=2000)
    engine.pace = lambda prefill_tokens, decoding: 0.01
    engine.add("long", 3000, arrival_s=0.0)
    number = 0
    while "long" not in engine.first_token_order:
        number += 1
        assert number < 2000
        engine.add(f"s{number}", 128, out=1, arrival_s=engine.now_s)
        engine.step()
    # Overtaken for the horizon, then first: 24 chunks of a hundredth of a second each, and a chunk in its way.
    assert engine.now_s < 1.0 + 0.5


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_other_orders_let_nobody_go_first(make_engine, settings, policy):
    settings.put(policy=policy)
    engine = make_engine(step_tokens=256)
    engine.add("long", 2000, arrival_s=0.0)
    engine.step()
    engine.add("short", 200, arrival_s=0.1)
    engine.run()
    assert engine.first_token_order[0] == "long"


# Room to grow.


def through_a_small_cache(make_engine: Any, settings: Any, growth: int) -> VirtualEngine:
    settings.put(policy="sjf", kv_growth_blocks=growth)
    engine = make_engine(max_num_seqs=8, step_tokens=128, kv_blocks=32)
    for number in range(24):
        engine.add(f"r{number}", 60, out=40, arrival_s=number * 0.001)
    return engine.run()


def test_room_to_grow_avoids_preemptions(make_engine, settings):
    tight = through_a_small_cache(make_engine, settings, 0)
    roomy = through_a_small_cache(make_engine, settings, 3)
    assert tight.scheduler._preemptions > 0
    assert roomy.scheduler._preemptions == 0
    assert len(tight.finished_order) == len(roomy.finished_order) == 24


def test_more_room_than_there_is_serves_one_by_one(make_engine, settings):
    engine = through_a_small_cache(make_engine, settings, 1000)
    assert len(engine.finished_order) == 24
    assert max(len(step) for step in engine.schedules) == 1


# Ranks that keep step.


class SharedStates:
    """The published states of a group, as one rank sees them."""

    def __init__(self, states: dict[int, PrefillState], number: int) -> None:
        self.states, self.number = states, number

    def publish(self, state: PrefillState) -> None:
        self.states[self.number] = state

    def others(self, now_s: float) -> list[PrefillState]:
        return [state for number, state in self.states.items() if number != self.number]


class Lockstep:
    """Engines whose steps end together."""

    def __init__(self, engines: list[VirtualEngine]) -> None:
        self.engines = engines
        states: dict[int, PrefillState] = {}
        for number, engine in enumerate(engines):
            engine.scheduler._step_time._line = StepTime(base_s=0.01, prefill_s=0.0001, decode_s=0.0)
            engine.scheduler._step_time.observe = lambda **_: None
            engine.scheduler.join(SharedStates(states, number))

    def step(self) -> bool:
        """One step of all; the order in which ranks plan changes from step to step."""
        order = self.engines[:: 1 if len(self.engines[0].schedules) % 2 else -1]
        moved = [engine.step() for engine in order]
        now_s = max(engine.now_s for engine in self.engines)
        for engine in self.engines:
            engine.now_s = now_s
        return any(moved)


@pytest.fixture
def lockstep(make_engine, settings):
    def make(**values: Any) -> Lockstep:
        settings.put(policy="sjf", **values)
        engines = [make_engine(max_num_seqs=32, step_tokens=1024, kv_blocks=4000) for _ in range(2)]
        for engine in engines:
            engine.pace = lambda prefill_tokens, decoding: 0.01 + 0.0001 * prefill_tokens
        return Lockstep(engines)

    return make


def decode(group: Lockstep, rank: int, requests: int) -> None:
    """Lets a rank decode; so early that both ranks prefill at once."""
    for number in range(requests):
        group.engines[rank].add(f"d{rank}{number}", 10, out=400, arrival_s=0.0)


@pytest.mark.parametrize("case", ["in a group", "alone"])
def test_a_prefill_goes_into_the_next_step_whatever_the_other_rank_does(lockstep, case):
    group = lockstep()
    decode(group, 0, 10)
    decode(group, 1, 10)
    if case == "alone":
        group.engines[0].scheduler._plan.group = None
    for _ in range(5):
        group.step()
    group.engines[0].add("a", 1000, arrival_s=1.0)
    group.step()
    assert len(prefill_steps(group.engines[0], "a")) == 1


@pytest.mark.parametrize("seed", range(3))
def test_whatever_comes_all_are_served(lockstep, seed):
    group, dice = lockstep(), random.Random(seed)
    names = 0
    for step in range(300):
        for rank in (0, 1):
            if dice.random() < 0.15:
                names += 1
                group.engines[rank].add(
                    f"r{names}", dice.randrange(1, 3000), out=dice.randrange(1, 60), arrival_s=step / 100
                )
        if dice.random() < 0.02:
            group.engines[0].abort(f"r{dice.randrange(1, names + 1)}")
        group.step()
    for _ in range(20_000):
        if not group.step():
            break
    assert not any(engine.scheduler.has_unfinished_requests() for engine in group.engines)


# Orders that are vLLM's own.


def step_each(engines: list[VirtualEngine]) -> bool:
    moved = [engine.step() for engine in engines]
    return any(moved)


def play_on_two(engines: list[VirtualEngine], step: Callable[[], bool], seed: int) -> list[list[dict[str, int]]]:
    """A random workload on two ranks; answers what each step of each carried."""
    dice = random.Random(seed)
    for tick in range(300):
        for rank, engine in enumerate(engines):
            if dice.random() < 0.2:
                prompt = [
                    *range(16 * dice.randrange(4)),
                    *(dice.randrange(1000) for _ in range(dice.randrange(1, 400))),
                ]
                priority = dice.choice((-1, 0, 0, 1))
                engine.add(
                    f"r{rank}.{tick}", prompt, out=dice.randrange(1, 40), arrival_s=tick / 100, priority=priority
                )
        step()
    while step():
        pass
    return [[carried for carried in engine.schedules if carried] for engine in engines]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_ranks_that_step_together_do_as_stock_vllm_under_other_orders(make_engine, settings, policy, seed):
    shape = {"max_num_seqs": 6, "step_tokens": 256, "kv_blocks": 60}
    settings.put(policy=policy, yield_prefills=True, cut_prefills=True, kv_growth_blocks=4)
    group = Lockstep([make_engine(vllm_policy="priority", **shape) for _ in range(2)])
    stock = [make_engine(vllm_policy=policy, stock=True, **shape) for _ in range(2)]
    ours = play_on_two(group.engines, group.step, seed)
    assert ours == play_on_two(stock, lambda: step_each(stock), seed)
    assert sum(engine.scheduler._preemptions for engine in group.engines) > 0


def test_the_levers_come_and_go_with_the_order_while_it_runs(make_engine, settings):
    settings.put(policy="sjf", kv_growth_blocks=1000)
    engine = make_engine(max_num_seqs=8, step_tokens=128, kv_blocks=64)
    for number in range(4):
        engine.add(f"r{number}", 30, out=30, arrival_s=number * 0.001)
    together = []
    for policy in ("sjf", "fcfs", "sjf"):
        settings.put(policy=policy, kv_growth_blocks=1000)
        for _ in range(3):
            engine.step()
        together.append(len(engine.schedules[-1]))
        engine.add(f"after-{len(together)}", 30, out=30, arrival_s=1.0)
    assert together == [1, 5, 5]


def test_a_rank_learns_from_what_the_others_did_and_not_from_what_it_guessed(lockstep):
    group = lockstep()
    learnt: list[list[dict[str, Any]]] = [[], []]
    for engine, rows in zip(group.engines, learnt, strict=True):
        engine.scheduler._step_curve.observe = lambda rows=rows, **row: rows.append(row)
    for number in range(8):
        group.engines[number % 2].add(f"r{number}", 100 + 400 * number, out=20, arrival_s=0.0)
    while group.step():
        pass
    carried = [[sum(step.values()) for step in engine.schedules if step] for engine in group.engines]
    both = min(map(len, carried)) - 1
    assert both > 10
    assert carried[0][:both] != carried[1][:both]
    together = [sum(step) for step in zip(*carried, strict=False)]
    for rows in learnt:
        # But for the first step, which comes before there is anything to compare its time with.
        assert [row["all_tokens"] for row in rows[1:both]] == together[1:both]


# The records.


@pytest.fixture
def local_group(virtual_engines):
    from moe_agent.vllm.prefill_group import SharedMemoryPrefillGroup

    return SharedMemoryPrefillGroup


STATE = PrefillState(5.0, 4.0, RankLoad(100, 7, 2), RankLoad(0, 9, 1), (StepPart(4.0, 90, 7), StepPart(3.0, 0, 6)))


def test_ranks_read_what_the_others_publish(local_group, tmp_path):
    groups = [local_group(tmp_path, rank, 3) for rank in range(3)]
    groups[1].publish(STATE)
    assert groups[0].others(5.5) == [STATE]
    groups[2].publish(STATE._replace(written_s=5.2))
    assert groups[0].others(5.5) == [STATE, STATE._replace(written_s=5.2)]
    assert groups[1].others(5.5) == [STATE._replace(written_s=5.2)]


def test_a_rank_that_publishes_nothing_is_idle(local_group, tmp_path):
    first, second = local_group(tmp_path, 0, 2), local_group(tmp_path, 1, 2)
    second.publish(STATE)
    assert first.others(6.0) == [STATE]
    assert first.others(6.1) == []


def test_ranks_of_other_machines_are_not_seen(local_group, tmp_path):
    assert local_group(tmp_path, 0, 16).others(5.0) == []


def test_a_rank_that_comes_later_or_starts_again_is_found(local_group, tmp_path):
    group = local_group(tmp_path, 0, 2)
    assert group.others(5.0) == []
    for start in range(2):
        other = PrefillRecordWriter(tmp_path, 1, STATE._replace(written_s=10.0 * start))
        calls = 0
        while not group.others(10.0 * start + 0.5):
            calls += 1
            assert calls < 100
        other.close()


def test_what_a_rank_publishes_is_read_whole(tmp_path):
    with PrefillRecordWriter(tmp_path, 3, STATE), PrefillRecordReader(tmp_path, 3) as reader:
        assert reader.read() == STATE


@pytest.mark.parametrize(
    ("decided_s", "counts"), [(9.0, "after"), (10.0, "after"), (10.49, "after"), (10.51, "before"), (11.0, "before")]
)
def test_a_rank_that_has_planned_this_step_already_counts_with_what_it_had_before(virtual_engines, decided_s, counts):
    from moe_agent.vllm.prefill_group import load_in_this_step

    state = STATE._replace(decided_s=decided_s)
    assert load_in_this_step(state, last_decided_s=10.0, now_s=11.0) is getattr(state, counts)


# A bound of the time between tokens.

BOUND_S = 0.05


def steps_beside_answers(make_engine: Any, settings: Any, **values: Any) -> list[float]:
    """Seconds of the steps in which answers went on while the prompts of the second half were computed."""
    settings.put(**values)
    engine = make_engine(max_num_seqs=32, step_tokens=2048, kv_blocks=4000)
    engine.pace = lambda prefill_tokens, decoding: 0.01 + 0.0001 * prefill_tokens
    dice = random.Random(5)
    engine.add("answer", 10, out=4000, arrival_s=0.0)
    # Prompts of all sizes, from which the time of a step is learned.
    for number in range(100):
        engine.add(f"first{number}", dice.randrange(20, 1500), out=4, arrival_s=0.1 * number)
        engine.step()
    while len(engine.finished_order) < 100:
        engine.step()
    begun = len(engine.schedules)
    for number in range(10):
        engine.add(f"second{number}", 1500, out=2, arrival_s=engine.now_s)
    while len(engine.finished_order) < 110:
        engine.step()
    return [0.01 + 0.0001 * (sum(step.values()) - 1) for step in engine.schedules[begun:]]


def test_with_a_bound_prompts_are_cut_so_that_answers_go_on_in_time(make_engine, settings):
    free = steps_beside_answers(make_engine, settings, policy="sjf")
    bounded = steps_beside_answers(make_engine, settings, policy="sjf", inter_token_s=BOUND_S)
    assert max(free) > 2 * BOUND_S
    assert max(bounded) < 1.1 * BOUND_S
    # Nothing is lost to the bound but the fixed part of more steps.
    assert sum(bounded) < 1.5 * sum(free)


def test_in_a_group_a_rank_without_answers_keeps_the_bound_of_the_others(lockstep):
    group = lockstep(inter_token_s=BOUND_S)
    for engine in group.engines:
        engine.scheduler._step_curve.at = lambda _: StepTimeCurve(token_s=0.0001, decode_only_s=0.01, knees=())
    alone = group.engines[0]
    group.engines[1].add("answer", 10, out=100, arrival_s=0.0)
    for _ in range(5):
        group.step()
    alone.add("long", 1000, out=1, arrival_s=1.0)
    while "long" not in alone.finished_order:
        group.step()
    assert 300 < max(step.get("long", 0) for step in alone.schedules) <= 400


def test_other_orders_know_no_bound(make_engine, settings):
    free = steps_beside_answers(make_engine, settings, policy="fcfs")
    assert steps_beside_answers(make_engine, settings, policy="fcfs", inter_token_s=BOUND_S) == free
