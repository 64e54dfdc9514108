"""Whole runs on vLLM's real schedulers: the real parts behave as in vLLM, and a run depends on its inputs alone."""

import json
from dataclasses import asdict, replace

import pytest
from moe_contract.input_errors import InvalidInput
from moe_lab.experiments.variants import VARIANTS
from moe_scheduling.engine.choice import DispatchPolicy, EngineSettings
from moe_scheduling.request.order import RequestPolicy, RequestSettings
from moe_tools.shapes import Shape, ShapeSettings, build_shape
from moe_tools.simulator.arrivals import ArrivalShape, Senders, arrange
from moe_tools.simulator.costs import LinearCost
from moe_tools.simulator.outcome import build_rows
from moe_tools.simulator.rank import OURS, STOCK, EngineLimits
from moe_tools.simulator.rivals import RIVALS
from moe_tools.simulator.signals import Loss, SignalKind, SignalPlan
from moe_tools.simulator.simulation import Clients, Simulation, load_vllm, simulate
from moe_tools.simulator.world import ServerFailure
from moe_tools.traces import TraceRequest

LINE = LinearCost(base_s=0.006, prefill_s=0.00004, decode_s=0.0001)
LIMITS = EngineLimits(max_num_seqs=32, max_num_batched_tokens=1024, kv_blocks=2000, max_model_len=8192)
ROUND_ROBIN = EngineSettings(policy=DispatchPolicy.ROUND_ROBIN)


# Whichever test comes first pays for loading vLLM, which takes minutes on a busy machine.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def maker():
    return load_vllm()


def short_trace(count=60, rate=40.0, seed=1):
    shape = ShapeSettings(
        count=count, seed=seed, longest_tokens=2000, median_output_tokens=12, longest_output_tokens=40
    )
    return arrange(build_shape(Shape.TWO_END, shape), ArrivalShape.POISSON, rate, seed)


def simulation(**changes):
    return Simulation(**{"trace": short_trace(), "cost": LINE, "limits": LIMITS, **changes})


def one(prompt_tokens, arrival_s=0.0, output_tokens=3, **values):
    return TraceRequest(arrival_s=arrival_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens, **values)


def times(outcome):
    return [(row.first_token_s, row.finished_s, row.server, row.rank) for row in outcome.requests]


# A run depends on its inputs alone.


@pytest.mark.parametrize("scheduler", [OURS, STOCK])
def test_the_same_simulation_gives_the_same_bytes(maker, scheduler):
    runs = [simulate(simulation(scheduler=scheduler, servers=3, gateways=2), maker) for _ in range(2)]
    one, other = (json.dumps([asdict(run.figures), asdict(run.totals), build_rows(run.requests)]) for run in runs)
    assert one == other


def test_another_seed_gives_other_gateways(maker):
    runs = [simulate(simulation(servers=2, gateways=2, seed=seed), maker) for seed in (1, 2)]
    assert [row.gateway for row in runs[0].requests] != [row.gateway for row in runs[1].requests]


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_variant_answers_every_request(maker, name):
    outcome = simulate(VARIANTS[name].apply(simulation(servers=2)), maker)
    assert outcome.figures.failed == 0
    for row in outcome.requests:
        assert row.arrival_s <= row.sent_s < row.first_token_s <= row.finished_s


def test_every_rival_spreads_over_the_fleet(maker):
    for name in RIVALS:
        outcome = simulate(simulation(scheduler=STOCK, dispatch=name, servers=2), maker)
        assert {row.server for row in outcome.requests} == {"engine-0", "engine-1"}, name


# Time.


def test_a_lone_request_takes_its_own_steps(maker):
    outcome = simulate(simulation(trace=[one(2500, output_tokens=4)], scheduler=STOCK), maker)
    row = outcome.requests[0]
    # Two full steps of 1,024 tokens and one of 452.
    assert row.first_token_s == pytest.approx(3 * 0.006 + 2500 * 0.00004)
    assert row.finished_s - row.first_token_s == pytest.approx(3 * (0.006 + 0.0001))
    assert outcome.figures.ttft_floor == pytest.approx(row.first_token_s)


