"""What a rank publishes, recounted by hand at each step of vLLM's real scheduler in virtual time."""

import random
from typing import Any

import pytest
from moe_agent.shared_memory.expert_record import ExpertRecordWriter, ExpertState
from moe_agent.shared_memory.rank_record import RankRecordReader, RankState


def check(engine: Any, state: RankState) -> None:
    """Compares with the statistics, which are kept from the inputs and outputs of the steps alone."""
    scheduler, signal = engine.scheduler, state.signal
    left = [engine.progress.left(request.request_id) for request in scheduler.running if known(engine, request)]
    unknown = [
        engine.progress.tokens[request.request_id] for request in scheduler.running if not known(engine, request)
    ]
    assert signal.running == len(scheduler.running)
    assert signal.waiting == len(scheduler.waiting) + len(scheduler.kv_holding_waiting)
    assert signal.running_prefill_tokens == sum(left) + sum(unknown)
    assert signal.decode_tokens == left.count(0)
    assert signal.kv_usage == scheduler.kv_cache_manager.block_pool.get_usage()
    assert signal.kv_tokens == scheduler.kv_cache_config.num_blocks * scheduler.block_size


def known(engine: Any, request: Any) -> bool:
    """Whether a step that carried the request is over; scheduled ahead, its first may still be on its way."""
    return request.request_id in engine.progress.target


@pytest.fixture
def record(settings):
    """Reads the state that rank 0 published last."""
    readers = []

    def read() -> RankState:
        if not readers:
            readers.append(RankRecordReader(settings.run_dir, 0))
        return readers[0].read()

    yield read
    for reader in readers:
        reader.close()


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_the_signal_equals_a_recount_at_each_step(make_engine, settings, record, seed, ahead):
    settings.put(policy="sjf")
    engine, dice, names = (
        make_engine(max_num_seqs=6, step_tokens=64, kv_blocks=400, ahead=ahead),
        random.Random(seed),
        [],
    )
    for step in range(150):
        if dice.random() < 0.4:
            names.append(f"r{step}")
            engine.add(names[-1], dice.randrange(2, 200), out=dice.randrange(1, 30), arrival_s=float(step))
        if names and dice.random() < 0.1:
            engine.abort(dice.choice(names))
        engine.step()
        check(engine, record())
    assert len(engine.finished_order) > 20


def test_arrivals_aborts_and_the_last_step_are_published_at_once_and_steps_between_at_most_each_interval(
    make_engine, settings, record
):
    engine = make_engine(max_num_seqs=6, step_tokens=64, kv_blocks=400)
    engine.scheduler.publish_interval_s = 0.025
    engine.pace = lambda prefill_tokens, decoding: 0.010
    engine.add("a", 20, out=12)
    assert record().signal.waiting == 1
    engine.add("b", 20, out=40)
    assert record().signal.waiting == 2
    published = []
    for _ in range(9):
        engine.step()
        published.append(record().signal.step)
    assert published == [0, 0, 3, 3, 3, 6, 6, 6, 9]
    engine.abort("b")
    assert (record().signal.step, record().signal.running) == (9, 1)
    engine.run()
    assert record().idle
    assert record().signal.step == engine.scheduler._steps > 9


@pytest.mark.parametrize("ahead", [1, 2])
def test_the_scheduled_tokens_are_those_of_the_steps_on_their_way_and_the_rest_waits_for_a_step(
    make_engine, settings, record, ahead
):
    engine = make_engine(step_tokens=64, kv_blocks=400, ahead=ahead)
    engine.scheduler.publish_interval_s = 0.0
    engine.add("long", 1000, out=1)
    assert (record().signal.step_tokens, record().signal.scheduled_prefill_tokens) == (64, 0)
    for _ in range(3):
        engine.step()
        signal = record().signal
        # One of two steps has ended, and the next one is scheduled after the signal.
        assert signal.scheduled_prefill_tokens == 64 * (ahead - 1)
        assert signal.running_prefill_tokens > signal.scheduled_prefill_tokens


def test_steps_with_prompts_have_a_least_time_and_tell_how_long_the_engine_is_busy(make_engine, settings, record):
    engine = make_engine(max_num_seqs=4, step_tokens=64, kv_blocks=400, ahead=2)
    engine.scheduler.publish_interval_s = 0.0
    engine.pace = lambda prefill_tokens, decoding: 0.04 if prefill_tokens else 0.01
    for number in range(30):
        engine.add(f"r{number}", 100 + number, out=8)
        for _ in range(12):
            engine.step()
    signal = record().signal
    model = signal.step_time
    assert model.prefill_base_s + model.prefill_s * 64 + model.decode_step_s(1) == pytest.approx(0.04, rel=0.05)
    assert model.decode_step_s(1) == pytest.approx(0.01, rel=0.05)
    assert signal.busy_s == 0.0
    engine.add("last", 500, out=4)
    engine.step()
    # The step that runs carries 64 tokens of the prompt.
    assert record().signal.busy_s == pytest.approx(0.04, rel=0.1)


