"""The order of service in vLLM's real scheduler, in virtual time, without a model."""

import random
from typing import Any

import pytest
from moe_agent.shared_memory.rank_record import RankRecordReader


def test_short_jobs_are_served_before_a_long_one_that_came_first(make_engine, settings):
    settings.put(policy="sjf")
    engine = make_engine(max_num_seqs=1)
    engine.add("running", 16, out=20)
    engine.step()
    engine.add("long", 2000, arrival_s=0.1)
    engine.add("short", 20, arrival_s=0.2)
    engine.add("shorter", 10, arrival_s=0.205)
    assert engine.run().first_token_order == ["running", "shorter", "short", "long"]


def test_fcfs_serves_by_arrival(make_engine, settings):
    settings.put(policy="fcfs")
    engine = make_engine(max_num_seqs=1)
    engine.add("running", 16, out=20)
    engine.step()
    engine.add("long", 2000, arrival_s=0.1)
    engine.add("short", 20, arrival_s=0.2)
    assert engine.run().first_token_order == ["running", "long", "short"]


def test_a_long_job_that_waited_long_enough_is_served_first(make_engine, settings):
    settings.put(policy="sjf", ageing_rate=1000.0, ageing_horizon_s=10.0)
    engine = make_engine(max_num_seqs=1)
    engine.add("running", 16, out=20)
    engine.step()
    engine.add("long", 2000, arrival_s=0.0)
    engine.add("early", 20, arrival_s=1.0)
    engine.add("late", 20, arrival_s=2.5)
    assert engine.run().first_token_order == ["running", "early", "long", "late"]


@pytest.mark.parametrize(
    ("tokens_per_s", "order"), [(1_000_000.0, ["long", "short"]), (1000.0, ["short", "long"])], ids=["fast", "slow"]
)
def test_what_a_second_of_waiting_makes_up_for_goes_by_the_steps_of_the_engine(
    make_engine, settings, tokens_per_s, order
):
    settings.put(policy="sjf")
    engine = make_engine(max_num_seqs=1)
    engine.pace = lambda prefill_tokens, decoding: prefill_tokens / tokens_per_s + 1e-6
    for number in range(10):
        engine.add(f"first{number}", 256, out=1)
        engine.run()
    engine.add("running", 16, out=20, arrival_s=10.0)
    engine.step()
    engine.add("long", 2000, arrival_s=10.1)
    engine.add("short", 20, arrival_s=10.4)
    assert [request.request_id for request in engine.scheduler.waiting] == order
    assert engine.run().first_token_order[-2:] == order


def test_an_engine_that_is_found_to_be_fast_no_longer_holds_a_long_job_back(make_engine, settings):
    """What waits is ordered anew: light steps that compile kernels came first, and a long request in that time."""
    settings.put(policy="sjf")
    engine = make_engine(max_num_seqs=1)
    engine.pace = lambda prefill_tokens, decoding: 0.2
    for number in range(10):
        engine.add(f"first{number}", 16, out=1)
        engine.run()
    engine.add("running", 3000, out=20, arrival_s=10.0)
    engine.step()
    engine.add("long", 2000, arrival_s=10.1)
    engine.add("short", 20, arrival_s=12.0)
    assert [request.request_id for request in engine.scheduler.waiting] == ["short", "long"]
    engine.pace = lambda prefill_tokens, decoding: 0.0002
    assert engine.run().first_token_order[-3:] == ["running", "long", "short"]


def test_priority_serves_the_lower_level_first(make_engine, settings):
    settings.put(policy="priority")
    engine = make_engine(max_num_seqs=1, vllm_policy="priority")
    engine.add("running", 16, out=20)
    engine.step()
    engine.add("plain", 10, arrival_s=0.1)
    engine.add("patient", 10, arrival_s=0.2, priority=5)
    engine.add("urgent", 500, arrival_s=0.3, priority=-1)
    assert engine.run().first_token_order == ["running", "urgent", "plain", "patient"]


def test_a_level_of_priority_is_worth_its_head_start_under_sjf(make_engine, settings):
    settings.put(policy="sjf", priority_step_s=2.0)
    engine = make_engine(max_num_seqs=1, vllm_policy="priority")
    engine.add("running", 16, out=20)
    engine.step()
    engine.add("plain", 100, arrival_s=0.1)
    engine.add("urgent", 1000, arrival_s=0.2, priority=-1)
    assert engine.run().first_token_order == ["running", "urgent", "plain"]


def test_the_size_of_a_job_is_what_the_prefix_cache_does_not_hold(make_engine, settings):
    settings.put(policy="sjf")
    engine = make_engine(max_num_seqs=1)
    shared = list(range(800))
    engine.add("first", shared, out=1)
    engine.run()
    engine.add("running", 16, out=20)
    engine.step()
    engine.add("fresh", [900 + i % 50 for i in range(200)], arrival_s=0.1)
    engine.add("cached", [*shared, 1, 2, 3], arrival_s=0.2)
    assert engine.scheduler.waiting.prefill_tokens == 200 + 3
    # vLLM empties these counts at each step, so the present ones came from the two looks above.
    assert engine.scheduler.kv_cache_manager.prefix_cache_stats.requests == 0
    assert engine.run().first_token_order[-2:] == ["cached", "fresh"]