def test_what_comes_during_a_step_waits_for_the_next_and_one_more_when_scheduling_is_asynchronous(maker):
    trace = [one(1000, output_tokens=50), one(10, arrival_s=0.060)]
    first_s = {}
    for ahead in (False, True):
        outcome = simulate(simulation(trace=trace, scheduler=STOCK, async_scheduling=ahead), maker)
        first_s[ahead] = outcome.requests[1].first_token_s
    step_s = 0.006 + 0.0001
    assert first_s[True] - first_s[False] == pytest.approx(step_s, rel=0.5)


def test_our_engines_schedule_a_step_late_so_that_what_comes_is_in_it(maker):
    # Steps are as long as learnt after the first hundred; then prompts come within steps that decode.
    trace = [one(64, arrival_s=0.05 * number, output_tokens=40) for number in range(80)]
    span_s = {}
    for late in (False, True):
        outcome = simulate(simulation(trace=trace, request=RequestSettings(defer_scheduling=late)), maker)
        span_s[late] = sum(row.first_token_s - row.arrival_s for row in outcome.requests[40:]) / 40
    # Half a step and the own one, instead of a whole step more.
    assert span_s[True] < span_s[False] - 0.5 * 0.006


def test_an_idle_rank_is_in_the_next_dummy_pass_already_and_ours_waits_with_it(maker):
    # The second request comes to the other rank while the first one decodes, in steps of 30 ms.
    cost = LinearCost(base_s=0.03, prefill_s=0.0, decode_s=0.0)
    steps = {}
    for name, scheduler, ahead in (("ahead", STOCK, True), ("not ahead", STOCK, False), ("ours", OURS, True)):
        waits_s = []
        for arrival_s in (9.001, 9.009, 9.017, 9.025):
            trace = [one(64, output_tokens=600), one(16, arrival_s=arrival_s)]
            plan = simulation(
                trace=trace, cost=cost, ranks=2, scheduler=scheduler, async_scheduling=ahead, dispatch="roundRobin"
            )
            outcome = simulate(plan, maker)
            assert [row.rank for row in outcome.requests] == [0, 1]
            waits_s.append(outcome.requests[1].first_token_s - arrival_s)
        steps[name] = sum(waits_s) / len(waits_s) / 0.03
    # Half a step on the mean, those that are lost, and the own one.
    assert steps["ahead"] == pytest.approx(3.5, abs=0.15)
    assert steps["not ahead"] == pytest.approx(2.5, abs=0.15)
    assert steps["ours"] == pytest.approx(1.6, abs=0.15)


def test_a_step_that_is_not_scheduled_ahead_shows_what_scheduling_takes(maker):
    trace = [one(16, output_tokens=100)]
    ends_s = {
        (ahead, exposed_s): simulate(
            simulation(trace=trace, scheduler=STOCK, async_scheduling=ahead, exposed_s=exposed_s), maker
        )
        .requests[0]
        .finished_s
        for ahead in (False, True)
        for exposed_s in (0.0, 0.002)
    }
    assert ends_s[False, 0.002] - ends_s[False, 0.0] == pytest.approx(100 * 0.002)
    # The first step alone has none before it.
    assert ends_s[True, 0.002] - ends_s[True, 0.0] == pytest.approx(0.002)


def test_ranks_in_lockstep_pay_for_the_slowest(maker):
    # A short answer decodes on one rank while another rank computes a long prompt.
    trace = [one(16, output_tokens=100), one(4000, arrival_s=0.01)]
    lone = simulate(simulation(trace=trace, servers=2, dispatch=ROUND_ROBIN), maker)
    lockstep = simulate(simulation(trace=trace, ranks=2, dispatch=ROUND_ROBIN), maker)
    assert {row.rank for row in lockstep.requests} == {0, 1}
    assert lone.requests[0].finished_s == pytest.approx(0.006 + 16 * 0.00004 + 99 * 0.0061, rel=0.01)
    assert lockstep.requests[0].finished_s - lone.requests[0].finished_s == pytest.approx(4000 * 0.00004, rel=0.1)