def test_the_signal_equals_a_recount_through_preemptions(make_engine, settings, record):
    settings.put(policy="sjf")
    engine = make_engine(max_num_seqs=4, step_tokens=64, kv_blocks=12)
    for index in range(6):
        engine.add(f"r{index}", 30, out=60, arrival_s=index * 0.01)
    while engine.step():
        check(engine, record())
    assert record().signal.preemptions > 0


def test_waiting_tokens_are_the_sum_of_what_the_cache_does_not_hold(make_engine, settings, record):
    settings.put(policy="sjf")
    engine = make_engine(max_num_seqs=1)
    engine.add("first", list(range(160)), out=1)
    engine.run()
    engine.add("running", 16, out=50)
    engine.step()
    engine.add("fresh", [999] * 100, arrival_s=1.0)
    engine.add("cached", [*range(160), 7, 8, 9], arrival_s=2.0)
    assert record().signal.waiting_prefill_tokens == 100 + 3
    engine.abort("fresh")
    assert record().signal.waiting_prefill_tokens == 3


def test_an_engine_without_work_publishes_zeros(make_engine, settings, record):
    settings.put(policy="sjf")
    engine = make_engine()
    for index in range(5):
        engine.add(f"r{index}", 100)
    engine.run()
    state = record()
    assert state.idle
    assert (state.signal.waiting_prefill_tokens, state.signal.running_prefill_tokens, state.signal.decode_tokens) == (
        0,
        0,
        0,
    )
    assert state.signal.kv_usage == 0.0
    assert state.signal.step > 0


def test_an_abort_of_the_last_request_is_published_without_a_step(make_engine, settings, record):
    settings.put(policy="sjf")
    engine = make_engine()
    engine.add("only", 500)
    assert record().signal.waiting == 1
    engine.abort("only")
    assert record().idle


def test_preemptions_are_counted_as_vllm_counts_them(make_engine, settings, record):
    settings.put(policy="sjf")
    engine = make_engine(max_num_seqs=4, kv_blocks=12)
    requests = [engine.add(f"r{index}", 30, out=60) for index in range(4)]
    engine.run()
    assert record().signal.preemptions == sum(request.num_preemptions for request in requests) > 0


def test_the_computed_tokens_are_those_of_every_step_and_more_than_asked_where_a_preemption_repeats_some(
    make_engine, settings, record
):
    settings.put(policy="sjf")
    engine = make_engine(max_num_seqs=6)
    for index in range(5):
        engine.add(f"r{index}", 100 + index, out=7)
    engine.run()
    # The last output token of a request is sampled by its last step and computed by none.
    assert record().signal.computed_tokens == sum(100 + index + 6 for index in range(5))
    crowded = make_engine(max_num_seqs=4, kv_blocks=12)
    for index in range(4):
        crowded.add(f"r{index}", 30, out=60)
    crowded.run()
    assert record().signal.computed_tokens > 4 * 89


def test_what_the_worker_found_about_its_expert_group_is_passed_on(make_engine, settings, record):
    settings.put(policy="sjf")
    with ExpertRecordWriter(settings.run_dir, 0, ExpertState()) as worker:
        engine = make_engine()
        engine.add("only", 100, out=10)
        engine.step()
        assert (record().signal.expert_balance, record().signal.expert_pressure) == (1.0, 1.0)
        assert record().config_version == 0, "the settings count when the group is in step with them too"
        worker.write(ExpertState(config_version=2, balance=1.5, pressure=0.75))
        engine.step()
        assert (record().signal.expert_balance, record().signal.expert_pressure) == (1.5, 0.75)
        assert record().config_version == 2


def test_the_step_number_rises_by_one_at_each_step(make_engine, settings, record):
    settings.put(policy="sjf")
    engine = make_engine()
    engine.add("only", 100, out=10)
    seen = []
    while engine.step():
        seen.append(record().signal.step)
    assert seen == list(range(1, len(seen) + 1))


def test_the_step_time_is_found_from_the_steps(make_engine, settings, record):
    settings.put(policy="sjf")
    engine, dice = make_engine(max_num_seqs=8, step_tokens=128), random.Random(1)
    engine.pace = lambda prefill_tokens, decoding: 0.010 + 0.0002 * prefill_tokens + 0.001 * decoding
    for step in range(400):
        if dice.random() < 0.3:
            engine.add(f"r{step}", dice.randrange(8, 300), out=dice.randrange(2, 30))
        if not engine.step():
            engine.now_s += 5.0
    line = record().signal.step_time
    assert line.base_s == pytest.approx(0.010, rel=0.01)
    assert line.prefill_s == pytest.approx(0.0002, rel=0.01)
    assert line.decode_s == pytest.approx(0.001, rel=0.01)