def test_a_change_of_settings_reorders_what_waits(make_engine, settings):
    settings.put(policy="fcfs")
    engine = make_engine(max_num_seqs=1)
    engine.add("running", 16, out=20)
    engine.step()
    engine.add("long", 2000, arrival_s=0.1)
    engine.add("short", 20, arrival_s=0.2)
    assert [request.request_id for request in engine.scheduler.waiting] == ["long", "short"]
    settings.put(policy="sjf")
    engine.step()
    assert [request.request_id for request in engine.scheduler.waiting] == ["short", "long"]
    with RankRecordReader(settings.run_dir, 0) as record:
        assert record.read().config_version == 3
    assert engine.run().first_token_order == ["running", "short", "long"]


def test_aborts_of_waiting_running_and_unknown_requests_leave_the_rest_in_order(make_engine, settings):
    settings.put(policy="sjf")
    engine = make_engine(max_num_seqs=1)
    engine.add("running", 16, out=20)
    engine.step()
    for index in range(6):
        engine.add(f"r{index}", 100 - index, arrival_s=0.1)
    engine.abort("r1", "r4", "running", "never-seen")
    engine.abort("r1")
    assert engine.run().first_token_order == ["running", "r5", "r3", "r2", "r0"]
    assert not engine.scheduler.requests


def test_a_preempted_request_comes_back_and_ends(make_engine, settings):
    settings.put(policy="sjf")
    engine = make_engine(max_num_seqs=4, kv_blocks=12)
    for index in range(4):
        engine.add(f"r{index}", 30, out=60, arrival_s=index * 0.01)
    engine.run()
    with RankRecordReader(settings.run_dir, 0) as record:
        assert record.read().signal.preemptions > 0
    assert sorted(engine.finished_order) == ["r0", "r1", "r2", "r3"]


def test_the_oldest_of_equals_is_never_the_victim_of_a_preemption(make_engine, settings):
    settings.put(policy="sjf")
    engine = make_engine(max_num_seqs=4, kv_blocks=12, vllm_policy="priority")
    requests = [engine.add(f"r{index}", 40 - 5 * index, out=60, arrival_s=index * 0.001) for index in range(4)]
    engine.run()
    assert requests[0].num_preemptions == 0
    assert sum(request.num_preemptions for request in requests) > 0


def play(engine: Any, seed: int, priorities: tuple[int, ...]) -> tuple[list[dict[str, int]], list[str]]:
    """A random workload with shared prefixes and aborts; answers what each step carried and the order of ends."""
    dice = random.Random(seed)
    names: list[str] = []
    for tick in range(120):
        for _ in range(dice.choice((0, 0, 1, 2))):
            name = f"r{len(names)}"
            prefix = list(range(16 * dice.randrange(4)))
            prompt = [*prefix, *(dice.randrange(1000) for _ in range(dice.randrange(1, 150)))]
            engine.add(name, prompt, out=dice.randrange(1, 40), arrival_s=float(tick), priority=dice.choice(priorities))
            names.append(name)
        if names and dice.random() < 0.1:
            engine.abort(dice.choice(names))
        engine.step()
    engine.run()
    return engine.schedules, engine.finished_order


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("policy", "priorities"), [("fcfs", (0,)), ("priority", (-1, 0, 0, 1))])
def test_each_step_equals_that_of_stock_vllm(make_engine, settings, policy, priorities, seed, ahead):
    shape = {"max_num_seqs": 6, "step_tokens": 128, "kv_blocks": 40, "ahead": ahead}
    settings.put(policy=policy)
    ours = play(make_engine(vllm_policy="priority", **shape), seed, priorities)
    stock = play(make_engine(vllm_policy=policy, stock=True, **shape), seed, priorities)
    assert ours == stock


def test_the_equality_is_tested_with_preemptions(make_engine, settings):
    settings.put(policy="fcfs")
    play(make_engine(max_num_seqs=6, step_tokens=128, kv_blocks=40, vllm_policy="priority"), 0, (0,))
    with RankRecordReader(settings.run_dir, 0) as record:
        assert record.read().signal.preemptions > 3


def play_session(engine: Any) -> tuple[list[dict[str, int]], list[str]]:
    """A session of streaming input, which holds its KV blocks between chunks, among plain requests."""
    engine.add("session", 50, out=3, resumable=True)
    engine.add("plain", 70, out=10)
    for chunk in range(3):
        for _ in range(12):
            engine.step()
        engine.add(f"other{chunk}", 300, out=2)
        engine.add("session", 20, out=3, resumable=True)
    engine.run()
    engine.add("session", 1)
    engine.run()
    return engine.schedules, engine.finished_order


def test_a_session_of_streaming_input_goes_on_as_in_stock_vllm(make_engine, settings):
    settings.put(policy="fcfs")
    ours = play_session(make_engine(max_num_seqs=2, step_tokens=64, vllm_policy="priority"))
    assert ours == play_session(make_engine(max_num_seqs=2, step_tokens=64, stock=True))
    assert sum("session" in carried for carried in ours[0]) >= 4 * 3
    with RankRecordReader(settings.run_dir, 0) as record:
        assert record.read().idle


def test_a_session_is_no_waiting_work_between_its_chunks(make_engine, settings):
    settings.put(policy="sjf")
    engine = make_engine(max_num_seqs=2)
    engine.add("session", 50, out=3, resumable=True)
    engine.run()
    with RankRecordReader(settings.run_dir, 0) as record:
        assert record.read().signal.waiting_prefill_tokens == 0
        assert record.read().idle, "else an engine whose clients are silent would count as one that hangs"
        engine.add("session", 20, out=3, resumable=True)
        assert not record.read().idle
        # The last token of a chunk's answer is not computed yet, and vLLM takes it back.
        assert record.read().signal.waiting_prefill_tokens == 20
    engine.run()