def test_prefills_wait_for_their_step_under_vllms_interval(maker):
    trace = [one(16, output_tokens=60), one(500, arrival_s=0.05), one(500, arrival_s=0.06)]
    spans = {}
    for interval in (1, 8):
        limits = replace(LIMITS, prefill_schedule_interval=interval)
        outcome = simulate(simulation(trace=trace, ranks=2, limits=limits, dispatch=ROUND_ROBIN), maker)
        spans[interval] = [row.first_token_s - row.arrival_s for row in outcome.requests[1:]]
    assert sum(spans[8]) > sum(spans[1]) + 0.006


def test_a_single_rank_has_the_interval_where_its_vllm_has_it(maker):
    from moe_agent.vllm.version import find_version, minor_of

    trace = [one(16, output_tokens=60), one(500, arrival_s=0.05), one(500, arrival_s=0.06)]
    ends_s = {}
    for interval in (1, 8):
        limits = replace(LIMITS, prefill_schedule_interval=interval)
        outcome = simulate(simulation(trace=trace, limits=limits, scheduler=STOCK), maker)
        ends_s[interval] = outcome.requests[2].first_token_s
    if minor_of(find_version()) == "0.32":
        assert ends_s[8] == ends_s[1]
    else:
        assert ends_s[8] > ends_s[1] + 0.006


# What vLLM does.


def test_shared_blocks_are_found_in_the_cache_and_seen_by_the_gateway(maker):
    trace = [one(1100, arrival_s=index * 1.0, blocks=(1, 2)) for index in range(4)]
    outcome = simulate(simulation(trace=trace, servers=2), maker)
    assert [row.cached_tokens for row in outcome.requests] == [0, 1024, 1024, 1024]
    assert len({row.server for row in outcome.requests}) == 1


def test_a_full_cache_preempts_and_all_are_answered(maker):
    limits = replace(LIMITS, kv_blocks=40, max_model_len=640)
    trace = [one(150, output_tokens=200) for _ in range(4)]
    for scheduler in (OURS, STOCK):
        outcome = simulate(simulation(trace=trace, limits=limits, scheduler=scheduler), maker)
        assert outcome.figures.preemptions > 0
        assert outcome.figures.failed == 0


def test_the_order_of_layer_1_reaches_the_engine(maker):
    trace = [one(1024, output_tokens=40), *(one(1000, arrival_s=0.01) for _ in range(3)), one(10, arrival_s=0.02)]
    limits = replace(LIMITS, max_num_seqs=2, max_num_batched_tokens=1024)
    first_s = {}
    for policy in (RequestPolicy.FCFS, RequestPolicy.SJF):
        run = simulate(simulation(trace=trace, limits=limits, request=RequestSettings(policy=policy)), maker)
        first_s[policy] = run.requests[-1].first_token_s
    assert first_s[RequestPolicy.SJF] < first_s[RequestPolicy.FCFS] - 0.05


def test_our_scheduler_under_fcfs_is_vllms_own(maker):
    settings = RequestSettings(policy=RequestPolicy.FCFS)
    ours = simulate(simulation(scheduler=OURS, request=settings, dispatch="roundRobin", servers=2), maker)
    stock = simulate(simulation(scheduler=STOCK, dispatch="roundRobin", servers=2), maker)
    assert times(ours) == times(stock)


def test_a_scheduler_may_be_any_factory(maker):
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    made = []

    def factory(**arguments):
        made.append(AsyncScheduler(**arguments))
        return made[-1]

    outcome = simulate(simulation(scheduler=factory, servers=2), maker)
    assert len(made) == 2
    assert outcome.figures.failed == 0


def test_a_conversation_goes_on_after_its_answer_and_finds_its_prompt(maker):
    trace = [
        one(1024, blocks=(1, 2), conversation="a"),
        one(1536, blocks=(1, 2, 3), conversation="a", think_s=2.0),
        one(100, arrival_s=0.5),
    ]
    first, second, other = simulate(simulation(trace=trace), maker).requests
    assert second.arrival_s == first.finished_s + 2.0
    assert (first.cached_tokens, second.cached_tokens) == (0, 1024)
    assert other.arrival_s == 0.5


def test_a_class_that_is_not_there_is_reported(maker):
    with pytest.raises(InvalidInput, match=r"engines\.scheduler: no class 'no\.such\.Class'"):
        simulate(simulation(scheduler="no.such.Class"), maker)


def test_gimbal_serves_the_shortest_first_until_one_has_waited_for_five_seconds(maker):
    slow = LinearCost(base_s=0.5, prefill_s=0.0, decode_s=0.0)
    limits = replace(LIMITS, max_num_seqs=1)
    # One seat: a long prompt waits, and a short one comes each second.
    trace = [one(10), one(900, arrival_s=0.1), *(one(20, arrival_s=0.2 + index) for index in range(12))]
    outcome = simulate(
        simulation(
            trace=trace,
            cost=slow,
            limits=limits,
            dispatch="gimbal",
            scheduler="moe_tools.simulator.gimbal.GimbalScheduler",
        ),
        maker,
    )
    long_row = outcome.requests[1]
    overtook = [row for row in outcome.requests[2:] if row.first_token_s < long_row.first_token_s]
    assert 5.0 < long_row.first_token_s - long_row.arrival_s < 8.0
    assert overtook


# Gateways, signals, failures.


def test_saturated_engines_make_the_gateway_hold(maker):
    trace = short_trace(count=120, rate=300.0)
    settings = EngineSettings(saturation_s=0.05)
    outcome = simulate(simulation(trace=trace, dispatch=settings), maker)
    assert outcome.figures.failed == 0
    assert any(row.sent_s > row.arrival_s for row in outcome.requests)


def test_a_full_hold_queue_refuses(maker):
    outcome = simulate(
        simulation(
            trace=short_trace(count=120, rate=3000.0), dispatch=EngineSettings(saturation_s=0.01), hold_requests=5
        ),
        maker,
    )
    assert {row.failure for row in outcome.requests} == {"", "the hold queue is full"}


def test_an_engine_that_dies_breaks_streams_and_its_unanswered_go_elsewhere(maker):
    trace = short_trace(count=100, rate=60.0)
    outcome = simulate(
        simulation(trace=trace, servers=2, failures=[ServerFailure(server="engine-0", at_s=0.5, startup_s=0.5)]), maker
    )
    assert {row.failure for row in outcome.requests} <= {"", "its engine failed"}
    moved = [row for row in outcome.requests if row.attempts == 2 and not row.failure]
    assert moved
    assert {row.server for row in moved} == {"engine-1"}
    assert any(row.server == "engine-0" and row.sent_s > 1.0 for row in outcome.requests)


def test_engines_that_start_later_get_no_work_before(maker):
    outcome = simulate(simulation(servers=2, startup_s=(0.0, 0.7)), maker)
    late = [row.sent_s for row in outcome.requests if row.server == "engine-1"]
    assert late
    assert min(late) >= 0.7


def test_without_any_engine_requests_are_held_until_one_is_there(maker):
    outcome = simulate(simulation(trace=short_trace(count=10), startup_s=3.0), maker)
    assert outcome.figures.failed == 0
    assert min(row.sent_s for row in outcome.requests) >= 3.0


@pytest.mark.parametrize(
    "signals",
    [
        SignalPlan(source=SignalKind.NONE, period_s=1.0),
        SignalPlan(source=SignalKind.SCRAPE, period_s=0.25),
        SignalPlan(delay_s=1.0),
        SignalPlan(losses=[Loss(from_s=0.3)]),
    ],
)
def test_all_are_answered_whatever_becomes_of_the_signals(maker, signals):
    outcome = simulate(simulation(servers=2, signals=signals, gateways=2), maker)
    assert outcome.figures.failed == 0
    assert {row.server for row in outcome.requests} == {"engine-0", "engine-1"}


def test_a_closed_loop_keeps_its_clients_busy_and_no_more(maker):
    outcome = simulate(simulation(clients=Clients(count=5, think_s=0.01), servers=2), maker)
    edges = sorted(
        [(row.arrival_s, 1) for row in outcome.requests] + [(row.finished_s, -1) for row in outcome.requests]
    )
    most = current = 0
    for _, change in edges:
        current += change
        most = max(most, current)
    assert most == 5
    assert outcome.figures.requests == 60


def test_sessions_stay_at_their_engine(maker):
    trace = [one(200, arrival_s=index * 0.5) for index in range(20)]
    outcome = simulate(simulation(trace=trace, servers=3, senders=Senders(sessions=2)), maker)
    homes = {(row.session, row.server) for row in outcome.requests}
    assert len(homes) == 2
